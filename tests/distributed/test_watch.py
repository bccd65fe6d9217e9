"""Ranks that are gone, hang or do not get on are named; here all of them are objects of one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from torchrec_mdr.distributed import watch as module
from torchrec_mdr.distributed.watch import BEAT_SECONDS, Watch, is_broken_connection


class Turns:
    """The event that ends a watch; each of its threads gets as many turns as it is given."""

    def __init__(self) -> None:
        self.turns, self._ended = 0, False

    def set(self) -> None:
        self._ended = True

    def is_set(self) -> bool:
        return self._ended

    def wait(self, seconds: float) -> bool:
        assert seconds == BEAT_SECONDS
        self.turns -= 1
        return self._ended or self.turns < 0


class Ranks:
    """Watches in a time of their own, which does not depend on the machine: at each beat all threads have a turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: list[tuple[int, int]] = []
        self._threads: list[Callable[[], None]] = []

    def start(self, ranks: int = 3, store: Any = None) -> list[Watch]:
        store = store or dist.HashStore()
        return [
            Watch(store, rank, ranks, leave=lambda code, rank=rank: self.left.append((rank, code)))
            for rank in range(ranks)
        ]

    def thread(self, target: Callable[[], None], daemon: bool) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: self._threads.append(target))

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += min(BEAT_SECONDS / 2, seconds)
            for thread in self._threads if self.now % BEAT_SECONDS == 0 else ():
                thread.__self__._ended.turns = 1  # type: ignore[attr-defined]
                thread()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    made = Ranks()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "threading", SimpleNamespace(Thread=made.thread, Event=Turns))
    return made


def silence(watch: Watch) -> None:
    """As a stopped process: no sign of life, and no good-bye."""
    watch._ended.set()


def test_a_silent_rank_is_named_by_all_others(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    watches = ranks.start()
    watches[2].at("at step 7 of stage 'adapt'")
    ranks.sleep(3)
    silence(watches[2])
    ranks.sleep(600)
    assert not ranks.left
    ranks.sleep(3)
    assert sorted(ranks.left) == [(0, 75), (1, 75)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("rank 2 (at step 7 of stage 'adapt', on " in line for line in said)
    assert all("has not been heard of for 600 seconds" in line for line in said)


def test_the_first_rank_is_named_by_the_others(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    watches = ranks.start()
    ranks.sleep(3)
    silence(watches[0])
    ranks.sleep(603)
    assert sorted(ranks.left) == [(1, 75), (2, 75)]
    assert all("rank 0" in line for line in capsys.readouterr().err.splitlines())


def test_a_rank_that_does_not_get_on_is_named_where_ranks_have_to(
    ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    watches = ranks.start()
    ranks.sleep(1000)
    assert not ranks.left, "outside of a stage nobody has to get on"
    for watch in watches:
        watch.begin()
        if watch.rank != 1:
            watch.at("at step 1")
    ranks.sleep(600)
    assert not ranks.left
    ranks.sleep(3)
    assert len(ranks.left) == 3
    assert all("rank 1 (" in line and "has not got on" in line for line in capsys.readouterr().err.splitlines())


def test_ranks_that_get_on_are_left_alone(ranks: Ranks) -> None:
    watches = ranks.start()
    for watch in watches:
        watch.begin()
    for step in range(9):
        ranks.sleep(590)
        watches[step % 3].at(f"at step {step}")
    assert not ranks.left


def test_who_is_gone_is_asked_when_a_connection_breaks(ranks: Ranks) -> None:
    watches = ranks.start()
    ranks.sleep(3)
    watches[1].close("has failed: KeyError: 'x'")
    assert watches[0].who_is_lost() == "rank 1 has failed: KeyError: 'x'"
    assert watches[2].who_is_lost() == "rank 1 has failed: KeyError: 'x'"
    others = ranks.start()
    ranks.sleep(3)
    silence(others[1])
    assert others[0].who_is_lost().startswith("rank 1 (at the start, on ")
    assert others[2].who_is_lost().startswith("rank 1 (at the start, on ")


def test_who_fails_waits_for_the_others_farewells(ranks: Ranks) -> None:
    watches = ranks.start()
    watches[1].close("has failed")
    watches[0].wait_for_others(3)
    assert ranks.now >= 3, "rank 2 does not come"
    watches[2].close("has failed")
    now = ranks.now
    watches[0].wait_for_others(3)
    assert ranks.now == now


class Shaky:
    """A store that fails so many times at first."""

    def __init__(self, times: int) -> None:
        self.store, self.times = dist.HashStore(), times

    def __getattr__(self, name: str) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise RuntimeError("no answer")
        return getattr(self.store, name)


def test_a_store_that_fails_once_is_asked_again(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.start(store=Shaky(8))
    ranks.sleep(2000)
    assert not ranks.left
    ranks.start(store=Shaky(10**6))
    ranks.sleep(600)
    assert not ranks.left
    ranks.sleep(3)
    assert len(ranks.left) == 3
    assert all("rank 0 has not answered for 600 seconds" in line for line in capsys.readouterr().err.splitlines())


def test_broken_connections_are_told_from_mistakes() -> None:
    assert is_broken_connection(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]"))
    assert is_broken_connection(dist.DistNetworkError("x"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_connection(ValueError("gloo is a word here, too"))
