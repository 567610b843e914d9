"""The processes of an evaluation, started by torchrun or srun: each answers its share, the first one gathers."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from pipeline.cli.errors import FailureError, as_message, exit_code, is_of_lost_rank

WAIT_SECONDS = 1800.0  # limit for a rank to wait for the slowest one

Part = TypeVar("Part")


class Ranks(NamedTuple):
    """This process among those of an evaluation."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def gather(self, part: Part) -> list[Part]:
        """Return the parts of all ranks on the first one, an empty list on the others."""
        if self.world_size == 1:
            return [part]
        parts: list[Part | None] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(part, parts)
        return [one for one in parts or [] if one is not None]

    def share(self, value: Part | None) -> Part:
        """Return the value of rank 0 on every rank."""
        values = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(values)
        (shared,) = values
        assert shared is not None
        return shared

    def run_on_all(self, work: Callable[[], Part]) -> Part:
        """Do the same work on every rank; rank 0 raises what any has raised.

        Raises: ValueError, FailureError, and OSError where this is the only rank.
        """
        if self.world_size == 1:
            return work()
        found, error = None, None
        try:
            found = work()
        except (ValueError, OSError, FailureError) as raised:
            error = as_message(raised)
        errors = self.gather(error)
        self.raise_together(errors[0] if errors else None)
        assert found is not None
        return found

    def raise_together(self, error: ValueError | FailureError | None) -> None:
        """Raise the error of rank 0 there, and exit the other ranks with its code. Raises: the error, SystemExit."""
        if self.world_size > 1:
            errors = [error]
            torch.distributed.broadcast_object_list(errors)
            if errors[0] is not None and self.rank > 0:
                raise SystemExit(exit_code(errors[0]))
        if error is not None:
            raise error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the other processes, if a launcher has started several, for the length of a block.

    Raises: FailureError when another one has ended early.
    """
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    with warnings.catch_warnings(action="ignore"):  # that Slurm is installed and not used
        environment = next((kind() for kind in kinds if kind.detect()), None)
    if environment is None or environment.world_size() == 1:
        yield Ranks()
        return
    os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
    rank, world_size = environment.global_rank(), environment.world_size()
    limit = timedelta(seconds=WAIT_SECONDS)
    torch.distributed.init_process_group("gloo", timeout=limit, rank=rank, world_size=world_size)
    try:
        machines: list[str | None] = [None] * world_size
        torch.distributed.all_gather_object(machines, socket.gethostname())
        yield Ranks(rank, world_size, environment.local_rank(), machines.count(socket.gethostname()))
    except RuntimeError as error:
        if not is_of_lost_rank(error):
            raise
        raise FailureError(f"rank {rank}: another rank has ended or does not answer") from error
    finally:
        torch.distributed.destroy_process_group()
