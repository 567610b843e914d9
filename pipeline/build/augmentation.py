"""From `conf/augment` to what happens to images before the network."""

from omegaconf import DictConfig

from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy
from data.augment.erasing import RandomErasing
from data.augment.policies import Policy
from pipeline.build.objects import build_object


def build_augmentation(config: DictConfig) -> Augmentation:
    """Build what training does to images. Raises: ValueError for impossible values."""
    crop = build_object(config, "augment.training", kind=CropPolicy)
    policy = build_object(config, "augment.policy", kind=Policy) if config.augment.get("policy") else None
    erasing = build_object(config, "augment.erasing", kind=RandomErasing) if config.augment.get("erasing") else None
    return Augmentation(crop, policy, erasing)


def build_evaluation_crop(config: DictConfig) -> CropPolicy:
    """Build the crop with which images are evaluated. Raises: ValueError for impossible values."""
    return build_object(config, "augment.evaluation", kind=CropPolicy)
