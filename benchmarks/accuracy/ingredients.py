"""Parts of a recipe, one at a time and all together, beside the same recipe in timm's `train.py`.

    python -m benchmarks.accuracy.ingredients --images FOLDER --out FOLDER --timm CLONE

`--images` has CIFAR-10 as class folders in `train` and `test`; 300 and 200 images of each class are used. The network
is ResNet-18 with the stem for 224 pixels, which is timm's. Top-1 is that of the last epoch, with averaged weights
theirs.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.accuracy.trials import Answer, Trial, convoy, describe_top1, option_parser, pack, run_trials, timm

EPOCHS, SEEDS = 30, (0, 1, 2)
CONVOY = (
    *("+model=resnet", "model.image_size=224", "data=shards", "data.image_size=64", "augment=small"),
    *(f"recipe.epochs={EPOCHS}", "recipe.warmup_epochs=2"),
)
TIMM = (
    *("--train-split", "train", "--val-split", "val", "--model", "resnet18", "--num-classes", "10", "--img-size", "64"),
    *("--amp", "--amp-dtype", "bfloat16", "--channels-last", "--workers", "1", "--batch-size", "64"),
    *("--opt", "sgd", "--momentum", "0.9", "--weight-decay", "1e-4", "--lr", "0.064", "--epochs", str(EPOCHS)),
    *("--sched", "cosine", "--sched-on-updates", "--warmup-epochs", "2", "--warmup-lr", "0", "--checkpoint-hist", "1"),
    *("--scale", "0.5", "1", "--crop-pct", "1", "--train-interpolation", "bilinear", "--interpolation", "bilinear"),
    *("--color-jitter", "0", "--smoothing", "0.1"),
)
MIX, EMA = ("mix=mixup_cutmix",), ("averaging=ema",)
RANDAUGMENT = ("policy=randaugment_timm", "augment.policy.magnitude_std=0")
TIMM_MIX = ("--mixup", "0.2", "--cutmix", "1", "--mixup-switch-prob", "0.5")
TIMM_EMA = ("--model-ema", "--model-ema-decay", "0.9998", "--model-ema-warmup")
TIMM_RANDAUGMENT = ("--aa", "rand-m9-mstd0-inc1")  # with a deviation Pillow refuses some posterisations
RECIPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {  # words of Convoy, and of timm's train.py
    "base": ((), ()),
    "TrivialAugment": (("policy=trivial",), None),  # timm has none
    "mixup and CutMix": (MIX, TIMM_MIX),
    "averaged weights": (EMA, TIMM_EMA),
    "all three": (("policy=trivial", *MIX, *EMA), None),
    "the same with RandAugment": ((*RANDAUGMENT, *MIX, *EMA), (*TIMM_RANDAUGMENT, *TIMM_MIX, *TIMM_EMA)),
}


def make_trials(images: Path, *, out: Path, clone: Path | None) -> list[Trial]:
    """All trainings, seed by seed."""
    trials = []
    for seed in SEEDS:
        for name, (ours, theirs) in RECIPES.items():
            words = [*CONVOY, f"data.root={out / 'shards'}", f"seed={seed}", *ours]
            trials.append(convoy(f"convoy, {name}, seed {seed}", words, out=out / "runs"))
            if clone is not None and theirs is not None:
                words = ["--data-dir", str(images), *TIMM, "--seed", str(seed), *theirs]
                trials.append(timm(f"timm, {name}, seed {seed}", words, out=out / "timm", clone=clone))
    return trials


def _describe(answers: Mapping[str, Answer], *, who: str, name: str) -> str:
    names = [f"{who}, {name}, seed {seed}" for seed in SEEDS]
    return describe_top1([answers[one] for one in names if one in answers])


def main() -> None:
    """Print a table of mean and standard deviation."""
    parser = option_parser(__doc__)
    parser.add_argument("--timm", type=Path, help="a clone of timm's repository")
    options = parser.parse_args()
    images = pack(options.images, options.out, train=300, val=200)
    answers = run_trials(
        make_trials(images, out=options.out, clone=options.timm), answers=options.out / "answers.jsonl"
    )
    print("| recipe | Convoy | timm |\n|---|--:|--:|")
    for name in RECIPES:
        ours, theirs = (_describe(answers, who=who, name=name) for who in ("convoy", "timm"))
        print(f"| {name} | {ours} | {theirs} |")


if __name__ == "__main__":
    main()
