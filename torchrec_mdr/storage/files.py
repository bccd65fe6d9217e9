"""Reading, writing that leaves a file whole or not there, and folders; on disk or in an object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

from torchrec_mdr.storage.handlers import StoreFails
from torchrec_mdr.storage.paths import handler, is_store, manager

_AT_ONCE = 8  # files that are copied to a store at a time


def exists(path: str) -> bool:
    """Whether there is a file or folder, or a link that leads nowhere."""
    return bool(_ask(manager(path).exists, path)) if is_store(path) else os.path.lexists(path)


def isfile(path: str) -> bool:
    """Whether there is a file."""
    return bool(_ask(manager(path).isfile, path)) if is_store(path) else os.path.isfile(path)


def isdir(path: str) -> bool:
    """Whether there is a folder; in a store, whether files lie below."""
    return bool(_ask(manager(path).isdir, path)) if is_store(path) else os.path.isdir(path)


def ls(folder: str) -> list[str]:
    """Names in a folder, sorted; none where it is not there.

    Raises:
        ValueError: it cannot be read.
    """
    if not is_store(folder) and not isdir(folder):
        return []
    try:
        found = _ask(manager(folder).ls, folder)
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return sorted(name.rstrip("/").rpartition("/")[2] for name in found)


def files_below(folder: str) -> list[str]:
    """Files in a folder and in those inside it, by their names from there, sorted; none where it is not there.

    Raises:
        ValueError: it cannot be read.
    """
    own = getattr(handler(folder), "find", None) if is_store(folder) else None
    if own is not None:
        return list(_ask(own, folder))
    found = []
    for name in ls(folder):
        path = os.path.join(folder, name)
        found += [f"{name}/{inner}" for inner in files_below(path)] if isdir(path) else [name]
    return sorted(found)


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        ValueError: it cannot be read.
    """
    if not is_store(path):
        return int(_ask(os.path.getsize, path))
    own = getattr(handler(path), "size", None)
    if own is not None:
        return int(_ask(own, path))
    with open_read(path) as file:
        return file.seek(0, os.SEEK_END)


def stamp(path: str) -> str | None:
    """What changes whenever a file is replaced; None where its store cannot tell.

    Raises:
        ValueError: it cannot be read.
    """
    if not is_store(path):
        found = _ask(os.stat, path)
        return repr((found.st_mtime_ns, found.st_ino, found.st_size))
    own = getattr(handler(path), "stamp", None)
    return None if own is None else str(_ask(own, path))


@contextmanager
def open_read(path: str) -> Iterator[BinaryIO]:
    """Opens a file to read bytes.

    Raises:
        ValueError: it cannot be read, now or within the block.
    """
    try:
        with manager(path).open(path, "rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; what lies around them is not read.

    Raises:
        ValueError: they cannot be read, or are not all there.
    """
    own = getattr(handler(path), "read_range", None) if is_store(path) else None
    if own is not None:
        content = bytes(_ask(lambda path: own(path, start, stop), path))
    else:
        with open_read(path) as file:
            file.seek(start)
            content = file.read(stop - start)
    if len(content) != stop - start:
        raise ValueError(f"{path} cannot be read: of bytes {start} to {stop} only {len(content)} came")
    return content


def read_bytes(path: str) -> bytes:
    """Reads a file; of one that is being replaced, the content before or after.

    Raises:
        ValueError: it cannot be read.
    """
    own = getattr(handler(path), "read", None) if is_store(path) else None
    if own is not None:
        return bytes(_ask(own, path))
    with open_read(path) as file:
        return file.read()


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file such that it is there whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    with open_write(path) as file:
        file.write(content)


@contextmanager
def open_write(path: str) -> Iterator[BinaryIO]:
    """Opens a file to write bytes; it is there, whole, when the block has ended without an error.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        if is_store(path):
            with manager(path).open(path, "wb") as file:
                yield file
            return
        temporary = f"{path}.writing"
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {reason(error)}") from error


def put_file(local: str, path: str, told: Callable[[int], object] | None = None) -> None:
    """Copies a local file to a path, where it is whole or not there.

    Args:
        local (str): the file.
        path (str): where it goes.
        told (Callable[[int], object] | None): is told how many bytes each piece had.

    Raises:
        ValueError: it cannot be read or written.
    """
    with open_read(local) as source, open_write(path) as target:
        while piece := source.read(1 << 22):
            target.write(piece)
            if told is not None:
                told(len(piece))


def put_folder(local: str, folder: str, last: str) -> None:
    """Copies all files of a local folder to another, several at a time where that is in a store.

    Args:
        local (str): the folder.
        folder (str): where they go.
        last (str): the file that is written last: what is there counts from it on.

    Raises:
        ValueError: they cannot be read or written.
    """
    found = [os.path.relpath(os.path.join(where, name), local) for where, _, names in os.walk(local) for name in names]

    def put(name: str) -> None:
        target = os.path.join(folder, name)
        make_folder(os.path.dirname(target), "the folder")
        put_file(os.path.join(local, name), target)

    names = sorted(name for name in found if name != last)
    with ThreadPoolExecutor(_AT_ONCE if is_store(folder) else 1) as pool:
        for begin in range(0, len(names), 1024):  # what fails ends it soon
            list(pool.map(put, names[begin : begin + 1024]))
    if last in found:
        put(last)


def make_folder(path: str, option: str) -> None:
    """Makes a folder, and those above it; in a store there is nothing to make.

    Args:
        path (str): the folder; may exist.
        option (str): the option that names it, for the error.

    Raises:
        ValueError: it cannot be made or written to.
    """
    if is_store(path):
        manager(path)
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be made: {reason(error)}; name another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written to; name another folder")


def remove(path: str) -> None:
    """Removes a file, where it is there.

    Raises:
        ValueError: it cannot be removed.
    """
    try:
        manager(path).rm(path) if is_store(path) else os.remove(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{path} cannot be removed: {reason(error)}") from error


def remove_folder(folder: str, first: str | None = None) -> None:
    """Removes a folder with all that is in it, where it is there.

    Args:
        folder (str): the folder.
        first (str | None): the file of it that goes first: without it what is left does not count.

    Raises:
        ValueError: it cannot be removed; on disk what cannot is left.
    """
    if first is not None:
        remove(os.path.join(folder, first))
    if not is_store(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in files_below(folder):
        remove(os.path.join(folder, name))


def reason(error: OSError) -> str:
    """What an error says, without its number and path."""
    return error.strerror or str(error)


def _ask(question: Callable[[str], Any], path: str) -> Any:
    try:
        return question(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ValueError:
    fails = is_store(path) and not isinstance(error, FileNotFoundError)
    return (StoreFails if fails else ValueError)(f"{path} cannot be read: {reason(error)}")
