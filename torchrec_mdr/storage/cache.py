"""Files of object stores on the node's disk: one copy for all of its processes, within a stated size."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from torchrec_mdr.storage.files import make_folder, open_read, reason, remove_folder, size, stamp
from torchrec_mdr.storage.paths import is_store

FOLDER_VARIABLE, SIZE_VARIABLE = "MDR_STORE_CACHE", "MDR_STORE_CACHE_GB"
DEFAULT_GB = 20.0
_LOCK, _MAKING, _SCRATCH = "lock", "making", "scratch-"
_mutex = threading.Lock()
_in_use: dict[str, IO[str]] = {}  # locks of this process's copies, by their folders
_users: Counter[str] = Counter()  # how many of this process use each


class NoRoom(ValueError):
    """What is in use leaves too little of the cache."""


def local_copy(path: str) -> str:
    """A local file with the content that a file has now: itself, or a copy of one in a store.

    Copies lie in $MDR_STORE_CACHE (else ~/.cache/torchrec_mdr/store), at most $MDR_STORE_CACHE_GB (20) of them. Those
    used longest ago go first; those that a living process uses stay.

    Raises:
        ValueError: it cannot be read or copied, or does not fit into the cache.

    Example::

        >>> from torchrec_mdr.storage import read_text, write_text
        >>> write_text("memory://bucket/a.txt", "text")
        >>> read_text(local_copy("memory://bucket/a.txt"))
        'text'
    """
    return path if not is_store(path) else _copy(path)


@contextmanager
def borrowed_copy(path: str) -> Iterator[str]:
    """The same for a while: after the block the copy may go, where others want the room.

    Raises:
        ValueError: see :func:`local_copy`.
    """
    if not is_store(path):
        yield path
        return
    copy = _copy(path)
    try:
        yield copy
    finally:
        let_go(os.path.dirname(copy))


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A local folder for a while, beside the copies, but not within the cache's size.

    Raises:
        ValueError: it cannot be made.
    """
    root = _root()
    _copies(root)
    folder = os.path.join(root, f"{_SCRATCH}{uuid.uuid4().hex}")
    hold(folder)
    try:
        made = os.path.join(folder, "data")
        os.makedirs(made)
        yield made
    finally:
        remove_folder(folder)
        let_go(folder)


def cache_folder() -> str:
    """Where copies lie."""
    return os.path.abspath(os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or "~/.cache/torchrec_mdr/store"))


def cache_bytes() -> int:
    """How much they may take.

    Raises:
        ValueError: $MDR_STORE_CACHE_GB is no number above 0.
    """
    text = os.environ.get(SIZE_VARIABLE, str(DEFAULT_GB))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise ValueError(f"${SIZE_VARIABLE} is '{text}', not a number of gigabytes above 0")
    return int(found * 1e9)


def folder_of(path: str, version: str | None, *key: object) -> str:
    """The folder in the cache of what is made of a file.

    Args:
        path (str): of a store.
        version (str | None): its stamp; None is like no other.
        *key (object): tells from other things that are made of it.

    Raises:
        ValueError: the cache's folder cannot be made.
    """
    version = version or uuid.uuid4().hex
    return os.path.join(_root(), hashlib.sha256(repr((path, version, *key)).encode()).hexdigest()[:24])


def hold(folder: str) -> None:
    """Keeps a folder of the cache, which is made where it is not there, as long as this process uses it."""
    with _mutex:
        if folder not in _in_use:
            _in_use[folder] = _shared_lock(folder)
        _users[folder] += 1
    os.utime(folder)


def let_go(folder: str) -> None:
    """Ends one use of a folder."""
    with _mutex:
        _users[folder] -= 1
        if not _users[folder]:
            del _users[folder]
            _in_use.pop(folder).close()


def make_room(wanted: int, most: int) -> int:
    """Removes what nobody uses, the oldest first, until so many bytes are free.

    Args:
        wanted (int): bytes.
        most (int): that may be taken in all.

    Returns:
        int: bytes that are free then, perhaps fewer, or below 0.
    """
    found = sorted(_age_and_bytes(folder) for folder in _copies(_root()))
    free = most - sum(taken for _, taken, _ in found)
    for _, taken, folder in found:
        if free >= wanted:
            break
        if folder not in _in_use and _removed(folder):
            free += taken
    return free


def _copy(path: str) -> str:
    folder = folder_of(path, stamp(path))
    copy = os.path.join(folder, os.path.basename(path))
    try:
        hold(folder)
        try:
            # processes that want the same copy wait for the one that makes it
            with open(os.path.join(folder, _MAKING), "a") as making:
                fcntl.flock(making, fcntl.LOCK_EX)
                if not os.path.exists(copy):
                    _make(copy, path)
        except BaseException:
            let_go(folder)
            raise
    except OSError as error:
        raise ValueError(f"{path} cannot be copied to {copy}: {reason(error)}") from error
    return copy


def _make(copy: str, path: str) -> None:
    wanted = size(path)
    free = make_room(wanted, cache_bytes())
    if free < wanted:
        raise NoRoom(
            f"{path} has {wanted:,} bytes, and what is in use leaves {max(free, 0):,} of the cache in "
            f"{cache_folder()}; raise ${SIZE_VARIABLE} (now {cache_bytes() / 1e9:g})"
        )
    with open_read(path) as source, open(f"{copy}.writing", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 22)
    os.replace(f"{copy}.writing", copy)


def _copies(root: str) -> list[str]:
    """The cache's folders, without scratch folders; those that killed processes left are removed."""
    found = []
    for name in os.listdir(root):
        folder = os.path.join(root, name)
        if not name.startswith(_SCRATCH):
            found.append(folder)
        elif folder not in _in_use:
            _removed(folder)
    return found


def _root() -> str:
    root = cache_folder()
    make_folder(root, f"the cache of stores (${FOLDER_VARIABLE})")
    return root


def _shared_lock(folder: str) -> IO[str]:
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            lock = open(os.path.join(folder, _LOCK), "a")  # noqa: SIM115 - kept open
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.path.exists(lock.name) and os.stat(lock.name).st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
        lock.close()  # somebody has cleared the folder in between


def _age_and_bytes(folder: str) -> tuple[float, int, str]:
    """When a folder was last asked for, and the bytes on the disk of what lies in it."""
    used, taken = 0.0, 0
    try:
        used = os.stat(folder).st_mtime
        for where, _, names in os.walk(folder):
            taken += sum(os.stat(os.path.join(where, name)).st_blocks * 512 for name in names)
    except FileNotFoundError:
        pass  # gone by now
    return used, taken, folder


def _removed(folder: str) -> bool:
    """Removes a folder of the cache, where no process uses it."""
    try:
        with open(os.path.join(folder, _LOCK), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_folder(folder)
    except OSError:
        return False
    return True
