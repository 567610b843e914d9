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


class EndingChild(subprocess.Popen[bytes]):
    """A rank that is a zombie, and has no status before the second poll: its other threads are still ending."""

    polls = 0

    def poll(self) -> int | None:
        self.polls += 1
        return None if self.polls == 1 else super().poll()


def test_a_rank_that_is_ending_is_named_once_it_has_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SECONDS_BETWEEN_LOOKS", 0.01)
    watch = RankWatch(tmp_path, dict, rank=0, hang_seconds=60, close=lambda cause, code: None)
    causes: list[str] = []
    monkeypatch.setattr(watch, "_end", lambda cause, code: causes.append(cause))
    child = EndingChild([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    space = ranks._process_space()
    monkeypatch.setattr(watch, "_places", [(space, os.getpid()), (space, child.pid)])
    watch.observe([child])
    watch._look_for_dead()
    assert causes == []
    watch._look_for_dead()
    assert causes[:1] == ["rank 1 was killed by signal 9"]
    assert child.stdin is not None
    child.stdin.close()
