"""The nvJPEG that decodes: of several in a process, nvImageCodec takes the first that was loaded.

torchvision brings an nvJPEG 13.0 with the same soname, and Lightning imports torchvision. That one cannot interpolate
chroma in regions: nvImageCodec then decodes on the CPU without a word.
"""

import ctypes
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

SONAME = "libnvjpeg.so.13"
MAPS = Path("/proc/self/maps")
CHOSEN = "CONVOY_NVJPEG"  # environment variable: the library that a process hands to those that it starts


def load_first() -> None:
    """Load the nvJPEG of `CHOSEN`, or of the package `nvidia-nvjpeg`; call it before torchvision is imported."""
    with suppress(ValueError, OSError):  # `loaded_nvjpeg` says which one there is instead
        spec = find_spec("nvidia")
        folders = (spec.submodule_search_locations if spec is not None else None) or ()
        packaged = [str(Path(folder) / "cu13" / "lib" / SONAME) for folder in folders]
        found = [path for path in (os.environ.get(CHOSEN, ""), *packaged) if Path(path).is_file()]
        if found:
            ctypes.CDLL(found[0])


def loaded_nvjpeg() -> tuple[tuple[int, ...], str] | None:
    """Return the version and the path of the library that nvImageCodec gets in this process, None without one."""
    try:
        library = ctypes.CDLL(SONAME)
    except OSError:
        return None
    number = ctypes.c_int()
    version = []
    for part in range(3):
        library.nvjpegGetProperty(part, ctypes.byref(number))
        version.append(number.value)
    address = ctypes.cast(library.nvjpegGetProperty, ctypes.c_void_p).value or 0
    return tuple(version), _path_at(address)


def _path_at(address: int) -> str:
    try:
        lines = os.fsdecode(MAPS.read_bytes()).splitlines()
    except OSError:
        return ""
    for line in lines:
        start, end = (int(one, 16) for one in line.split()[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[-1]
    return ""
