"""Decisions of rank 0 for all ranks, such as the data set of a training, whose files only it lists and checks."""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, not exported

from data.shards.dataset import Dataset
from data.shards.indexing import LOCK_SECONDS, follow_dataset, manifest_digest
from data.storage.location import Root
from pipeline.build.trainer import accept_ntasks, launched_ranks
from pipeline.cli.errors import USER_ERROR, FailureError, exit_code

POLL_SECONDS = 0.1  # short, because a signal waits as long
CONNECT_SECONDS = 600.0  # limit for rank 0 to start
_numbers = count()  # of the answers so far
_servers: list[TCPStore] = []  # lives on, for ranks that ask later; torch shares it with its own on this port


def open_on_first_rank(open_all: Callable[[], Dataset], *, root: Root, folder: Path) -> Dataset:
    """Return the data set that `open_all` opens on rank 0, read from the manifest in `folder` on the other ranks.

    Where a rank has another manifest, as in a folder on another disk, it opens the data set itself.
    Raises: as `open_all`, on the other ranks ValueError or FailureError with the words of rank 0; FailureError when it
    does not answer.
    """
    if _launched() is None:
        # Lightning starts the other ranks of a machine after the first has opened the data set.
        is_started_by_first = int(os.environ.get("LOCAL_RANK", "0")) > 0
        return (follow_dataset(root, folder) if is_started_by_first else None) or open_all()
    opened: list[Dataset] = []

    def open_and_digest() -> str:
        opened.append(open_all())
        return manifest_digest(opened[0])

    digest = answer_of_first_rank(open_and_digest)
    return opened[0] if opened else follow_dataset(root, folder, digest=digest) or open_all()


def answer_of_first_rank(compute: Callable[[], str]) -> str:
    """Return what `compute` returns on rank 0 of those that torchrun or srun has started; without them, call it.

    Raises: as `compute`, on the other ranks ValueError or FailureError with the words of rank 0; FailureError when it
    does not answer.
    """
    ranks = _launched()
    if ranks is None:
        return compute()
    key = f"convoy/answer-{next(_numbers)}"
    store = _connect(ranks)
    if ranks.global_rank() > 0:
        found = json.loads(_wait(store, key))
        if "error" in found:
            raise (ValueError if found["code"] == USER_ERROR else FailureError)(found["error"])
        return str(found["answer"])
    followers = ranks.world_size() - 1
    try:
        answer = compute()
    except (ValueError, OSError) as error:
        with suppress(FailureError):  # the error is this one, whoever else has ended
            _share(store, key, answer={"error": str(error), "code": exit_code(error)}, followers=followers)
        raise
    _share(store, key, answer={"answer": answer}, followers=followers)
    return answer


def _launched() -> ClusterEnvironment | None:
    """Return the ranks of torchrun or srun, None where no launcher has started several."""
    launched = launched_ranks(os.environ)
    if launched is None:
        return None
    accept_ntasks(launched)
    with warnings.catch_warnings(action="ignore"):  # that Slurm is installed and not used
        kinds = (TorchElasticEnvironment, SLURMEnvironment)
        return next((kind() for kind in kinds if kind.detect()), None)


def _share(store: TCPStore, key: str, *, answer: dict[str, object], followers: int) -> None:
    """Set a key, and wait until the other ranks have read it: the store may end with this process.

    Raises: FailureError when one does not read it.
    """
    store.set(key, json.dumps(answer))
    end = time.monotonic() + CONNECT_SECONDS
    while store.add(f"{key}/read", 0) < followers:
        if time.monotonic() > end:
            raise FailureError(f"another rank has not started in {CONNECT_SECONDS:.0f} seconds")
        time.sleep(POLL_SECONDS)


def _connect(ranks: ClusterEnvironment) -> TCPStore:
    """Connect to the store of rank 0, or of torchrun's agent on its machine. Raises: FailureError."""
    host, port = ranks.main_address, ranks.main_port
    is_server = ranks.global_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit, end = timedelta(seconds=CONNECT_SECONDS), time.monotonic() + CONNECT_SECONDS
    while not is_server and not _is_open(host, port):
        if time.monotonic() > end:
            raise FailureError(f"rank 0 on {host} has not started in {CONNECT_SECONDS:.0f} seconds")
        time.sleep(POLL_SECONDS)
    try:
        store = TCPStore(host, port, is_master=is_server, wait_for_workers=False, timeout=limit, multi_tenant=is_server)
    except RuntimeError as error:
        raise FailureError(f"no connection to rank 0 at {host}, port {port}: {error}") from error
    if is_server:
        _servers.append(store)
    return store


def _is_open(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=POLL_SECONDS * 10):
        return True
    return False


def _wait(store: TCPStore, key: str) -> str:
    """Return the value of a key when it is there. Raises: FailureError when rank 0 has ended or takes too long."""
    end = time.monotonic() + LOCK_SECONDS
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise FailureError(f"rank 0 has not answered in {LOCK_SECONDS / 3600:.0f} hours")
            time.sleep(POLL_SECONDS)
        answer: str = store.get(key).decode()
        store.add(f"{key}/read", 1)
    except RuntimeError as error:
        raise FailureError("rank 0 has ended or does not answer") from error
    return answer
