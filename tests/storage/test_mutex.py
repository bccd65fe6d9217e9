"""One at a time, in stores that can tell who was first and in those that cannot."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrec_mdr.storage import exclusive, exists, mutex, read_text, remove, write_text
from torchrec_mdr.storage.handlers import FsspecHandler

COUNT, LOCK = "memory://mutex/count", "memory://mutex/lock"


def _count(_: int) -> None:
    with exclusive(LOCK):
        found = int(read_text(COUNT))
        time.sleep(0.01)
        write_text(COUNT, str(found + 1))


def _overwrites(self: FsspecHandler, path: str, content: bytes) -> bool:
    self.fs.pipe_file(path, content)
    return True


@pytest.mark.parametrize("create", [FsspecHandler.create, _overwrites, None])
def test_threads_exclude_each_other(create: Callable[..., bool] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FsspecHandler, "create")  # what a handler of one's own may lack
    if create is not None:
        monkeypatch.setattr(FsspecHandler, "create", create, raising=False)
    write_text(COUNT, "0")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(_count, range(6)))
    assert read_text(COUNT) == "6"
    assert not exists(LOCK)


def test_a_lock_is_taken_over_when_nobody_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutex, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(mutex, "SETTLE_SECONDS", 0.1)
    write_text(LOCK, json.dumps({"token": "dead", "beat": 7}))
    begun = time.monotonic()
    with exclusive(LOCK):
        assert time.monotonic() - begun > 0.6
    # one that lives is renewed, however long it works
    monkeypatch.setattr(mutex, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(mutex, "BEAT_SECONDS", 0.1)
    order: list[str] = []

    def hold() -> None:
        with exclusive(LOCK) as held:
            order.append("first")
            time.sleep(3.0)
            held.check()
            order.append("first is done")

    thread = threading.Thread(target=hold)
    thread.start()
    while not order:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="^busy$"), exclusive(LOCK, "busy"):
        pass
    with exclusive(LOCK):
        order.append("second")
    thread.join()
    assert order == ["first", "first is done", "second"]


def test_who_stood_still_for_too_long_learns_it() -> None:
    with exclusive(LOCK) as held:
        write_text(LOCK, json.dumps({"token": "another's"}))
        with pytest.raises(ValueError, match="has become another process's"):
            held.check()
    assert "another's" in read_text(LOCK)  # and leaves the other's lock alone
    remove(LOCK)
