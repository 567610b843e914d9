"""`metrics.jsonl`: a line of JSON per logged step. It is the truth; MLflow mirrors it."""

import errno
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

CHECK = b', "crc": "'  # the last field of a line: the CRC-32 of the text before it
CHECK_LENGTH = len(CHECK) + 8 + len(b'"}\n')


class Point(NamedTuple):
    """A line: values by curve, NaN for null, at an optimizer step; `time` is in Unix seconds.

    `line` counts from 1 and ends at the byte `end` of the file.
    """

    step: int
    time: float
    values: Mapping[str, float]
    line: int
    end: int


class Journal:
    """The metrics of a run; steps count optimizer steps and never decrease.

    One thread writes; others may iterate over `points` meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget_digest()

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Append a line; NaN and infinity become null. Raises: OSError, after which the file is as before.

        The file is opened for each line, in 11 microseconds: nothing stays open, and closing it shows the line to
        other hosts of a network file system.
        """
        finite = {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        assert not finite.keys() & {"step", "time", "crc"}
        fields = {"step": step, "time": round(time.time(), 3), **finite}
        text = json.dumps(fields, allow_nan=False).encode()[:-1]  # without the brace, which follows the check value
        line = text + CHECK + b'%08x"}\n' % crc32(text)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def points(self, *, line: int = 0, end: int = 0) -> Iterator[Point]:
        """Yield the complete lines after a line that ends at the byte `end`.

        An unterminated last line is what a kill leaves, and is left out. Raises: ValueError at a damaged, repeated or
        misplaced line.
        """
        if not self.path.is_file():
            return
        last_step, last_steps = 0, dict[str, int]()
        with self.path.open("rb") as file:
            file.seek(end)
            for number, text in enumerate(file, start=line + 1):
                if not text.endswith(b"\n"):
                    return
                end += len(text)
                fields = self._parse(text, number)
                step, moment = int(fields.pop("step")), fields.pop("time")
                if step < last_step:
                    raise self._error(number, f"has step {step} after step {last_step}")
                if any(last_steps.get(key) == step for key in fields):
                    raise self._error(number, f"repeats values of step {step}")
                last_step = step
                last_steps |= dict.fromkeys(fields, step)
                yield Point(step, moment, fields, number, end)

    def values_at(self, step: int) -> dict[str, float]:
        """Return the finite values of a step by curve, none where it was not recorded. Raises: ValueError."""
        points = [point for point in self.points() if point.step == step]
        return {key: value for point in points for key, value in point.values.items() if math.isfinite(value)}

    def truncate_after(self, step: int, *, length: int | None = None) -> None:
        """Drop the lines after `step`, which a resumed run computes again; a negative step drops all.

        With a `length` in bytes, also drop the lines after that: an evaluation at this step that is repeated.

        Raises: ValueError at a damaged line among the kept ones.
        """
        self._forget_digest()
        end = 0
        for point in self.points() if step >= 0 else ():
            if point.step > step or (length is not None and point.end > length):
                break
            end = point.end
        if self.path.is_file():
            os.truncate(self.path, end)

    def digest(self) -> tuple[int, str]:
        """Return the length in bytes of the complete lines and their SHA-256, after flushing them to disk.

        Each call reads only what was added since the last one.
        """
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
                file.seek(self._digested)
                for text in file:
                    if text.endswith(b"\n"):
                        self._digest.update(text)
                        self._digested += len(text)
        return self._digested, self._digest.hexdigest()

    def _forget_digest(self) -> None:
        self._digested, self._digest = 0, hashlib.sha256()

    def _parse(self, text: bytes, number: int) -> dict[str, float]:
        """Return the fields of a line without its check value. Raises: ValueError."""
        head = text[:-CHECK_LENGTH]
        if text[-CHECK_LENGTH:] != CHECK + b'%08x"}\n' % crc32(head):
            raise self._error(number, "is damaged: its check value does not fit")
        fields: dict[str, float | None] = json.loads(head + b"}")
        return {key: math.nan if value is None else value for key, value in fields.items()}

    def _error(self, number: int, problem: str) -> ValueError:
        removal = f"sed -i '{number},$d' {shlex.quote(str(self.path))}"
        return ValueError(f"{self.path}, line {number} {problem}: {removal} removes it and all after it")
