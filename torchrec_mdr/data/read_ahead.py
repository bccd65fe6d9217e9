"""Fetches row groups from an object store before they are read, in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

from torchrec_mdr.data.files import Content, SplitFile

MOST_HELD = 2  # row groups in memory that found no room in the node's cache

Place = tuple[int, int]  # a file's number, and the row group's in it


class ReadAhead:
    """Row groups are announced in the order in which they will be read, and fetched in that order by a thread.

    What the cache on this node's disk has room for goes there, as far ahead as groups are announced; of other groups a
    few are held in memory. Files on disk are left alone, and there is no thread then.

    Args:
        files (Sequence[SplitFile]): of a split.

    Example::

        >>> with ReadAhead([]) as ahead:
        ...     ahead.announce([])
    """

    def __init__(self, files: Sequence[SplitFile]) -> None:
        self._files = files
        self._pool = ThreadPoolExecutor(1, "mdr-read-ahead") if any(file.stored for file in files) else None
        self._coming: deque[tuple[Place, Future[Content]]] = deque()
        self._slots = threading.Semaphore(MOST_HELD)
        self._stopped = False

    def announce(self, places: Iterable[Place]) -> None:
        """Says which row groups will be read after those that were announced before."""
        if self._pool is not None:
            self._coming.extend((place, self._pool.submit(self._fetch, *place)) for place in places)

    @contextmanager
    def taken(self, place: Place) -> Iterator[Content]:
        """Waits for the next row group, whose content is given for the block where it is not on disk.

        Raises:
            ValueError: it cannot be read.
        """
        if self._pool is None:
            yield None
            return
        announced, future = self._coming.popleft()
        assert announced == place, f"row group {announced} was announced, and {place} is read"
        content = future.result()
        try:
            yield content
        finally:
            if content is not None:
                self._slots.release()

    def close(self) -> None:
        """Ends the thread; what is being fetched is waited for."""
        if self._pool is not None:
            self._stopped = True
            self._slots.release()
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, file: int, group: int) -> Content:
        content = self._files[file].fetch(group)
        if content is not None:
            self._slots.acquire()
        return None if self._stopped else content
