"""Train a network on a data set: `python -m pipeline.train +model=resnet`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict

from pipeline.cli.config import flatten, run_verb


def main(config: DictConfig) -> None:
    """Build what the config names and train it; an unfinished run of the same name goes on where it stopped."""
    # Only now, so that --help and a wrong key are answered before torch and Lightning have loaded.
    from hydra.utils import instantiate

    from data.loading.datamodule import Feeding, ShardData
    from pipeline.build.dataset import open_or_pack
    from pipeline.runs.run import open_run
    from pipeline.train import fit as training
    from pipeline.train.summary import Job

    training.begin(config.seed)
    told = dict(config.data)
    where = {name: told[name] for name in ("index", "label_field", "source")}
    dataset = open_or_pack(str(told["root"]), **where)
    recipe = instantiate(config.recipe)
    views = instantiate(config.augment, _convert_="all")
    numbers = {name: told[name] for name in ("window", "readahead", "threads")}
    feeding = Feeding(told["batch_size"], accumulate=recipe.accumulate, seed=config.seed, **numbers)
    data = ShardData(dataset, training_view=views["training"], evaluation_view=views["evaluation"], feeding=feeding)
    num_classes = training.num_outputs(dataset, config.model)
    net = instantiate(config.model, num_classes=num_classes)
    module = instantiate(config.classifier, net=net, num_classes=num_classes, recipe=recipe)
    config.weights.sha256 = training.digest_of_weights(config.weights.file, config.weights.sha256)
    values = flatten(config)
    job = Job(module, data, open_run(values, dataset), instantiate(config.tracking), values)
    training.check_image_size(job)
    training.take_weights(job, dict(config.weights))
    with open_dict(config):
        config.model.num_classes = num_classes  # for those who build it again without the data set
    text = OmegaConf.to_yaml(config, resolve=True)
    training.train(job, instantiate(config.trainer, _partial_=True), config=text)


if __name__ == "__main__":
    run_verb("train", main)
