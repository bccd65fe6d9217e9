"""Writes that depend on what is there; a store that knows conditions decides them itself."""

from __future__ import annotations

from torchrec_mdr.storage.files import exists, reason, write_bytes
from torchrec_mdr.storage.paths import handler, is_store


def create(path: str, content: bytes) -> bool:
    """Writes a file where there is none; gives whether it did.

    Two that do it at once: in a store that knows conditional writes (see :func:`can_create`) one of them succeeds.
    Elsewhere callers exclude each other.

    Raises:
        ValueError: it cannot be written.
    """
    if is_store(path) and can_create(path):
        try:
            return bool(handler(path).create(path, content))
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {reason(error)}") from error
    if exists(path):
        return False
    write_bytes(path, content)
    return True


def can_create(path: str) -> bool:
    """Whether the handler of a store's path has a write that fails where there is a file."""
    return hasattr(handler(path), "create")


def replace(path: str, content: bytes, before: str) -> bool:
    """Writes over a file that still has a stamp; gives whether it did, which only a store may deny.

    Callers exclude each other; this is for a process whose lock has run out without its knowing. On a disk, whose locks
    do not run out, and where a handler does not know the file's state, it writes.

    Args:
        path (str): the file.
        content (bytes): all of it.
        before (str): what :func:`stamp` gave when the file was read that this content takes the place of.

    Raises:
        ValueError: it cannot be written.
    """
    own = getattr(handler(path), "replace", None) if is_store(path) else None
    if own is None:
        write_bytes(path, content)
        return True
    try:
        return bool(own(path, content, before))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {reason(error)}") from error
