from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from torchrec_mdr.data.prefetch import prefetch


def test_items_come_in_order_and_an_error_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("row 5 is bad")

    ahead = prefetch(items(), depth=2)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="row 5 is bad"):
        next(ahead)


def test_no_more_than_depth_items_wait() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    ahead = prefetch(items(), depth=3)
    next(ahead)
    # one consumed, three waiting, one in the thread's hands
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(made) == 5
    ahead.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "mdr-prefetch" for thread in threading.enumerate())
