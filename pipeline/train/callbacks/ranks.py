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

from pipeline.cli.errors import FAILURE, exit_code, is_of_lost_rank, one_line
from pipeline.cli.signals import EXIT_CODES, stop_signals
from pipeline.train.ends import RanksDifferError

SECONDS_BETWEEN_LOOKS = 1.0
STORE_SECONDS = 10.0  # limit for one exchange with rank 0
START_SECONDS = 600.0  # more for the first step: imports, and compilation
CAUSE_SECONDS = 6.0  # for a rank's error to become known, before another takes its own for the cause
FIRST_STEP = 3  # progress after it: a batch started, its loss computed, the batch ended

Facts = Mapping[str, object]


class RankWatch(pl.Callback):
    """Connects the ranks beside their collectives, and ends them all when one has failed, or is to stop before a step.

    Each rank reports its progress every second to a store of rank 0. The first cause wins, is printed once, and becomes
    the reason in `status.json`. After `hang_seconds` without progress every rank writes its stacks into `folder`, and
    the ranks that are behind are named.

    The main thread writes `_progress`, and one of two threads reads it and ends the process, since the main thread may
    wait for a rank that is gone. The other one uses the store, which may not answer, and writes `_answered`.
    """

    def __init__(
        self, folder: Path, facts: Callable[[], Facts], *, rank: int, hang_seconds: float,
        close: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self.folder, self.facts, self.hang_seconds, self.close = folder, facts, hang_seconds, close
        self._store: TCPStore | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._places: list[tuple[str, int]] = []  # process of each rank
        self._rank = rank
        self._progress, self._answered = 0, time.monotonic()
        self._threads: dict[str, Thread] = {}
        self._is_over = Event()

    def start(self) -> None:
        """Begin to watch, before the ranks are connected."""
        self._start("watch", self._watch)

    def observe(self, children: list[subprocess.Popen[bytes]]) -> None:
        """Note the ranks that this one has started; from then on their ends are known with their reasons."""
        self._children = children

    def setup(self, trainer: pl.Trainer, *rest: object, **options: object) -> None:
        """Connect the ranks, and compare them. Raises: RanksDifferError."""
        if trainer.world_size == 1:
            return
        self._places = gather((_process_space(), os.getpid()))
        limit = timedelta(seconds=STORE_SECONDS)
        is_main = self._rank == 0
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit) if is_main else None
        port = trainer.strategy.broadcast(store.port if store else 0)
        self._store = store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        compare_ranks(self.facts())
        self._answered = time.monotonic()
        self._start("report", self._report)

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

    def leave(self) -> None:
        """End the watch; a rank that ends later is no failure."""
        self._is_over.set()
        for thread in self._threads.values():
            thread.join(STORE_SECONDS)
        stacks = self.folder / f"rank-{self._rank}.txt"
        if stacks.is_file() and not stacks.stat().st_size:
            stacks.unlink()
            with suppress(OSError):  # another rank's file
                self.folder.rmdir()

    def wait_for_main(self) -> None:
        """On other ranks, wait until rank 0 has reported and ended: a launcher kills it soon after another one ends."""
        if self._rank > 0 and self._store is not None:
            stop_signals.finish()
            with suppress(RuntimeError):
                self._store.wait(["never set"], timedelta(seconds=STORE_SECONDS))

    def explain(self, error: BaseException) -> None:
        """Make this rank's error the cause for all, unless there is one already, and end; alone, return."""
        if self._store is None:
            self.leave()
            return
        is_lost = is_of_lost_rank(error)
        if is_lost:  # the other rank or the watch makes its cause known
            time.sleep(CAUSE_SECONDS)
        with suppress(OSError):  # a full disk may be the error
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self._rank}.txt").open("a") as file:
                traceback.print_exception(error, file=file)
        cause = f"rank {self._rank} raised {type(error).__name__}: {one_line(error)}"
        if is_lost:
            cause = f"rank {self._rank} has lost the others: {one_line(error)}"
        self._end(cause, exit_code(error))

    def _advance(self) -> None:
        self._progress += 1

    def _start(self, name: str, run: Callable[[], None]) -> None:
        if name not in self._threads:
            self._threads[name] = Thread(target=run, name=f"ranks-{name}", daemon=True)
            self._threads[name].start()

    @property
    def _answering_store(self) -> TCPStore | None:
        """The store, None without one or where rank 0 does not answer: most of its methods have no time limit."""
        return self._store if time.monotonic() - self._answered < STORE_SECONDS else None

    def _watch(self) -> None:
        """Look for dead ranks, and for a hang."""
        self.folder.mkdir(parents=True, exist_ok=True)
        idle, progress, before = 0.0, 0, time.monotonic()
        with (self.folder / f"rank-{self._rank}.txt").open("a") as stacks:
            while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
                # For a rank in which no Python thread runs any more; this one sets the clock back.
                limit = self.hang_seconds + (0 if self._progress > FIRST_STEP else START_SECONDS)
                if self._places:
                    faulthandler.dump_traceback_later(limit + 2 * STORE_SECONDS, exit=True, file=stacks)
                passed, before = time.monotonic() - before, time.monotonic()
                idle = 0 if progress != self._progress else idle + min(passed, 2 * SECONDS_BETWEEN_LOOKS)
                progress = self._progress  # a process that was suspended has not been idle
                if stop_signals.first is not None and self._progress == 0:
                    self._end_stopped(stop_signals.first)  # the main thread may wait for a rank that has stopped
                with suppress(RuntimeError):  # rank 0 has ended, which the other thread finds too
                    self._look_for_dead()
                if idle > limit:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    self._end_hang()
            faulthandler.cancel_dump_traceback_later()

    def _report(self) -> None:
        """Report the progress of this rank to the others, and end with the cause that one of them has found."""
        store, number = self._store, 0
        assert store is not None, "several ranks have one"
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                number += 1
                store.set(f"progress/{self._rank}", f"{self._progress} {number}")
                if store.check(["cause"]):
                    code, _, cause = store.get("cause").decode().partition(" ")
                    self._end(cause, int(code))
            except RuntimeError:  # rank 0 keeps the store
                if not self._is_over.is_set():
                    self.close("rank 0 has ended", FAILURE)
                    self._end("rank 0 has ended", FAILURE)
            self._answered = time.monotonic()
        with suppress(RuntimeError):
            store.set(f"left/{self._rank}", "1")

    def _look_for_dead(self) -> None:
        """Find a rank of this machine whose process has ended without giving a cause."""
        for local, child in enumerate(self._children, start=1):
            status = child.poll()  # for a while, a process whose threads are still ending is a zombie without one
            if status in EXIT_CODES.values():  # alone: the ranks that stop together wait for this one
                self._end_stopped(signal.SIGINT if status == EXIT_CODES[signal.SIGINT] else signal.SIGTERM)
            elif status is not None:
                self._end_dead(self._rank + local, how_ended(status))
        space, own = _process_space(), range(self._rank, self._rank + len(self._children) + 1)
        for rank, (its_space, process) in enumerate(self._places):
            if its_space == space and rank not in own and not _is_running(process):
                self._end_dead(rank, "has ended without an error message; the kernel may have killed it to free memory")

    def _end_dead(self, rank: int, how: str) -> None:
        time.sleep(SECONDS_BETWEEN_LOOKS)  # its own cause may be on its way
        store = self._answering_store
        is_known = store is not None and (store.check([f"left/{rank}"]) or store.check(["cause"]))
        if not self._is_over.is_set() and not is_known:
            self._end(f"rank {rank} {how}", FAILURE)

    def _end_stopped(self, number: signal.Signals) -> None:
        self._end(number.name, EXIT_CODES[number])

    def _end_hang(self) -> None:
        """End, and name the ranks that do not answer, or else those that are behind."""
        missing, store = "", self._answering_store
        if self._store is not None:
            missing = "rank 0 does not answer: "
        if store is not None:
            with suppress(RuntimeError):
                missing = f"{self._missing(store)}: "
        seconds = f"nothing has moved for {self.hang_seconds:g} seconds"
        self._end(f"{missing}{seconds} (the stacks are in {self.folder})", FAILURE)

    def _missing(self, store: TCPStore) -> str:
        """Name the ranks for which the others wait, which write their stacks meanwhile."""
        store.set(f"hangs/{self._rank}", "1")
        before = self._reports(store)
        time.sleep(3 * SECONDS_BETWEEN_LOOKS)
        after = self._reports(store)
        silent = [rank for rank in after if before[rank] == after[rank] and not store.check([f"hangs/{rank}"])]
        progress = {rank: progress for rank, (progress, _) in after.items()}
        behind = [rank for rank, count in progress.items() if count == min(progress.values())]
        if silent:
            return f"rank {', '.join(map(str, silent))} does not answer"
        return f"rank {', '.join(map(str, behind))} is behind" if len(behind) < len(progress) else "all ranks wait"

    def _reports(self, store: TCPStore) -> dict[int, tuple[int, int]]:
        """Return the progress of each rank, and how often it has reported."""
        keys = [f"progress/{rank}" for rank in range(len(self._places))]
        texts = [store.get(key).decode() if store.check([key]) else "0 0" for key in keys]
        pairs = (text.split() for text in texts)
        return {rank: (int(progress), int(number)) for rank, (progress, number) in enumerate(pairs)}

    def _end(self, cause: str, code: int) -> None:
        """End this process; the first rank that has found a cause makes it known, and prints it if it is no signal."""
        try:
            store, is_first = self._answering_store, self._rank == (0 if self._store is None else 1)
            if store is not None:
                with suppress(RuntimeError):
                    known = store.compare_set("cause", "", f"{code} {cause}").decode()
                    is_first = known == f"{code} {cause}" and store.add("printed", 1) == 1
                    _, _, cause = known.partition(" ")
            if is_first and code not in EXIT_CODES.values():
                print(f"error: {cause}", file=sys.stderr, flush=True)
            if self._rank == 0:
                self.close(cause, code)
                if self._store is not None:  # it ends with rank 0, and gives the others the cause before
                    time.sleep(2 * SECONDS_BETWEEN_LOOKS)
            for child in self._children:
                with suppress(OSError):
                    child.kill()
            sys.stdout.flush()
        finally:
            os._exit(code)


def gather(value: Any) -> list[Any]:  # noqa: ANN401  # whatever can be pickled
    """Return the values of all ranks, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def compare_ranks(facts: Facts) -> None:
    """Raise RanksDifferError on every rank, naming the first difference, unless all have the same facts."""
    all_facts: list[Facts] = gather(dict(facts))
    for rank, others in enumerate(all_facts):
        for name in sorted(all_facts[0].keys() | others.keys()):
            first, value = all_facts[0].get(name), others.get(name)
            if first != value:
                raise RanksDifferError(f"rank {rank} has {name}={value}, rank 0 has {first}: all ranks need the same")


def how_ended(status: int) -> str:
    """Describe the exit status of a child, negative for a signal."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with code {status}"


def _process_space() -> str:
    """Return what makes a process number unique: the machine, and the container on it."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
