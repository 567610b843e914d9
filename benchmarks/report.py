"""What a report costs: seconds, and memory beyond torch. `python -m benchmarks.report`.

Every network is looked at in a process of its own. The time is that of the command's own work, once torch is imported
with what it loads of itself at the first optimizer or dispatch mode (torch._dynamo), and that of the whole command. The
memory is what the process holds for itself (RssAnon) at its largest, and before, with torch alone.
"""

from __future__ import annotations

import subprocess
import sys
import time

NETWORKS = ("resnet.resnet50", "coatnet.coatnet_4", "efficientnet.efficientnet_b7")
CODE = """
import sys, threading, time
import torch, torch._dynamo

def own():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024

before, largest, done = own(), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        largest[0] = max(largest[0], own())

threading.Thread(target=watch, daemon=True).start()
from pipeline.cli.config import compose
from pipeline.report import __main__ as report
architecture, _, variant = sys.argv[1].partition(".")
began = time.perf_counter()
report.report_one(compose("report", [f"+model={architecture}", f"model.variant={variant}", "effective_images=0"]))
seconds = time.perf_counter() - began
done.set()
print(f"{seconds:.2f} {before:.0f} {max(largest[0], own()):.0f}", file=sys.stderr)
"""


def main() -> None:
    """Print a line a network."""
    print(f"{'network':30} {'report s':>9} {'command s':>10} {'MiB before':>11} {'MiB at most':>12}")
    for name in NETWORKS:
        began = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", CODE, name], capture_output=True, text=True, check=True)
        whole = time.perf_counter() - began
        seconds, before, largest = result.stderr.split()[-3:]
        print(f"{name:30} {seconds:>9} {whole:>10.2f} {before:>11} {largest:>12}")


if __name__ == "__main__":
    main()
