from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool


def sum_of_ranks(offset: int) -> tuple[int, float]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} failed")
    sum_of_ranks(0)


def die() -> None:
    os._exit(3)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_ranks_answer_in_order_and_stay_up(two_ranks: RankPool) -> None:
    assert two_ranks.run(sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]
    assert two_ranks.run(os.getpid) == two_ranks.run(os.getpid)


def test_an_error_comes_back_and_the_pool_works_on(two_ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="rank 1 failed") as error:
        two_ranks.run(fail_on, 1)
    assert "in fail_on" in str(error.value.__cause__)
    assert two_ranks.run(sum_of_ranks, 0) == [(0, 1.0), (1, 1.0)]


def test_death_and_silence_are_errors() -> None:
    pool = RankPool(1)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 3"):
        pool.run(die)
    assert pool.run(sum_of_ranks, 5) == [(0, 5.0)]
    pool.timeout = 0.2
    with pytest.raises(TimeoutError, match=r"rank \[0\]"):
        pool.run(sleep, 60.0)
    pool.close()
