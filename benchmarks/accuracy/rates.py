"""Every architecture with the defaults of its config, and with other learning rates, on few photographs.

    python -m benchmarks.accuracy.rates --images FOLDER --out FOLDER

`--images` has CIFAR-10 as class folders in `train` and `test`; 200 and 100 images of airplane, automobile and bird are
used, for 10 epochs. Rates are a ninth of the default to nine times the default.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.accuracy.trials import Answer, Trial, convoy, option_parser, pack, run_trials
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose

NETWORKS = ("lenet", "alexnet", "vgg", "resnet", "resnext", "mobilenet", "efficientnet", "convnext", "coatnet")
CLASSES = ("airplane", "automobile", "bird")
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)


def make_trials(out: Path, networks: Iterable[str]) -> list[Trial]:
    """All trainings, the defaults first, which have no learning rate among their words."""
    return [
        convoy(f"{network}, {factor:.3g}", _words(network, factor, out=out), out=out / "runs")
        for factor in sorted(FACTORS, key=lambda factor: factor != 1)
        for network in networks
    ]


def _words(network: str, factor: float, *, out: Path) -> list[str]:
    words = [f"+model={network}", "data=shards", f"data.root={out / 'shards'}", "data.image_size=32", "augment=small"]
    words.append("recipe.epochs=10")
    if factor == 1:
        return words
    config = compose("train", words)
    rate = build_recipe(config).learning_rate(config.data.batch_size)
    assert rate is not None
    return [*words, f"recipe.optimizer.lr={rate.value * factor:.4g}"]


def _row(network: str, answers: Mapping[str, Answer]) -> str:
    found = {factor: answers.get(f"{network}, {factor:.3g}") for factor in FACTORS}
    top1 = [f"{answer.top1[-1]:.3f}" if answer else "" for answer in found.values()]
    default = found[1.0]
    losses = f"{default.loss[0]:.2f} | {default.loss[-1]:.2f}" if default else " | "
    return f"| {network} | {' | '.join(top1)} | {losses} |"


def main() -> None:
    """Print a table of the last epoch's top-1, and the first and the last loss with the default rate."""
    parser = option_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    pack(options.images, options.out, classes=CLASSES, train=200, val=100)
    answers = run_trials(make_trials(options.out, options.networks), answers=options.out / "answers.jsonl")
    print("| network | a ninth | a third | default | 3 times | 9 times | first loss | last loss |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for network in options.networks:
        print(_row(network, answers))


if __name__ == "__main__":
    main()
