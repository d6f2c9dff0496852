"""A run of several processes that torchrun started: who they are, and what the first of them does for all."""

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
TIMEOUT = timedelta(minutes=5)  # how long ranks wait for one that hangs


def start() -> None:
    """Join the other processes, if torchrun started more than one: gloo for CPU tensors, NCCL for those of GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, place, count = next(rendezvous("env://"))
        # torchrun keeps its store over a restart, and gloo would meet the addresses of the dead (torch 2.13).
        attempt = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(timeout=TIMEOUT, store=attempt, rank=place, world_size=count)


def end(reason: BaseException | None) -> None:
    """Leave them; a process that is through with its work and asks to exit does so at once.

    Torch's threads may still run when the interpreter takes itself apart, and then abort a process whose work is done
    (torch 2.13, "terminate called without an active exception").
    """
    if group() is None:
        return
    dist.destroy_process_group()
    if isinstance(reason, SystemExit):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(reason.code if isinstance(reason.code, int) else int(reason.code is not None))


def group() -> Any:
    """All processes that train together, or None where this one is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size() -> int:
    """How many there are."""
    return 1 if group() is None else dist.get_world_size()


def rank() -> int:
    """Which of them this is."""
    return 0 if group() is None else dist.get_rank()


def restarted() -> bool:
    """Whether torchrun started this process again after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def device(name: str) -> str:
    """Of GPUs, each process of a machine takes its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and group() is not None else name


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch of indices, the same size as that of others or one less."""
    return batch.tensor_split(size())[rank()]


def by_first(work: Callable[[], T]) -> T:
    """What the first process's work gives, or raises, on all of them; files are its own business."""
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
        raise LostRankError(f"a rank is lost before the run began: {error}") from error
    if isinstance(said[0], JetplaneError):
        raise said[0]
    return said[0]
