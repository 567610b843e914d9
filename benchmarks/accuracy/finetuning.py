"""Fine-tuning on 900 photographs, beside timm's `train.py` with its defaults and with those of Ultralytics.

    python -m benchmarks.accuracy.finetuning --images FOLDER --out FOLDER --timm CLONE
    python -m benchmarks.accuracy.finetuning --images FOLDER --out FOLDER --network resnet18

`--images` has CIFAR-10 as class folders in `train` and `test`. MobileNetV3-Small is trained on 1,000 images of each of
seven classes, then fine-tuned on 300 of each of the other three, all enlarged to 96 pixels; 500 of each are validated.
ResNet-18 gets 64 pixels, and only AdamW and SGD, with three learning rates, are compared. Top-1 is that of the last
epoch, with averaged weights theirs.
"""

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy.trials import ROOT, Trial, convoy, describe_top1, option_parser, pack, run_trials, timm

CLASSES = ("airplane", "automobile", "bird")
OTHERS = ("cat", "deer", "dog", "frog", "horse", "ship", "truck")
SEEDS = (0, 1, 2)
NETWORKS = {
    "mobilenet_v3_small": ("+model=mobilenet", "model.variant=mobilenet_v3_small", "data=shards", "data.image_size=96"),
    "resnet18": ("+model=resnet", "data=shards", "data.image_size=64", "model.image_size=224"),
}
DEFAULT, SGD = "`recipe=finetune weights=FILE`", "the same with `optimizer=sgd`"
RESIDUAL: Mapping[str, Sequence[str]] = {
    DEFAULT: (),
    SGD: ("optimizer=sgd",),
    f"{SGD} and a rate of 0.02": ("optimizer=sgd", "recipe.optimizer.lr=0.02"),
    f"{SGD} and a rate of 0.006": ("optimizer=sgd", "recipe.optimizer.lr=0.006"),
}
CONVOY: Mapping[str, Sequence[str]] = {
    DEFAULT: (),
    SGD: ("optimizer=sgd",),
    "the same without decay by stage": ("recipe.layer_decay=null",),
    "the same without a warm-up of the head": ("recipe.head_warmup=null",),
    "the same with stem and stages 1 to 3 frozen": ("recipe.freeze=[stem,stage1,stage2,stage3]",),
}
TIMM_NETWORK = (
    *("--train-split", "train", "--val-split", "val", "--model", "mobilenetv3_small_100", "--img-size", "96"),
    *("--num-classes", "3", "--bn-eps", "0.001", "--workers", "1", "--checkpoint-hist", "1"),
)
ULTRALYTICS = (
    *("--opt", "adamw", "--lr", "0.001429", "--weight-decay", "5e-4", "--batch-size", "16", "--grad-accum-steps", "4"),
    *("--epochs", "100", "--sched", "poly", "--decay-rate", "1", "--min-lr", "1.4e-5", "--warmup-epochs", "3"),
    *("--scale", "0.5", "1", "--color-jitter", "0", "--aa", "rand-m9-mstd0-inc1", "--reprob", "0.4"),
    *("--smoothing", "0", "--crop-pct", "1", "--model-ema", "--model-ema-decay", "0.9999", "--model-ema-warmup"),
)
LONGEST = "timm's defaults, 300 epochs"
TIMM: Mapping[str, Sequence[str]] = {
    "timm's defaults, 20 epochs": ("--epochs", "20"),
    "timm with Ultralytics' defaults, 100 epochs": ULTRALYTICS,
    LONGEST: (),
}


def pretrain(images: Path, out: Path, *, network: str) -> Path:
    """Train on the seven classes, once; return the weights, with timm's names."""
    run, weights = out / "pretrained", out / "weights"
    if not weights.exists():
        pack(images, out / "others", classes=OTHERS, train=1000, val=100)
        root = out / "others" / "shards"
        words = [*NETWORKS[network], f"data.root={root}", "augment=small", "recipe=adamw", "recipe.epochs=20"]
        own = [f"out={run}", "tracking=none", "trainer=cpu"]
        subprocess.run([sys.executable, "-m", "pipeline.train", *words, *own], cwd=ROOT, check=True)
        words = [f"run={run}", "format=safetensors", "names=timm", f"out={weights}", "tracking=none"]
        subprocess.run([sys.executable, "-m", "pipeline.export", *words], cwd=ROOT, check=True)
    return next(weights.glob("*.safetensors"))


def make_trials(weights: Path, images: Path, *, out: Path, clone: Path | None, network: str) -> list[Trial]:
    """All trainings, seed by seed; the longest one comes last, with one seed."""
    recipes = (CONVOY if network == "mobilenet_v3_small" else RESIDUAL).items()
    trials, longest = list[Trial](), list[Trial]()
    for seed in SEEDS:
        ours = [*NETWORKS[network], "recipe=finetune", f"weights={weights}", f"data.root={out / 'shards'}"]
        ours.append(f"seed={seed}")
        trials += [convoy(f"{name}, seed {seed}", [*ours, *words], out=out / "runs") for name, words in recipes]
        theirs = ("--data-dir", str(images), "--pretrained", "--pretrained-path", str(weights), "--seed", str(seed))
        if clone is None:
            continue
        for name, words in TIMM.items():
            trial = timm(f"{name}, seed {seed}", [*TIMM_NETWORK, *theirs, *words], out=out / "timm", clone=clone)
            (longest if name == LONGEST else trials).append(trial)
    return [*trials, *longest[:1]]


def main() -> None:
    """Print a table of mean and standard deviation."""
    parser = option_parser(__doc__)
    parser.add_argument("--timm", type=Path, help="a clone of timm's repository")
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v3_small")
    options = parser.parse_args()
    images = pack(options.images, options.out, classes=CLASSES, train=300, val=500)
    weights = pretrain(options.images, options.out, network=options.network)
    trials = make_trials(weights, images, out=options.out, clone=options.timm, network=options.network)
    answers = run_trials(trials, answers=options.out / "answers.jsonl")
    print("| training | top-1 | seconds |\n|---|--:|--:|")
    for name in dict.fromkeys((*RESIDUAL, *CONVOY, *TIMM)):
        found = [answers[key] for seed in SEEDS if (key := f"{name}, seed {seed}") in answers]
        if found:
            seconds = statistics.median(answer.seconds for answer in found)
            print(f"| {name} | {describe_top1((one.averaged or one.top1)[-1] for one in found)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
