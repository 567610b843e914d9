"""Train a network on a data set: `python -m pipeline.train +model=resnet`."""

from omegaconf import DictConfig

from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb


def check_objects(config: DictConfig) -> None:
    """Raise ValueError for a network, recipe, crop or option of the Trainer that cannot be built."""
    from pipeline.train.check import check_training

    check_training(config)


COUNTS = (
    *("recipe.epochs", "recipe.accumulate", "log_every", "data.batch_size", "data.image_size", "data.shuffle_window"),
    *("data.threads", "data.io_threads", "data.prefetch", "data.readahead", "data.inflight"),
)

VERB = Verb(
    "train",
    "Train a convolutional network on JPEGs in tar shards.",
    {
        "+model=resnet": "scikit-learn's digits, on all devices of this machine",
        "+model=resnet data=shards data.root=PATH": "a packed data set, or any WebDataset tars",
        "+model=resnet model.variant=resnet50 recipe.epochs=30 data.batch_size=64": "",
        "+model=resnet data.root=PATH recipe=finetune weights=FILE": "start from trained weights",
        "+experiment=timm_a2 data.root=PATH": "a published recipe",
    },
    required_group="model",
    alternatives=("experiment",),
    implied={"data.root": (("data", "experiment"), "data=shards")},
    aliases={"weights": "weights.file"},
    text_keys=("weights.file", "weights.sha256", "name", "runs", "out", "data.root", "data.index", "data.cache"),
    minimums={**dict.fromkeys(COUNTS, 1), "checkpoint.keep": 2},
    check_objects=check_objects,
)


def main(config: DictConfig) -> None:
    """Build what the config names and train it; an unfinished run of the same settings continues.

    Imports wait until here, so that --help and a wrong key are answered before torch and Lightning have loaded.
    """
    with fast_imports():
        from pipeline.build import data, network, trainer
        from pipeline.train import fit
        from pipeline.train.budget import settle_epochs
        from pipeline.train.job import build_job

    fit.prepare_process(config.seed)
    recipe = network.build_recipe(config)
    loaders = data.build_data(config, accumulate=recipe.accumulate)
    num_classes = network.count_classes(config, loaders.dataset)
    net = network.build_network(config, num_classes=num_classes)
    module = network.build_module(config, net, num_classes=num_classes, recipe=recipe)
    job = build_job(config, module, data=loaders, num_classes=num_classes)
    sizes = (loaders.training_augment.crop.image_size, loaders.evaluation_crop.image_size)
    network.check_image_sizes(config, net, sizes=sizes)
    job = settle_epochs(config, job, num_classes=num_classes)
    callbacks, plugins = [*fit.own_callbacks(job), *trainer.build_callbacks(config)], fit.own_plugins(job)
    lightning = trainer.build_trainer(config, job.module, callbacks=callbacks, plugins=plugins, folder=job.run.folder)
    fit.train(job, lightning, norm_eps=config.model.get("norm_eps"))


if __name__ == "__main__":
    run_verb(VERB, main)
