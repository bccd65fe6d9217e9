"""A run's folder belongs to one job at a time: a lock file with a heartbeat."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from typing import Any

from torchrec_mdr.data.owners import is_dead, this_process
from torchrec_mdr.storage import create, exists, is_store, read_json, remove, write_json

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# between two heartbeats; without one for so long, the lock is another's to take
BEAT_SECONDS, LEASE_SECONDS = 5.0, 30.0
SETTLE_SECONDS = 0.5  # for two that take a lock at the same moment


class LockLost(ValueError):
    """The lock has become another's."""


class RunLock:
    """The lock of a run's folder, held by the main process; a thread renews it."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, folder: str, waits: bool) -> None:
        """Takes the lock, from a job that is dead too.

        Args:
            folder (str): the run's, which exists.
            waits (bool): whether to wait for a lock that is not renewed any more to run out.

        Raises:
            ValueError: another job holds it.
        """
        path = os.path.join(folder, LOCK_FILE)
        now = _holder(path)
        first = now or {}
        since = time.monotonic()
        while now is not None and not _is_over(now) and time.monotonic() - since < LEASE_SECONDS:
            if not waits or now.get("beat") != first.get("beat"):
                raise _under_way(folder, now)
            time.sleep(1.0)
            now = _holder(path)
        looked = time.monotonic()
        if is_store(path):
            if first:
                remove(path)
            made = create(path, json.dumps(self._content(0)).encode())
            now = None if made else _holder(path)
            if now is not None and now.get("token") != self._token:  # else the answer to our own writing was lost
                raise _under_way(folder, now)
        else:
            self._write(path, 0)
        self._path = path
        if first or is_store(path):  # not every store tells two apart that write at once; all keep the last
            time.sleep(max(SETTLE_SECONDS, 4 * (time.monotonic() - looked)))
            self.check()
        self._thread = threading.Thread(target=self._renew, args=(path,), name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Does nothing where none was taken.

        Raises:
            LockLost: it has become another's.
            ValueError: its store cannot be read.
        """
        if self._path is None:
            return
        now = _holder(self._path)
        if now is None or now.get("token") != self._token:
            who = "somebody" if now is None else _who(now)
            raise LockLost(f"the lock {self._path} is not this run's any more: {who} has taken it; this run stops")

    def release(self) -> None:
        """Gives the lock back, where it is still held; one that cannot be removed runs out."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(LEASE_SECONDS)  # a store may be slow to answer
        path, self._path = self._path, None
        if path is not None:
            try:
                now = _holder(path)
                if now is not None and now.get("token") == self._token:
                    remove(path)
            except ValueError as error:
                logger.warning("%s; the lock runs out after %d seconds", error, LEASE_SECONDS)

    def _renew(self, path: str) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self.check()
                self._write(path, beat)
            except LockLost:  # the next write of the run says it
                return
            except (ValueError, OSError):  # the store, or the disk, may be back at the next beat
                continue

    def _write(self, path: str, beat: int) -> None:
        write_json(path, self._content(beat))

    def _content(self, beat: int) -> dict[str, Any]:
        return {**this_process(), "token": self._token, "beat": f"{self._token}/{beat}", "time": time.time()}


def _holder(path: str) -> dict[str, Any] | None:
    """What a lock says; None where there is none."""
    if not is_store(path) and not exists(path):
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if is_store(path):  # what is there is whole: it cannot be read
            raise
        return {"beat": None}
    return content if isinstance(content, dict) else {"beat": None}


def _is_over(holder: dict[str, Any]) -> bool:
    """Whether a lock has run out, or the process that holds it was on this machine and is no more."""
    age = time.time() - holder.get("time", time.time())
    return is_dead(holder) or bool(age > LEASE_SECONDS)


def _under_way(folder: str, holder: dict[str, Any]) -> ValueError:
    return ValueError(
        f"the run in {folder} is under way: {_who(holder)} holds its lock; wait for its end, stop it, or name another "
        "folder"
    )


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
