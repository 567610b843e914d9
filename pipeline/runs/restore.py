"""From a run's folder back to its network, recipe, data set and weights, for every verb that works on a run."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from data.shards.dataset import Dataset
from models.weights.load import load_weights
from pipeline.build.recorded import RecordedConfig
from pipeline.runs.calibration import digest
from pipeline.runs.checkpoints import check_listed
from pipeline.runs.fingerprint import DIGEST_OF, digests
from pipeline.runs.run import Run


class RestoredRun(RecordedConfig):
    """A run as its folder records it; `precision` is the one that it resolved to, as Lightning names it.

    `trust` accepts any `_target_` in its config; `checkpoint` is used instead of the best one.
    Raises: FileNotFoundError for a folder that is not a run; ConfigError for an untrusted target.
    """

    def __init__(self, folder: Path, *, trust: bool = False, checkpoint: Path | None = None) -> None:
        self.run, self._checkpoint = Run(folder), checkpoint
        for path in (self.run.config_file, self.run.fingerprint_file):
            if not path.is_file():
                raise FileNotFoundError(f"run={folder} is not a run: it has no {path.name}")
        super().__init__(self.run.config_file, trust=trust)
        self._fingerprint = self.run.fingerprint()
        self.precision = str(self._fingerprint.get("precision"))

    @cached_property  # a training may write its first best weights meanwhile
    def weights_file(self) -> Path:
        """The given checkpoint, the best one, or the last one. Raises: FileNotFoundError before the first."""
        path = self._checkpoint or self.run.best_checkpoint
        if path is None:
            if self.run.is_finished:
                problem = f"{self.run.folder} has finished, and its checkpoints are gone"
                raise FileNotFoundError(f"{problem}: remove {self.run.result_file} to train it again")
            raise FileNotFoundError(f"{self.run.folder} has no checkpoint yet: its first comes at the end of an epoch")
        return path

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of that file when it is first needed. Raises: FileNotFoundError."""
        return digest(self.weights_file)

    @property
    def is_best(self) -> bool:
        """Whether its weights are the best ones, for which an evaluation keeps temperature and threshold."""
        return self.weights_file == self.run.best_checkpoint

    @property
    def unfinished(self) -> str | None:
        """A sentence for a run that has not finished, of which the best weights so far are used."""
        if self.run.is_finished:
            return None
        state = "is still training" if self.run.is_locked else "has not finished"
        return f"{self.run.folder} {state}: {self.weights_file.name} is its best so far"

    def changed_splits(self, dataset: Dataset) -> list[str]:
        """Return the splits with which the run began that have other samples, or are missing."""
        recorded, current = self._fingerprint, digests(dataset)
        changed = [name for name in recorded if name.startswith(DIGEST_OF) and recorded[name] != current.get(name)]
        return [name.removeprefix(DIGEST_OF) for name in changed]

    def split_digest(self, split: str) -> str | None:
        """Return the digest of a split with which the run began, None where it began without."""
        recorded = self._fingerprint.get(f"{DIGEST_OF}{split}")
        return None if recorded is None else str(recorded)

    def load_network(self) -> tuple[nn.Module, str]:
        """Build the network with the run's weights, and return it with the SHA-256 of their file.

        Raises: FileNotFoundError, ValueError.
        """
        while True:
            sha256 = digest(self.weights_file)
            try:
                check_listed(self.weights_file, sha256)
                net = self.build_network()
                load_weights(net, self.weights_file, norm_eps=self.norm_eps)
            except ValueError:
                if digest(self.weights_file) == sha256:
                    raise
            else:
                if digest(self.weights_file) == sha256:  # else a training has replaced the file meanwhile
                    break
        for name, tensor in net.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.weights_file}: {name} has NaN or infinite values: its training has diverged")
        return net, sha256
