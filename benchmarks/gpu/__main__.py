"""Prove or disprove what this project claims on a GPU: `make gpu-check`, in about ten minutes on an H100.

Each check runs in its own process with a limit, prints a line of JSON, and the table at the end is for
`benchmarks/README.md`. The exit code is 1 where a claim is false. `--device cpu` runs what has a meaning there.
"""

import argparse
import json
import signal
import sys

import torch

from benchmarks.gpu import cifar10, correctness, decoding, speed, waits
from benchmarks.gpu.checks import STOPPED, Runner, run_here, summary, table
from benchmarks.gpu.loaders import find_decoder
from data.shards.parallel import available_cores
from pipeline.build.trainer import no_gpu_reason

CORES_EACH = 4  # of each check of those that run at the same time
MODULES = (decoding, correctness, waits, speed, cifar10)
CHECKS = {check.name: check for module in MODULES for check in module.CHECKS}


def main() -> int:
    """Run all checks, or those that are named."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=shape)
    parser.add_argument("--device", choices=["cuda", "gpu", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="CHECK", choices=CHECKS, help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.device = "cpu" if arguments.device == "cpu" else "cuda"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        advice = "make gpu-check DEVICE=cpu runs what has a meaning on a CPU"
        print(f"error: there is no GPU{no_gpu_reason()}: {advice}", file=sys.stderr)
        return 1
    if arguments.one:
        run_here(CHECKS[arguments.one], torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu"))
        return 0
    chosen = [CHECKS[name] for name in arguments.only or CHECKS]
    if arguments.device == "cuda":
        print(json.dumps({"decoder": str(find_decoder(torch.device("cuda", 0)) or "CPU")}), flush=True)
    unfit = [check.name for check in chosen if arguments.device == "cpu" and not check.on_cpu]
    if unfit:
        print(f"not on a CPU: {', '.join(unfit)}", file=sys.stderr)
    chosen = [check for check in chosen if check.name not in unfit]

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a table of what is known, no process left
    runner, stopped = Runner(arguments.device), ""
    try:
        runner.run([one for one in chosen if not one.alone], workers=max(1, available_cores() // CORES_EACH))
        runner.run([one for one in chosen if one.alone], workers=1)
    except KeyboardInterrupt:
        finished = [one.check for one in runner.results if one.error != STOPPED]
        stopped = f" Stopped before the end of {', '.join(one.name for one in chosen if one.name not in finished)}."
    results = sorted(runner.results, key=lambda one: list(CHECKS).index(one.check))
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "a CPU"
    print(f"\nOn {name}, torch {torch.__version__}:\n\n{table(results)}\n\n{summary(results)}{stopped}")
    return int(bool(stopped) or any(result.holds is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
