"""Ranks that are gone, hang or do not get on are named; here all of them are objects of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from torchrec_mdr.distributed import watch as module
from torchrec_mdr.distributed.watch import Watch, is_broken_connection

Start = Callable[..., list[Watch]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_GONE_SECONDS", 0.4)
    started: list[Watch] = []

    def begin(ranks: int = 3, seconds: float = 0.8, store: Any = None) -> list[Watch]:
        store = store or dist.HashStore()
        left: list[tuple[int, int]] = []
        for rank in range(ranks):
            watch = Watch(store, rank, ranks, seconds, leave=lambda code, rank=rank: left.append((rank, code)))
            watch.left = left  # type: ignore[attr-defined]
            started.append(watch)
        return started[-ranks:]

    yield begin
    for watch in started:
        watch.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition():
        time.sleep(0.02)
    return condition()


def silence(watch: Watch) -> None:
    """As a stopped process: no sign of life, and no good-bye."""
    watch._ended.set()


def test_a_silent_rank_is_named_by_all_others(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    watches = start()
    watches[2].at("at step 7 of stage 'adapt'")
    time.sleep(0.3)
    silence(watches[2])
    assert wait_for(lambda: len(watches[0].left) == 2)  # type: ignore[attr-defined]
    assert sorted(watches[0].left) == [(0, 75), (1, 75)]  # type: ignore[attr-defined]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("rank 2 (at step 7 of stage 'adapt', on " in line for line in said)
    assert all("has not been heard of for" in line for line in said)


def test_the_first_rank_is_named_by_the_others(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    watches = start()
    time.sleep(0.2)
    silence(watches[0])
    assert wait_for(lambda: len(watches[0].left) == 2)  # type: ignore[attr-defined]
    assert all("rank 0" in line for line in capsys.readouterr().err.splitlines())


def test_a_rank_that_does_not_get_on_is_named_where_ranks_have_to(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    watches = start()
    time.sleep(1.2)
    assert not watches[0].left, "outside of a stage nobody has to get on"  # type: ignore[attr-defined]
    for watch in watches:
        watch.begin()
        if watch.rank != 1:
            watch.at("at step 1")
    assert wait_for(lambda: len(watches[0].left) == 3)  # type: ignore[attr-defined]
    assert all("rank 1 (" in line and "has not got on" in line for line in capsys.readouterr().err.splitlines())


def test_ranks_that_get_on_are_left_alone(start: Start) -> None:
    watches = start()
    for watch in watches:
        watch.begin()
    for step in range(30):
        time.sleep(0.05)
        watches[step % 3].at(f"at step {step}")
    assert not watches[0].left  # type: ignore[attr-defined]


def test_who_is_gone_is_asked_when_a_connection_breaks(start: Start) -> None:
    watches = start(seconds=60.0)
    time.sleep(0.2)
    watches[1].close("has failed: KeyError: 'x'")
    assert watches[0].who_is_lost() == "rank 1 has failed: KeyError: 'x'"
    assert watches[2].who_is_lost() == "rank 1 has failed: KeyError: 'x'"
    others = start(seconds=60.0)
    time.sleep(0.2)
    silence(others[1])
    assert others[0].who_is_lost().startswith("rank 1 (at the start, on ")
    assert others[2].who_is_lost().startswith("rank 1 (at the start, on ")


def test_a_store_that_fails_once_is_asked_again(start: Start) -> None:
    class Shaky:
        """Fails at first."""

        def __init__(self) -> None:
            self.store, self.calls = dist.HashStore(), 0

        def __getattr__(self, name: str) -> Any:
            self.calls += 1
            if self.calls < 8:
                raise RuntimeError("no answer")
            return getattr(self.store, name)

    watches = start(seconds=1.0, store=Shaky())
    time.sleep(2.0)
    assert not watches[0].left  # type: ignore[attr-defined]


def test_broken_connections_are_told_from_mistakes() -> None:
    assert is_broken_connection(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]"))
    assert is_broken_connection(dist.DistNetworkError("x"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_connection(ValueError("gloo is a word here, too"))
