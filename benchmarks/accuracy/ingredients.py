"""Parts of a recipe, one at a time and all together, beside the same recipe in timm's `train.py`.

    python -m benchmarks.accuracy.ingredients --images FOLDER --out FOLDER --timm CLONE

`--images` has CIFAR-10 as class folders in `train` and `test`; 1,000 and 300 images of each class are used. The network
is MobileNetV3-Small as for 224 pixels, which timm has too, with images of 32. The base has no crops: entire images,
half of them mirrored. Top-1 is that of the last epoch. Averaging changes nothing else, so one training answers for the
weights and for their average.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.accuracy.trials import Answer, Trial, convoy, describe_top1, option_parser, pack, run_trials, timm

EPOCHS, SEEDS = 30, (0, 1, 2)
CONVOY = (
    *("+model=mobilenet", "model.variant=mobilenet_v3_small", "model.image_size=224", "data=shards"),
    *("data.image_size=32", "recipe=adamw", f"recipe.epochs={EPOCHS}", "recipe.warmup_epochs=2", "averaging=ema"),
    *("trainer.precision=32-true", f"+trainer.check_val_every_n_epoch={EPOCHS}"),
)
TIMM = (
    *("--train-split", "train", "--val-split", "val", "--model", "mobilenetv3_small_100", "--num-classes", "10"),
    *("--bn-eps", "0.001", "--bn-momentum", "0.01", "--drop", "0.2", "--img-size", "32", "--batch-size", "64"),
    *("--opt", "adamw", "--weight-decay", "0.05", "--lr", "5e-4", "--epochs", str(EPOCHS), "--sched", "cosine"),
    *("--sched-on-updates", "--warmup-epochs", "2", "--warmup-lr", "0", "--min-lr", "0", "--checkpoint-hist", "1"),
    *("--scale", "1", "1", "--ratio", "1", "1", "--crop-pct", "1", "--val-interval", str(EPOCHS), "--workers", "1"),
    *("--train-interpolation", "bilinear", "--interpolation", "bilinear"),
    *("--color-jitter", "0", "--smoothing", "0.1"),
    *("--model-ema", "--model-ema-decay", "0.9998", "--model-ema-warmup"),
)
CROPS, ENTIRE = ("augment=small",), ("augment=small", "augment.training.scale=[1,1]", "augment.training.ratio=[1,1]")
TRIVIAL, MIX = ("policy=trivial",), ("mix=mixup_cutmix", "recipe.mix.probability=0.5")
RANDAUGMENT = ("policy=randaugment_timm", "augment.policy.magnitude_std=0", "augment.policy.fill=[124,116,104]")
TIMM_START = ("classifier._target_=benchmarks.accuracy.initial.TimmsInitialWeights", "trust=true")
TIMM_MIX = ("--mixup", "0.2", "--cutmix", "1", "--mixup-prob", "0.5", "--mixup-switch-prob", "0.5")
TIMM_RANDAUGMENT = ("--aa", "rand-m9-mstd0-inc1")  # with a deviation Pillow refuses some posterisations
RECIPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {  # words of Convoy, and of timm's train.py
    "base": (ENTIRE, ()),
    "TrivialAugment": ((*ENTIRE, *TRIVIAL), None),  # timm has none
    "mixup and CutMix": ((*ENTIRE, *MIX), None),
    "TrivialAugment, mixup and CutMix": ((*ENTIRE, *TRIVIAL, *MIX), None),
    "RandAugment, mixup and CutMix": ((*ENTIRE, *RANDAUGMENT, *MIX), (*TIMM_RANDAUGMENT, *TIMM_MIX)),
    "crops": (CROPS, None),
    "base with timm's initial weights": ((*ENTIRE, *TIMM_START), None),
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


def _describe(answers: Mapping[str, Answer], name: str, *, weights: str) -> str:
    names = [f"{name}, seed {seed}" for seed in SEEDS]
    return describe_top1(getattr(answers[one], weights)[-1] for one in names if one in answers)


def main() -> None:
    """Print a table of mean and standard deviation."""
    parser = option_parser(__doc__)
    parser.add_argument("--timm", type=Path, help="a clone of timm's repository")
    options = parser.parse_args()
    images = pack(options.images, options.out, train=1000, val=300)
    answers = run_trials(
        make_trials(images, out=options.out, clone=options.timm), answers=options.out / "answers.jsonl"
    )
    print("| recipe | weights | averaged weights | averaged weights by timm |\n|---|--:|--:|--:|")
    for name in RECIPES:
        ours = [_describe(answers, f"convoy, {name}", weights=weights) for weights in ("top1", "averaged")]
        print(f"| {name} | {' | '.join(ours)} | {_describe(answers, f'timm, {name}', weights='top1')} |")


if __name__ == "__main__":
    main()
