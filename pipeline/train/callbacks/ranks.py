"""Several ranks end together: what one of them raises, its death, or its silence ends all in bounded time."""

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
import torch.distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, not exported

from models.arguments import require
from pipeline.cli.errors import FAILURE, USER_ERROR, exit_code, is_of_lost_rank, one_line
from pipeline.cli.signals import EXIT_CODES, stop_signals

SECONDS_BETWEEN_LOOKS = 1.0
STORE_SECONDS = 10.0  # limit for one exchange with rank 0
START_SECONDS = 600.0  # more for the first step: imports, and compilation
CAUSE_SECONDS = 6.0  # for a rank's error to become known, before another takes its own for the cause
FIRST_STEP = 3  # progress after it: a batch started, its loss computed, the batch ended

Facts = Mapping[str, object]


class RankWatch(pl.Callback):
    """Connects the ranks beside their collectives, and ends them all when one has failed.

    Each rank has a thread that every second tells the others, through a store of rank 0, how far it is. The first
    cause wins, is printed once, and becomes the reason in `status.json`. After `hang_seconds` without progress every
    rank writes its stacks into `folder`, and the ranks that are behind are named.

    The main thread writes `_progress` and `_since`, the watching thread reads them and writes `_number`; it ends the
    process itself, since the main thread may wait for a rank that is gone.
    """

    def __init__(
        self, folder: Path, facts: Callable[[], Facts], *, hang_seconds: float, fail: Callable[[str, int], None]
    ) -> None:
        require(hang_seconds > 0, "must be a number above 0", hang_seconds=hang_seconds)
        self.folder, self.facts, self.hang_seconds, self.fail = folder, facts, hang_seconds, fail
        self._store: TCPStore | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._places: list[tuple[str, int]] = []  # host and process of each rank
        self._rank = 0
        self._progress, self._since, self._number = 0, time.monotonic(), 0
        self._is_over = Event()

    def observe(self, children: list[subprocess.Popen[bytes]]) -> None:
        """Begin to watch the ranks that this one has started; from then on their ends are known with their reasons."""
        self._children = children
        self._begin()

    def setup(self, trainer: pl.Trainer, *rest: object, **options: object) -> None:
        """Compare the ranks, and begin to watch. Raises: ValueError when they differ."""
        if trainer.world_size == 1:
            self._begin()
            return
        self._rank = trainer.global_rank
        try:
            compare_ranks(self.facts())
        except ValueError:  # on every rank, so one message is enough
            self.leave()
            if self._rank > 0:
                raise SystemExit(USER_ERROR) from None
            raise
        self._places = gather((socket.gethostname(), os.getpid()))
        limit = timedelta(seconds=STORE_SECONDS)
        is_main = self._rank == 0
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit) if is_main else None
        port = trainer.strategy.broadcast(store.port if store else 0)
        self._store = store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        if not self._children:
            self._begin()

    def on_train_batch_start(self, *arguments: object) -> None:
        """Count."""
        self._advance()

    def on_before_backward(self, *arguments: object) -> None:
        """Count: from here on, the rank may wait for the others."""
        self._advance()

    def on_train_batch_end(self, *arguments: object) -> None:
        """Count."""
        self._advance()

    def on_validation_batch_end(self, *arguments: object) -> None:
        """Count."""
        self._advance()

    def on_train_end(self, *arguments: object) -> None:
        """Leave the others: the training is over."""
        self.leave()

    def leave(self) -> None:
        """End the watch; a rank that ends later is no failure."""
        self._is_over.set()
        if self._places:
            faulthandler.cancel_dump_traceback_later()
        stacks = self.folder / f"rank-{self._rank}.txt"
        if stacks.is_file() and not stacks.stat().st_size:
            stacks.unlink()
            with suppress(OSError):  # another rank's file
                self.folder.rmdir()
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"left/{self._rank}", "1")

    def explain(self, error: BaseException) -> None:
        """Make this rank's error the cause for all, unless there is one already, and end; alone, return."""
        if self._store is None:
            self.leave()
            return
        is_lost = is_of_lost_rank(error)
        if is_lost:  # the other rank or the watch makes its cause known
            time.sleep(CAUSE_SECONDS)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self._rank}.txt").open("a") as file:
            traceback.print_exception(error, file=file)
        cause = f"rank {self._rank} raised {type(error).__name__}: {one_line(error)}"
        if is_lost:
            cause = f"rank {self._rank} has lost the others: {one_line(error)}"
        self._end(cause, exit_code(error))

    def _advance(self) -> None:
        self._progress, self._since = self._progress + 1, time.monotonic()

    def _begin(self) -> None:
        Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def _watch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self._rank}.txt").open("a") as stacks:
            while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
                # For a rank in which no Python thread runs any more; this one sets the clock back.
                limit = self.hang_seconds + (0 if self._progress > FIRST_STEP else START_SECONDS)
                if self._places:
                    faulthandler.dump_traceback_later(limit + STORE_SECONDS, exit=True, file=stacks)
                try:
                    self._look()
                except RuntimeError:  # rank 0 keeps the store
                    if not self._is_over.is_set():
                        self.fail("rank 0 has ended", FAILURE)
                        self._end("rank 0 has ended", FAILURE)
                if time.monotonic() - self._since > limit:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    self._end_hang()

    def _look(self) -> None:
        store = self._store
        if store is not None:
            self._number += 1
            store.set(f"progress/{self._rank}", f"{self._progress} {self._number}")
            if store.check(["cause"]):
                code, _, cause = store.get("cause").decode().partition(" ")
                self._end(cause, int(code))
        self._look_for_dead()

    def _look_for_dead(self) -> None:
        """Find a rank of this machine whose process has ended without a word."""
        for local, child in enumerate(self._children, start=1):
            status = child.poll()
            if status in EXIT_CODES.values():  # a signal that came before it could tell the others
                if stop_signals.first is None:
                    stop_signals.request(signal.SIGINT if status == EXIT_CODES[signal.SIGINT] else signal.SIGTERM)
            elif status:
                self._end_dead(self._rank + local, how_ended(status))
        host = socket.gethostname()
        for rank, (place, process) in enumerate(self._places):
            if place == host and rank != self._rank and not _is_running(process):
                self._end_dead(rank, "has ended without a word, killed perhaps by the system for its memory")

    def _end_dead(self, rank: int, how: str) -> None:
        store = self._store
        time.sleep(SECONDS_BETWEEN_LOOKS)  # its own word may be on its way
        is_known = store is not None and (store.check([f"left/{rank}"]) or store.check(["cause"]))
        if not self._is_over.is_set() and not is_known:
            self._end(f"rank {rank} {how}", FAILURE)

    def _end_hang(self) -> None:
        """End, and name the ranks that do not answer, or else those that are behind."""
        who = "" if self._store is None else f"{self._missing(self._store)}: "
        seconds = f"nothing has moved for {self.hang_seconds:g} seconds"
        self._end(f"{who}{seconds} (the stacks are in {self.folder})", FAILURE)

    def _missing(self, store: TCPStore) -> str:
        """Name the ranks for which the others wait, which write their stacks meanwhile."""
        store.set(f"hangs/{self._rank}", "1")
        before = self._looks(store)
        time.sleep(3 * SECONDS_BETWEEN_LOOKS)
        after = self._looks(store)
        silent = [rank for rank in after if before[rank] == after[rank] and not store.check([f"hangs/{rank}"])]
        progress = {rank: progress for rank, (progress, _) in after.items()}
        behind = [rank for rank, count in progress.items() if count == min(progress.values())]
        if silent:
            return f"rank {', '.join(map(str, silent))} does not answer"
        return f"rank {', '.join(map(str, behind))} is behind" if len(behind) < len(progress) else "all ranks wait"

    def _looks(self, store: TCPStore) -> dict[int, tuple[int, int]]:
        """Return the progress of each rank, and how often its thread has looked."""
        keys = [f"progress/{rank}" for rank in range(len(self._places))]
        texts = [store.get(key).decode() if store.check([key]) else "0 0" for key in keys]
        pairs = (text.split() for text in texts)
        return {rank: (int(progress), int(number)) for rank, (progress, number) in enumerate(pairs)}

    def _end(self, cause: str, code: int) -> None:
        """End this process; the first rank that has found a cause makes it known and prints it."""
        is_first = True
        if self._store is not None:
            with suppress(RuntimeError):
                known = self._store.compare_set("cause", "", f"{code} {cause}").decode()
                is_first = known == f"{code} {cause}" and self._store.add("printed", 1) == 1
                _, _, cause = known.partition(" ")
        if is_first:
            print(f"error: {cause}", file=sys.stderr, flush=True)
        if self._rank == 0:
            self.fail(cause, code)
            time.sleep(2 * SECONDS_BETWEEN_LOOKS)  # with rank 0 the store ends, from which the others learn the cause
        for child in self._children:
            with suppress(OSError):
                child.kill()
        sys.stdout.flush()
        os._exit(code)


def gather(value: Any) -> list[Any]:  # noqa: ANN401  # whatever can be pickled
    """Return the values of all ranks, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def compare_ranks(facts: Facts) -> None:
    """Raise ValueError on every rank, naming the first difference, unless all have the same facts."""
    all_facts: list[Facts] = gather(dict(facts))
    for rank, others in enumerate(all_facts):
        for name in sorted(all_facts[0].keys() | others.keys()):
            first, value = all_facts[0].get(name), others.get(name)
            if first != value:
                raise ValueError(f"rank {rank} has {name}={value}, rank 0 has {first}: all ranks need the same")


def how_ended(status: int) -> str:
    """Describe the exit status of a child, negative for a signal."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with code {status}"


def _is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
