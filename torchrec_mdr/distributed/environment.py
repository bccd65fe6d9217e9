"""The process group and the device of this process."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from torchrec_mdr.distributed.meeting import meet
from torchrec_mdr.distributed.watch import Watch, separate_store
from torchrec_mdr.storage import exists

T = TypeVar("T")
SEEN_SECONDS = 10.0  # a shared disk may show a new file so much later
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Environment:
    """Where this process stands in the run.

    Args:
        rank (int): of this process.
        world_size (int): number of processes.
        device (torch.device): where its share of the model lives.
        local_world_size (int): number of processes on this machine; 0 says all of them.
        watch (Watch | None): watches the other processes, where there are some.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 0
    watch: Watch | None = field(default=None, compare=False, repr=False)

    def at(self, place: str) -> None:
        """Says where this process is: it has got on."""
        if self.watch is not None:
            self.watch.at(place)

    @contextmanager
    def getting_on(self) -> Iterator[None]:
        """While this is open, a process that does not get on hangs, see :class:`Watch`."""
        if self.watch is not None:
            self.watch.begin()
        yield
        if self.watch is not None:
            self.watch.end()

    @property
    def is_main(self) -> bool:
        """Whether this process writes results and progress."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Environment]:
    """Opens the process group that torchrun describes, or one of a single process; closes it at the end.

    A variable that is empty counts as not set. A world of one process needs none of them, and no address.

    The device is the environment's: a GPU where there is one (the process's local rank), the CPU otherwise.

    Raises:
        ValueError: RANK, WORLD_SIZE and the address do not describe a place in a group.
    """
    rank, world_size, local_rank, local_world_size = _place()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    timeout = timedelta(minutes=30)
    hook = sys.excepthook  # PyTorch sets one that writes the rank before tracebacks, and leaves it
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store = meet(rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    watch = Watch(separate_store(), rank, world_size) if world_size > 1 else None
    try:
        yield Environment(rank, world_size, device, local_world_size, watch)
    finally:
        if watch is not None:
            watch.close(_reason(sys.exception()))
        dist.destroy_process_group()
        sys.excepthook = hook


def _reason(error: BaseException | None) -> str:
    return "has ended" if error is None else f"has failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _place() -> tuple[int, int, int, int]:
    """Rank, world size, and both on this machine, as the environment says."""
    world_size = _number("WORLD_SIZE", 1, least=1)
    rank = _number("RANK", 0)
    if "WORLD_SIZE" not in _set_variables() and rank:
        raise ValueError(f"RANK={rank} is set, but WORLD_SIZE is not; start by torchrun, or set both, or neither")
    if rank >= world_size:
        raise ValueError(f"RANK={rank} is no rank of WORLD_SIZE={world_size}: ranks are 0 to {world_size - 1}")
    if world_size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in _set_variables()]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={world_size}, but {' and '.join(missing)} {'are' if missing[1:] else 'is'} not set; "
                "start by torchrun, which sets all of them"
            )
        if not 0 < _number("MASTER_PORT", 0) < 2**16:
            raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port: they are 1 to 65535")
    return rank, world_size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", world_size, least=1)


def _set_variables() -> set[str]:
    return {name for name, value in os.environ.items() if value.strip()}


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text} in the environment must be a whole number, at least {least}")
    return int(text)


def free_memory() -> int:
    """Bytes that this machine, or the container that this process runs in, has left."""
    with open("/proc/meminfo") as file:
        left = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return left
    return left if limit == "max" else min(left, int(limit) - int(used))


def keep_freed_memory() -> None:
    """Tells glibc not to give memory back to the system that the next step asks for again.

    By default it gives back large tensors, and each of their pages costs a fault when it comes again: up to half of a
    step's time. jemalloc and tcmalloc, which PyTorch's notes on CPU recommend for the same reason, need no telling.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def broadcast(value: object, environment: Environment, group: dist.ProcessGroup | None = None) -> object:
    """The main process's value, on all processes."""
    values = [value]
    if environment.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def on_main(work: Callable[[], T], environment: Environment | None = None, group: dist.ProcessGroup | None = None) -> T:
    """What work() returns on the main process, on all; what it raises for bad input, or to end the process, too.

    Args:
        work (Callable): what it returns can be pickled.
        environment (Environment | None): of the process group that is open; asks that itself where left out.
        group (dist.ProcessGroup | None): of all processes, which the answer takes; the one that is open where left out.
    """
    if environment is None:
        environment = Environment(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    answer: T | None = None
    problem: BaseException | None = None
    if environment.is_main:
        try:
            answer = work()
        except (ValueError, OSError, SystemExit) as error:
            problem = error
    answer, problem = cast(tuple[T, BaseException | None], broadcast((answer, problem), environment, group))
    if problem is not None:
        raise problem
    return answer


def on_every(work: Callable[[], T]) -> T:
    """What work() returns on this process; what it raises for bad input on one of them, all raise.

    Called by all processes of the group that is open, or without one. For what each reads by itself: without this, one
    that fails would leave the others waiting.

    Example::

        >>> on_every(lambda: 3)
        3
    """
    answer: T | None = None
    problem: BaseException | None = None
    try:
        answer = work()
    except (ValueError, OSError) as error:
        problem = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = problem or next((one for one in problems if one is not None), None)
    if problem is not None:
        raise problem
    return cast(T, answer)


def check_seen(path: str, option: str, environment: Environment) -> None:
    """Checks that all processes see what the main process has written; called by all of them.

    Args:
        path (str): the file.
        option (str): what says where it lies.
        environment (Environment): rank, world size, device.

    Raises:
        ValueError: one does not, since its node has another disk.
    """

    def look() -> None:
        until = time.monotonic() + SEEN_SECONDS
        while not exists(path):
            if time.monotonic() > until:
                raise ValueError(
                    f"rank {environment.rank} (on {socket.gethostname()}) does not see {path}, which rank 0 has "
                    f"written; name a folder on a disk that all nodes share, or in an object store, by {option}"
                )
            time.sleep(0.5)

    if environment.world_size > 1:
        on_every(look)
