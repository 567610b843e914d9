"""Ranks of an evaluation that end early."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SCRIPT = """
import os, threading
from pipeline.cli.errors import one_line_errors
from pipeline.evaluate.ranks import joined_ranks
with one_line_errors(), joined_ranks() as ranks:
    if ranks.rank == 1:
        os._exit(9)
    ranks.gather("part")
"""


@pytest.mark.faults
def test_the_end_of_a_rank_is_one_line_of_the_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "test", "TORCH_CPP_LOG_LEVEL": "ERROR",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [2, 9]
    assert outputs == ["error: rank 0: another rank has ended or does not answer\n", ""]
