"""Ranks of one start meet each other, whoever was there before."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from torchrec_mdr.distributed.meeting import agree

SOON = timedelta(seconds=20)


def start(store: dist.Store, delays: list[float]) -> list[dist.Store]:
    """All ranks meet, each after its delay."""

    def come(rank: int) -> dist.Store:
        time.sleep(delays[rank])
        return agree(store, rank, len(delays), SOON)

    with ThreadPoolExecutor(len(delays)) as ranks:
        return list(ranks.map(come, range(len(delays))))


@pytest.mark.parametrize("delays", [[0.0, 0.3, 0.1], [0.3, 0.0, 0.1]])
def test_ranks_of_a_start_find_each_other_and_nobody_before(delays: list[float]) -> None:
    store = dist.HashStore()
    for world in (3, 3, 2, 3):
        ranks = start(store, delays[:world])
        assert not any(found.check(["address/0"]) for found in ranks), "of the start before"
        ranks[0].set("address/0", "here")
        assert all(found.check(["address/0"]) for found in ranks)


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(ValueError, match="rank 1 has not come"):
        agree(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
    with pytest.raises(ValueError, match="rank 0 has not come"):
        agree(dist.HashStore(), 1, 2, timedelta(seconds=0.1))
