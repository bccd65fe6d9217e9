"""Where the ranks of a run meet: a store that holds nothing of ranks that are gone.

torchrun keeps its store over restarts, and with it the addresses of the ranks before (pytorch issue 135712): a rank
that is faster than another would call the dead one. No variable that torchrun sets tells one start from the next on all
agents, so the ranks agree on a name for theirs.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_COMES, _IS_TOLD, _HAS_COME = "meeting/comes/", "meeting/is_told/", "meeting/has_come/"
_PAUSE_SECONDS = 0.02


def meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store of this start, which the environment's address leads to; called by all ranks.

    Raises:
        ValueError: a rank has not come in time.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return agree(store, rank, world_size, timeout)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that only the ranks of this start know; see :func:`meet`."""
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    return dist.PrefixStore(
        _lead(store, own, world_size, deadline) if rank == 0 else _follow(store, own, rank, deadline), store
    )


def _lead(store: dist.Store, start: str, world_size: int, deadline: float) -> str:
    """Rank 0 names the start: it tells each rank, again where it took an older one's call, until all answer."""
    told: dict[int, str] = {}
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            call = _get(store, f"{_COMES}{rank}")
            if call is not None and told.get(rank) != call:
                store.set(f"{_IS_TOLD}{rank}", f"{call}/{start}")
                told[rank] = call
        missing = [rank for rank in missing if _get(store, f"{_HAS_COME}{rank}") != start]
        if missing:
            _wait(deadline, missing[0])
    return start


def _follow(store: dist.Store, own: str, rank: int, deadline: float) -> str:
    """Another rank calls, and waits for an answer to its own call, not to one of a rank before it."""
    store.set(f"{_COMES}{rank}", own)
    while True:
        call, _, start = (_get(store, f"{_IS_TOLD}{rank}") or "").partition("/")
        if call == own:
            store.set(f"{_HAS_COME}{rank}", start)
            return start
        _wait(deadline, 0)


def _get(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _wait(deadline: float, rank: int) -> None:
    if time.monotonic() > deadline:
        raise ValueError(f"rank {rank} has not come to where the ranks meet; start all of them, or fewer")
    time.sleep(_PAUSE_SECONDS)
