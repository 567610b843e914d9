"""From a run's folder back to its network, recipe, data set and weights, for every verb that works on a run."""

import json
from functools import cached_property
from pathlib import Path

from torch import nn

from data.shards.dataset import Dataset
from models.learning.recipe import Recipe
from models.weights.load import load_weights
from pipeline.build.network import build_network, build_recipe, network_name
from pipeline.build.objects import build_object, read_config
from pipeline.cli.check import check_targets
from pipeline.runs.run import BEST, CHECKPOINTS, CONFIG, FINGERPRINT, LAST

# A run's folder may come from someone else, so fewer targets are trusted than on the command line.
NETWORK_TARGETS = ("models.", "torch.nn.", "torch.optim.", "torchvision.models.")


class RestoredRun:
    """A run as its folder records it. Objects are built on demand.

    `trust` accepts any `_target_` in the recorded config.
    Raises: FileNotFoundError for a folder that is not a run; ConfigError for an untrusted target.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        for name in (CONFIG, FINGERPRINT):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"run={folder} is not a run: it has no {name}")
        self.folder = folder
        self._config = read_config(folder / CONFIG)
        self._network = read_config(folder / CONFIG, groups=("model", "recipe"))
        if not trust:
            check_targets(self._network, trusted=NETWORK_TARGETS)
        self.name = network_name(self._config)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the network was trained on."""
        return int(self._config.data.image_size)

    @property
    def batch_size(self) -> int:
        """Images per step and device."""
        return int(self._config.data.batch_size)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return int(self._config.model.get("in_channels", 3))

    @property
    def norm_eps(self) -> float | None:
        """The eps of the batch norms where the run set one."""
        eps: float | None = self._config.model.get("norm_eps")
        return eps

    @cached_property
    def precision(self) -> str:
        """The precision that the run resolved to, as Lightning names it."""
        return str(json.loads((self.folder / FINGERPRINT).read_text())["precision"])

    @property
    def weights_file(self) -> Path:
        """The best checkpoint, or the last one. Raises: FileNotFoundError before the first."""
        candidates = [self.folder / CHECKPOINTS / name for name in (BEST, LAST)]
        written = [path for path in candidates if path.is_file()]
        if not written:
            raise FileNotFoundError(f"run={self.folder} has no checkpoint yet: weights=FILE uses other weights")
        return written[0]

    def build_network(self) -> nn.Module:
        """Build the network without the run's weights."""
        return build_network(self._network)

    def load_network(self) -> nn.Module:
        """Build the network with the run's best weights. Raises: FileNotFoundError, ValueError."""
        net = self.build_network()
        load_weights(net, self.weights_file, norm_eps=self.norm_eps)
        return net

    def build_recipe(self) -> Recipe:
        """Build the recipe."""
        return build_recipe(self._network)

    def open_dataset(self) -> Dataset:
        """Open the data set at the path that the run recorded. Raises: FileNotFoundError, ValueError."""
        from pipeline.build.data import DataConfig  # with Lightning and DALI, which other uses of a run do not need

        return build_object(self._config, "data", kind=DataConfig).open_dataset()
