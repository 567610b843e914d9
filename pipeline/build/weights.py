"""The file of weights with which a network starts: its digest, its options, and loading it."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import nn

from models.arguments import require
from models.weights.head import ClassNames
from models.weights.load import LoadedWeights, load_weights
from pipeline.build.parameters import recorded_classes
from pipeline.cli.errors import config_keys_in_errors

# Parameters in errors, and the config keys that set them.
KEYS = {name: f"weights.{name}" for name in ("head", "stem", "skip")}
KEYS |= {name: f"model.{name}" for name in ("image_size", "variant")}
HEADS = ("keep", "replace", "auto")
DIGEST_LENGTH = 2 * hashlib.sha256().digest_size  # hexadecimal digits


class WeightsFile:
    """The values of a config's `weights`. Without a `file` there is nothing to load.

    Raises: ValueError for an option that needs a file.
    """

    def __init__(
        self,
        file: str | None,
        *,
        head: str = "keep",
        stem: str = "keep",
        skip: Sequence[str] = (),
        sha256: str | None = None,
    ) -> None:
        require(head in HEADS, f"is not one of {', '.join(HEADS)}", head=head)
        options = {"head": head, "stem": stem, "skip": list(skip), "sha256": sha256}
        for name, value in options.items():
            is_allowed = file is not None or value in (None, "keep", "auto", [])
            require(is_allowed, "needs a file: add weights=FILE", **{name: value})
        self.file = None if file is None else Path(str(file))
        self.head, self.stem, self.skip = head, stem, list(skip)
        self.expected_sha256 = None if sha256 is None else str(sha256).lower()

    @property
    def description(self) -> str | None:
        """The origin of the weights, for reports; None without a file."""
        return None if self.file is None else f"weights of {self.file}"

    @cached_property
    def sha256(self) -> str | None:
        """The digest, which stands for the file in a run's name and fingerprint; None without a file.

        A complete expected digest replaces a file that is gone, so that a run can still resume with its own weights.
        Raises: FileNotFoundError; ValueError when the digest is not the expected one.
        """
        if self.file is None:
            return None
        expected = self.expected_sha256
        if not self.file.is_file():
            if expected is not None and len(expected) == DIGEST_LENGTH:
                return expected
            raise FileNotFoundError(f"weights={self.file}: there is no such file")
        with self.file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if expected is not None and not digest.startswith(expected):
            raise ValueError(f"weights={self.file} has the SHA-256 {digest}, not weights.sha256={expected}")
        return digest

    def load_into(
        self, net: nn.Module, *, norm_eps: float | None = None, classes: Sequence[str] | None = None
    ) -> LoadedWeights:
        """Give a network the weights; `classes` are its own, None if it has no data set.

        Raises: FileNotFoundError; ValueError when they do not fit.
        """
        assert self.file is not None
        if not self.file.is_file():
            raise FileNotFoundError(f"weights={self.file}: there is no such file")
        head = ClassNames(recorded_classes(self.file), classes) if self.head == "auto" else self.head
        with config_keys_in_errors(KEYS):
            return load_weights(net, self.file, head=head, stem=self.stem, skip=self.skip, norm_eps=norm_eps)
