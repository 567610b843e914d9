"""Which mistakes of a training are found without its data: in recipe, crops, network, weights and Trainer."""

import json
from functools import lru_cache

from omegaconf import DictConfig, OmegaConf

from data.augment.crops import describe_size
from models.parts import frozen_parts
from pipeline.build.augmentation import build_augmentation, build_evaluation_crop
from pipeline.build.choice import build_choice
from pipeline.build.network import (
    build_averaging,
    build_network,
    build_recipe,
    build_without_values,
    check_image_sizes,
)
from pipeline.build.objects import build_object
from pipeline.build.settings import parse_budget
from pipeline.build.weights import WeightsFile
from pipeline.cli.compose import CONF
from pipeline.cli.errors import config_keys_in_errors

CLASSES = 10  # of a network whose data set has not been read

_accepted: set[str] = set()  # networks with their image sizes; trainings of a study often share one


def check_training(config: DictConfig) -> None:
    """Build what needs no data, and run the network on the shapes of its crops.

    Raises: ValueError, as the training would.
    """
    recipe = build_recipe(config)
    build_choice(config)
    build_averaging(config)
    if config.budget is not None:
        parse_budget(config.budget)
    build_object(config, "weights", kind=WeightsFile)
    sizes = [build_augmentation(config).crop.image_size, build_evaluation_crop(config).image_size]
    shapes = [describe_size(size) for size in sizes]
    network = json.dumps([OmegaConf.to_container(config.model, resolve=True), shapes, recipe.freeze])
    if network not in _accepted:
        num_classes = config.model.get("num_classes") or CLASSES
        net = build_without_values(lambda: build_network(config, num_classes=num_classes))
        check_image_sizes(config, net, sizes=sizes)
        with config_keys_in_errors({"freeze": "recipe.freeze"}):
            frozen_parts(net, recipe.freeze or ())
        _accepted.add(network)
    if not _own_options().issuperset(config.trainer):
        from pipeline.build.trainer import check_options  # Lightning takes seconds

        check_options(config.trainer)


@lru_cache
def _own_options() -> frozenset[str]:
    return frozenset({*map(str, OmegaConf.load(CONF / "trainer" / "auto.yaml")), "num_nodes"})
