"""The calibration of a run: a temperature and a threshold, fitted by `evaluate`."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from data.shards.dataset import write_atomically


@dataclass(frozen=True)
class Calibration:
    """A temperature that divides the logits, and a probability below which an answer is "unsure", None without one.

    `precision` is the share of right answers that the threshold was fitted for.
    """

    temperature: float = 1.0
    threshold: float | None = None
    precision: float | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether an evaluation has fitted it."""
        return self != Calibration()

    def is_unsure(self, probability: float) -> bool:
        """Whether an answer of this probability is "unsure"."""
        return self.threshold is not None and probability < self.threshold

    def save(self, file: Path, *, weights_sha256: str) -> None:
        """Write it beside the digest of the weights for which it was fitted."""
        values = {**asdict(self), "weights_sha256": weights_sha256}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(values, indent=1).encode() + b"\n")


def read_calibration(file: Path, *, weights_sha256: str) -> Calibration:
    """Read the calibration of these weights; the default without a file or with one for other weights.

    Raises: ValueError for a damaged file.
    """
    if not file.is_file():
        return Calibration()
    try:
        values = json.loads(file.read_text())
        of_weights = values.pop("weights_sha256")
        calibration = Calibration(**values)
        valid = 0 < calibration.temperature < math.inf and all(
            one is None or 0 <= one <= 1 for one in (calibration.threshold, calibration.precision)
        )
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and evaluate the run again") from error
    if not valid:
        raise ValueError(f"{file} has impossible values: remove it, and evaluate the run again")
    return calibration if of_weights == weights_sha256 else Calibration()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
