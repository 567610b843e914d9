"""Processes that stay: each runs one function for many examples, of which the first ones form a process group."""

from __future__ import annotations

import importlib
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 60  # within which a rank answers or has failed


class Task(NamedTuple):
    """What ranks do together: `function(rank, world_size, **arguments)`."""

    function: Callable[..., Any]
    world_size: int
    arguments: dict[str, Any]


class RankPool:
    """Up to `count` gloo ranks that are started once: one process imports `module` and forks them.

    `folder` is for the files by which they meet.
    """

    def __init__(self, count: int, folder: Path, *, module: str) -> None:
        context = get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        self._ranks = [mine for mine, _ in pipes]
        self._folder, self._num_groups = folder, 0
        theirs = [one for _, one in pipes]
        self._parent = context.Process(target=_fork_ranks, args=(theirs, module), daemon=True)
        self._parent.start()
        for connection in theirs:
            connection.close()
        self.process_ids: list[int] = [self._receive(rank) for rank in self._ranks]

    def run(self, function: Callable[..., Any], *, world_size: int, **arguments: object) -> list[Any]:
        """Call `function(rank, world_size, **arguments)` on the first ranks and return its answers.

        `function` is sent by name. Raises: RuntimeError when a rank fails, ends or does not answer; the pool is closed.
        """
        self._num_groups += 1
        file, ranks = self._folder / f"group{self._num_groups}", self._ranks[:world_size]
        for rank in ranks:
            rank.send((file, Task(function, world_size, arguments)))
        answers = [self._receive(rank) for rank in ranks]
        failures = [text for succeeded, text in answers if not succeeded]
        if failures:
            self._fail("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.close()
        for process_id in getattr(self, "process_ids", []):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self._parent.join(SECONDS)
        self._parent.kill()

    def _receive(self, rank: Connection) -> Any:  # noqa: ANN401  # whatever the function returns
        # The parent ends with the first rank that ends.
        ready = wait([rank, self._parent.sentinel], timeout=SECONDS)
        if rank in ready:
            with suppress(EOFError, ConnectionError):
                return rank.recv()
        return self._fail("a rank has ended" if ready else f"a rank has not answered for {SECONDS} s")

    def _fail(self, reason: str) -> None:
        self.close()
        raise RuntimeError(reason)


def _fork_ranks(connections: list[Connection], module: str) -> None:
    """Fork the ranks, and end as soon as one of them has ended."""
    importlib.import_module(module)
    children = []
    for rank, connection in enumerate(connections):
        child = os.fork()
        if child == 0:
            try:
                _serve(rank, connection)
            finally:
                os._exit(1)
        children.append(child)
    for connection in connections:
        connection.close()
    ended, _ = os.wait()
    for child in set(children) - {ended}:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(rank: int, connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    connection.send(os.getpid())
    with suppress(EOFError):
        while True:
            file, task = connection.recv()
            connection.send(_answer(rank, file, task=task))


def _answer(rank: int, file: Path, *, task: Task) -> tuple[bool, Any]:
    from torch import distributed

    try:
        if task.world_size > 1:
            options = {"rank": rank, "world_size": task.world_size, "timeout": timedelta(seconds=SECONDS // 2)}
            distributed.init_process_group("gloo", init_method=f"file://{file}", **options)
        return True, task.function(rank, task.world_size, **task.arguments)
    except Exception:  # noqa: BLE001  # whatever it is, the test reports it
        return False, traceback.format_exc()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def fail_last(rank: int, world_size: int, *, how: str) -> None:
    """Let the last rank exit or raise while the others wait for it."""
    from torch import distributed

    if rank == world_size - 1:
        if how == "exit":
            os._exit(3)
        raise KeyError("of a rank")
    distributed.barrier()
