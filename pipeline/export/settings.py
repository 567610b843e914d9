"""The files of an export, from the values of the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from omegaconf import DictConfig, ListConfig

from pipeline.cli.errors import ConfigError, nearest

ONNX, PROGRAM, TENSORS = "onnx", "pt2", "safetensors"
FORMATS = (ONNX, PROGRAM, TENSORS)
PRECISIONS = ("float32", "float16", "bfloat16")
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
MIN_OPSET = 18  # the first that torch's exporter writes


@dataclass(frozen=True)
class Form:
    """One file to write: a format in a precision, for tensors under a publisher's names or None for our own."""

    format: str
    precision: str
    names: str | None = None

    @property
    def file_name(self) -> str:
        """`model.onnx`, `model.float16.onnx`, `model.timm.safetensors`."""
        parts = ["model", self.names, self.precision if self.precision != "float32" else None, self.format]
        return ".".join(part for part in parts if part)


def read_forms(config: DictConfig) -> list[Form]:
    """Return the files to write. Raises: ConfigError for values that cannot be."""
    chosen = _words(config.format)
    formats = _known("format", FORMATS if chosen == ["all"] else chosen, known=FORMATS, also=("all",))
    precisions = _known("precision", _words(config.precision), known=PRECISIONS)
    if config.names is not None and TENSORS not in formats:
        raise ConfigError(f"names={config.names} is for tensors: add format={TENSORS}")
    if config.register is not None and ONNX not in formats:
        raise ConfigError(f"register={config.register} needs the ONNX file: add format={ONNX}")
    if ONNX in formats:
        for library in LIBRARIES:
            if find_spec(library) is None:
                raise ConfigError(f"format={ONNX} needs the package {library}: pip install {library}")
    names = None if config.names is None else str(config.names)
    forms = [(one, precision, names if one == TENSORS else None) for one in formats for precision in precisions]
    return [Form(*form) for form in forms]


def _words(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple | ListConfig) else [str(value)]


def _known(key: str, words: Sequence[str], *, known: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """Return the words without repetitions. Raises: ConfigError for an unknown one, or none."""
    allowed = [*known, *also]
    for word in words:
        if word not in known:
            raise ConfigError(f"{key}={word} is not one of {', '.join(allowed)}{nearest(word, allowed)}")
    if not words:
        raise ConfigError(f"{key}=[] names nothing: give one of {', '.join(allowed)}")
    return list(dict.fromkeys(words))
