"""The process group and the device of this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Environment:
    """Where this process stands in the run.

    Args:
        rank (int): of this process.
        world_size (int): number of processes.
        device (torch.device): where its share of the model lives.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes results and progress."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Environment]:
    """Opens the process group that torchrun describes, or one of a single process; closes it at the end.

    The device is the environment's: a GPU where there is one (the process's local rank), the CPU otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    timeout = timedelta(minutes=30)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Environment(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tells glibc not to give memory back to the system that the next step asks for again.

    By default it gives back large tensors, and each of their pages costs a fault when it comes again: up to half of a
    step's time. jemalloc and tcmalloc, which PyTorch's notes on CPU recommend for the same reason, need no telling.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def broadcast(value: object, environment: Environment) -> object:
    """The main process's value, on all processes."""
    values = [value]
    if environment.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
