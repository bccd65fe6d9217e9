"""One process at a time: by a lock of the file system on a disk, by an object with a lease in a store."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchrec_mdr.storage.conditions import can_create, create
from torchrec_mdr.storage.files import read_bytes, remove, write_bytes
from torchrec_mdr.storage.paths import is_store

# between two renewals; a lock that is not renewed for so long is another's to take
BEAT_SECONDS, LEASE_SECONDS = 5.0, 20.0
SETTLE_SECONDS = 0.5  # for two that take a lock at the same moment, where a store cannot tell them apart
_LONGEST_PAUSE = 0.2  # between two looks at another's lock

logger = logging.getLogger(__name__)


class Hold:
    """A lock that is held. On a disk it stays so until it is given back."""

    def check(self) -> None:
        """Raises ValueError where the lock has become another's: a change that has not been written must not be."""


@contextmanager
def exclusive(path: str, busy: str | None = None) -> Iterator[Hold]:
    """Keeps other processes, and other threads, out of a block that names the same path.

    On a disk the file is locked by the kernel, which frees it with its process. In a store it is an object that this
    process makes, renews, and removes; what is not renewed for 20 seconds, as somebody else's clock counts them, is
    taken over. Hence a process that was stopped for longer asks :meth:`Hold.check` before a change counts.

    Args:
        path (str): the file that stands for the lock; holds nothing else.
        busy (str | None): what to say where another one holds it; None waits for it.

    Raises:
        ValueError: another holds it and `busy` is given, or it cannot be written.

    Example::

        >>> with exclusive("memory://bucket/lock") as hold:
        ...     hold.check()
    """
    if is_store(path):
        lease = _Lease(path)
        lease.take(busy)
        try:
            yield lease
        finally:
            lease.release()
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield Hold()


class _Lease(Hold):
    """A lock in a store, renewed by a thread while it is held."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock in a store", daemon=True)

    def take(self, busy: str | None) -> None:
        """See :func:`exclusive`."""
        seen, since, pause = None, time.monotonic(), 0.02
        while True:
            found = _content(self._path)
            # its age is measured here: clocks of machines differ
            dead = found is not None and found == seen and time.monotonic() - since > LEASE_SECONDS
            if dead:
                logger.warning("the lock %s has not been renewed for %s s: taken over", self._path, LEASE_SECONDS)
                remove(self._path)
            if (found is None or dead) and self._made(settle=dead):
                self._thread.start()
                return
            if found is not None and found != seen:
                if busy is not None and seen is not None:
                    raise ValueError(busy)
                seen, since = found, time.monotonic()
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def check(self) -> None:
        """See :meth:`Hold.check`."""
        found = _content(self._path)
        if found is None or _token(found) != self._token:
            raise ValueError(
                f"the lock {self._path} has become another process's, since this one stood still for more than "
                f"{LEASE_SECONDS:g} s; nothing was changed: do it again"
            )

    def release(self) -> None:
        """Gives the lock back, where it is still held."""
        self._ended.set()
        self._thread.join()
        try:
            self.check()
            remove(self._path)
        except ValueError as error:  # what was done under it is done
            logger.warning("%s", error)

    def _made(self, settle: bool) -> bool:
        """Whether the lock is this one's after a try; settle waits for others that may take it at this moment."""
        content = self._own_content()
        made = create(self._path, content)
        # a store that makes it twice does not know who was first: then who was last has it
        if made and (settle or not can_create(self._path) or create(self._path, content)):
            time.sleep(SETTLE_SECONDS)
        return _content(self._path) == content

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.check()
                self._beat += 1
                write_bytes(self._path, self._own_content())
            except ValueError as error:  # a later beat may come through; if none does, check() says it
                logger.warning("the lock %s could not be renewed: %s", self._path, error)

    def _own_content(self) -> bytes:
        own: dict[str, Any] = {"token": self._token, "beat": self._beat, "host": socket.gethostname()}
        return json.dumps({**own, "pid": os.getpid(), "time": time.time()}).encode()


def _content(path: str) -> bytes | None:
    """What a lock says; None where there is none."""
    try:
        return read_bytes(path)
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _token(content: bytes) -> Any:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found.get("token") if isinstance(found, dict) else None
