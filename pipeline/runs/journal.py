"""`metrics.jsonl`: a line of JSON per logged step. It is the truth; the dashboard mirrors it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.shards.dataset import write_atomically


@dataclass(frozen=True)
class Journal:
    """The metrics of a run; steps count optimizer steps."""

    path: Path

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Append a line."""
        with self.path.open("a") as journal:
            journal.write(json.dumps({"step": step, **values}) + "\n")

    def values_at(self, step: int) -> dict[str, float]:
        """Return all values of a step by curve, none where it was not recorded."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        points = [point for point in map(json.loads, lines) if point["step"] == step]
        return {key: value for point in points for key, value in point.items() if key != "step"}

    def truncate_after(self, step: int) -> dict[str, int]:
        """Drop the lines after `step`, which a resumed run computes again.

        Returns the last recorded step of each curve before truncation; nothing for a negative step (a new start).
        """
        if not self.path.is_file():
            return {}
        # An unterminated line was cut off when the process was killed.
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        points = [json.loads(line) for line in lines]
        kept = (line for line, point in zip(lines, points, strict=True) if point["step"] <= step)
        write_atomically(self.path, "".join(kept).encode())
        return {} if step < 0 else {key: point["step"] for point in points for key in point}

    def digest(self) -> tuple[int, str]:
        """Return length and SHA-256."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return len(content), hashlib.sha256(content).hexdigest()
