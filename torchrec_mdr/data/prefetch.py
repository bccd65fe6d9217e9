"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Gives the same items, computed up to `depth` ahead by a thread.

    The thread starts with the first item asked for. It ends with the items, with an error in them (which is raised
    here, in its turn), or when this iterator is closed or garbage-collected.

    Args:
        items (Iterator[T]): what to run ahead of; nobody else may use it.
        depth (int): items that may wait; at least 1.

    Returns:
        Iterator[T]: the items in order.

    Example::

        >>> list(prefetch(iter([1, 2, 3]), depth=2))
        [1, 2, 3]
    """
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=fill, name="mdr-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
        if isinstance(items, Generator):
            items.close()
