"""Train a network on a data set: `python -m pipeline.train +model=resnet`."""

from __future__ import annotations

from omegaconf import DictConfig

from pipeline.config import run_verb


def main(config: DictConfig) -> None:
    """Assemble what the config names, train it and say how it went."""
    # Only now, so that --help and a wrong key are answered before torch and Lightning have loaded.
    from pipeline.training import train

    train(config)


if __name__ == "__main__":
    run_verb("train", main)
