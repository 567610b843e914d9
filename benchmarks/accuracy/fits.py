"""What `fit=` does to objects that are not in the centre: digits anywhere in images three times as wide as high.

    python -m benchmarks.accuracy.fits --out FOLDER

Each of scikit-learn's digits is enlarged to 32 pixels and put somewhere into a black image of 96 x 32; a fifth is
validated. LeNet-5 gets squares of 32 pixels. Top-1 is that of the last epoch.
"""

import argparse
from pathlib import Path

from benchmarks.accuracy.trials import convoy, describe_top1, pack_folders, run_trials
from pipeline.cli.compose import choices

SEEDS = (0, 1, 2)
SIDE, WIDTH = 32, 96
WORDS = ("+model=lenet", "data=shards", f"data.image_size={SIDE}", "augment=gentle", "augment.fill=[0,0,0]")


def make_images(folder: Path) -> None:
    """Write class folders in `train` and `val`."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    places = np.random.default_rng(0).integers(0, WIDTH - SIDE + 1, size=len(digits.images))
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        digit = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image = Image.new("L", (WIDTH, SIDE))
        image.paste(digit, (int(places[number]), 0))
        path = folder / ("train" if number % 5 else "val") / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def main() -> None:
    """Print a table of mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not (out / "images").exists():
        make_images(out / "images")
    shards, fits = pack_folders(out / "images", out / "shards"), choices("fit")
    trials = {
        (fit, seed): convoy(
            f"{fit}, seed {seed}", [*WORDS, f"data.root={shards}", f"fit={fit}", f"seed={seed}"], out=out / "runs"
        )
        for fit in fits
        for seed in SEEDS
    }
    answers = run_trials(trials.values(), answers=out / "answers.jsonl")
    print("| fit | top-1 |\n|---|--:|")
    for fit in fits:
        print(f"| {fit} | {describe_top1(answers[trials[fit, seed].name].top1[-1] for seed in SEEDS)} |")


if __name__ == "__main__":
    main()
