"""Draw training images as the network gets them, before mixing: `python -m pipeline.preview +model=resnet`."""

from pathlib import Path

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

SUFFIXES = (".png", ".jpg", ".jpeg")


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for a file that is no picture."""
    if Path(str(config.out)).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"out={config.out} must end in one of {', '.join(SUFFIXES)}")


VERB = Verb(
    "preview",
    "Draw training images as the network gets them, before mixing, with their labels.",
    {
        "+model=resnet policy=trivial": "scikit-learn's digits",
        "+model=resnet data=shards data.root=PATH policy=randaugment erasing=pixel": "a data set of your own",
    },
    required_group="model",
    alternatives=("experiment",),
    implied={"data.root": (("data", "experiment"), "data=shards")},
    text_keys=("out", "data.root", "data.index", "data.cache"),
    out_is_folder=False,
    minimums={"count": 1, "epoch": 0, "data.image_size": 1},
    check_values=check_values,
)


def main(config: DictConfig) -> None:
    """Decode and augment the first images of an epoch, and write the picture."""
    with fast_imports():
        from rich.console import Console

        from pipeline.build.data import build_data
        from pipeline.cli.console import print_facts
        from pipeline.pages.image_grid import draw_grid

    data, out = build_data(config, accumulate=1), Path(str(config.out))
    images, labels = data.preview(config.count, epoch=config.epoch)
    names = [data.dataset.classes[label] for label in labels.tolist()]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images.numpy(), names).save(out)
    print_facts(Console(), {"images": f"{len(names)} of epoch {config.epoch}", "picture": str(out)})


if __name__ == "__main__":
    run_verb(VERB, main)
