"""Packing class folders beside a plain loop over webdataset's ShardWriter, interleaved.

    python -m benchmarks.pack FOLDER       3 rounds of both on a folder of class folders or splits

The plain loop only writes image and label. Ours also decodes every image to verify it, hashes every shard, indexes
every sample and measures mean and standard deviation; it uses all cores, the loop one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def plain_loop(root: Path, out: Path) -> int:
    """Write the shards as webdataset's documentation shows; returns the number of images."""
    import webdataset as wds

    out.mkdir()
    paths = sorted(root.rglob("*.jpg"))
    labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, path in enumerate(paths):
            sample = {"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": labels[path.parent.name]}
            writer.write(sample)
    return len(paths)


def main() -> None:
    """Run both in turn, each as a command, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        plain_loop(arguments.root, arguments.loop)
        return
    images = sum(1 for _ in arguments.root.rglob("*.jpg"))
    seconds: dict[str, list[float]] = {"convoy": [], "ShardWriter loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            ours = ["-m", "pipeline.pack", "source=folder", f"source.root={arguments.root}", "name=benchmark"]
            commands = {
                "convoy": [*ours, f"out={folder}/ours{turn}"],
                "ShardWriter loop": ["-m", "benchmarks.pack", str(arguments.root), "--loop", f"{folder}/loop{turn}"],
            }
            for name, words in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    print(f"{'packing':<18}{'seconds':>9}{'images/s':>10}   {images:,} images, medians of {arguments.rounds}")
    for name, measured in seconds.items():
        median = statistics.median(measured)
        print(f"{name:<18}{median:>9.1f}{images / median:>10.0f}")


if __name__ == "__main__":
    main()
