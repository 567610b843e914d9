"""The watch over the ranks names how each of them has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.train.callbacks import ranks
from pipeline.train.callbacks.ranks import RankWatch


class EndsAfterPoll(subprocess.Popen[bytes]):
    """A rank that ends just after it was found running."""

    def poll(self) -> int | None:
        status = super().poll()
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its status is still to be read
        return status


def test_a_rank_that_ends_during_a_look_is_named_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "SECONDS_BETWEEN_LOOKS", 0.01)
    watch = RankWatch(tmp_path, dict, rank=0, hang_seconds=60, close=lambda cause, code: None)
    causes: list[str] = []
    monkeypatch.setattr(watch, "_end", lambda cause, code: causes.append(cause))
    child = EndsAfterPoll([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    space = ranks._process_space()
    monkeypatch.setattr(watch, "_places", [(space, os.getpid()), (space, child.pid)])
    watch.observe([child])
    watch._look_for_dead()
    assert causes == []
    watch._look_for_dead()
    assert causes[:1] == ["rank 1 was killed by signal 9"]
    assert child.stdin is not None
    child.stdin.close()
