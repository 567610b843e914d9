"""From a run's folder back to its network, recipe, data set and weights, for every verb that works on a run."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.weights.load import load_weights
from pipeline.build.recorded import RecordedConfig
from pipeline.runs.run import BEST, CHECKPOINTS, CONFIG, FINGERPRINT, LAST


@dataclass(frozen=True)
class RestoredRun:
    """A run as its folder records it; `precision` is the one that it resolved to, as Lightning names it."""

    folder: Path
    config: RecordedConfig
    precision: str

    @property
    def weights_file(self) -> Path:
        """The best checkpoint, or the last one. Raises: FileNotFoundError before the first."""
        written = [path for name in (BEST, LAST) if (path := self.folder / CHECKPOINTS / name).is_file()]
        if not written:
            raise FileNotFoundError(f"run={self.folder} has no checkpoint yet: weights=FILE uses other weights")
        return written[0]

    def load_network(self) -> nn.Module:
        """Build the network with the run's best weights. Raises: FileNotFoundError, ValueError."""
        net = self.config.build_network()
        load_weights(net, self.weights_file, norm_eps=self.config.norm_eps)
        return net


def restore_run(folder: Path, *, trust: bool = False) -> RestoredRun:
    """Read a run's folder; `trust` accepts any `_target_` in its config.

    Raises: FileNotFoundError for a folder that is not a run; ConfigError for an untrusted target.
    """
    for name in (CONFIG, FINGERPRINT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"run={folder} is not a run: it has no {name}")
    precision = json.loads((folder / FINGERPRINT).read_text())["precision"]
    return RestoredRun(folder, RecordedConfig(folder / CONFIG, trust=trust), precision)
