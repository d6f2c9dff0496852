"""Training runs on several ranks that torchrun launched: the process group, and work of the first rank for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import JetplaneError, LostRankError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)  # until a rank that does not answer is taken for lost


def start() -> None:
    """Initialize the process group if torchrun launched several ranks: gloo for CPU tensors, NCCL for CUDA tensors."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, place, count = next(rendezvous("env://"))
        # torchrun keeps its store over a restart, where gloo would find the addresses of ended processes (torch 2.13).
        attempt = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(timeout=TIMEOUT, store=attempt, rank=place, world_size=count)


def end(reason: BaseException | None) -> None:
    """Destroy the process group; on `SystemExit` end this process at once, with its exit code.

    Threads of torch may still run while the interpreter shuts down, and abort a process that has done its work (torch
    2.13, "terminate called without an active exception"). ``os._exit`` leaves them no time to.

    Args:
        reason: the exception that ends the program, if any.
    """
    if group() is None:
        return
    dist.destroy_process_group()
    if isinstance(reason, SystemExit):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(reason.code if isinstance(reason.code, int) else int(reason.code is not None))


def group() -> Any:
    """The process group of all ranks, or None for a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size() -> int:
    """The number of ranks."""
    return 1 if group() is None else dist.get_world_size()


def rank() -> int:
    """The number of this rank, from 0."""
    return 0 if group() is None else dist.get_rank()


def restarted() -> bool:
    """Whether torchrun has restarted the ranks after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def device(name: str) -> str:
    """The device of this rank: "cuda" becomes a GPU of its own where there are several ranks."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and group() is not None else name


def shard(batch: torch.Tensor) -> torch.Tensor:
    """This rank's part of a batch of indices (N,); sizes on different ranks differ by at most one."""
    return batch.tensor_split(size())[rank()]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do work on rank 0 alone, such as reading and writing files, and return its result on all ranks.

    Raises:
        JetplaneError: on all ranks, if the work raised it on rank 0.
        LostRankError: a rank ended before it had the result.
    """
    if group() is None:
        return work()
    said: list[Any] = [None]
    if rank() == 0:
        try:
            said = [work()]
        except JetplaneError as error:
            said = [error]
    try:
        dist.broadcast_object_list(said, 0)
    except RuntimeError as error:
        raise LostRankError(f"a rank was lost before the run began: {error}") from error
    if isinstance(said[0], JetplaneError):
        raise said[0]
    return said[0]
