"""The cost of a report: seconds, and memory beyond torch. `python -m benchmarks.report`.

Each network runs in a separate process. Seconds are those of the report alone, after importing torch and the modules
that it loads for its first optimizer or dispatch mode (torch._dynamo), and those of the command. Memory is RssAnon of
the process after these imports, and its peak.
"""

from __future__ import annotations

import subprocess
import sys
import time

NETWORKS = ("resnet.resnet50", "coatnet.coatnet_4", "efficientnet.efficientnet_b7")
CODE = """
import sys, threading, time
import torch, torch._dynamo

def anonymous_mib():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024

before, peak, done = anonymous_mib(), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous_mib())

threading.Thread(target=watch, daemon=True).start()
from pipeline.cli.compose import compose
from pipeline.report.__main__ import report_one
architecture, _, variant = sys.argv[1].partition(".")
start = time.perf_counter()
report_one(compose("report", [f"+model={architecture}", f"model.variant={variant}", "effective_images=0"]))
seconds = time.perf_counter() - start
done.set()
print(f"{seconds:.2f} {before:.0f} {max(peak[0], anonymous_mib()):.0f}", file=sys.stderr)
"""


def main() -> None:
    """Print one line per network."""
    print(f"{'network':30} {'report s':>9} {'command s':>10} {'MiB before':>11} {'MiB peak':>12}")
    for name in NETWORKS:
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", CODE, name], capture_output=True, text=True, check=True)
        command_seconds = time.perf_counter() - start
        seconds, before, peak = result.stderr.split()[-3:]
        print(f"{name:30} {seconds:>9} {command_seconds:>10.2f} {before:>11} {peak:>12}")


if __name__ == "__main__":
    main()
