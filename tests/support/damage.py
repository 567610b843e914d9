"""Damage to files, as bad memory, disks and copies do it."""

from __future__ import annotations

import random
from pathlib import Path


def flip_bit(file: Path, place: float, bit: int = 0) -> None:
    """Flip a bit of the byte at a place from 0 to 1 of a file."""
    content = bytearray(file.read_bytes())
    content[min(len(content) - 1, int(place * len(content)))] ^= 1 << bit
    file.write_bytes(content)


def damage(file: Path, number: int) -> str:
    """Damage a file in a way that depends on the number alone; return what was done."""
    draw = random.Random(number)
    content = file.read_bytes()
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    match number % 5:
        case 0:
            file.write_bytes(content[:place])
            return f"cut at {place}"
        case 1:
            file.write_bytes(content[:place] + bytes(len(content) - place))
            return f"zeros from {place}" if any(content[place:]) else damage(file, number + 1)
        case _:
            flip_bit(file, place / len(content), bit)
            return f"bit {bit} of byte {place}"
