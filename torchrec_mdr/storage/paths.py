"""Paths, local or in an object store."""

from __future__ import annotations

import os
import re
from typing import Any

from iopath.common.file_io import PathManager

from torchrec_mdr.storage.handlers import handler_of

path_manager = PathManager()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_handlers: dict[str, Any] = {}


def is_store(path: str) -> bool:
    """Whether a path lies in an object store.

    Example::

        >>> is_store("s3://bucket/run"), is_store("runs/a")
        (True, False)
    """
    return _SCHEME.match(path) is not None


def handler(path: str) -> Any:
    """The iopath handler of a path in a store, registered on first use.

    Raises:
        ValueError: its scheme is unknown, or wants a package that is not installed.
    """
    match = _SCHEME.match(path)
    assert match is not None, path
    scheme = match[1].lower()
    if scheme not in _handlers:
        _handlers[scheme] = handler_of(scheme)
        path_manager.register_handler(_handlers[scheme], allow_override=True)
    return _handlers[scheme]


def manager(path: str) -> PathManager:
    """The manager of iopath, which knows the handler of a path from now on.

    Raises:
        ValueError: see :func:`handler`.
    """
    if is_store(path):
        handler(path)
    return path_manager


def located(path: str) -> str:
    """A path as the user means it: `~` is the home folder, and the scheme of a store is known.

    Nothing is asked of the store.

    Raises:
        ValueError: its scheme is unknown, or wants a package that is not installed; it names no bucket.

    Example::

        >>> located("runs/a"), located("~") == os.path.expanduser("~"), located("memory://a/b/")
        ('runs/a', True, 'memory://a/b')
    """
    path = os.fspath(path).removeprefix("file://")
    if not is_store(path):
        return os.path.expanduser(path)
    handler(path)
    scheme, _, rest = path.partition("://")
    if not rest.strip("/"):
        raise ValueError(f"{path} names no bucket; write {scheme}://BUCKET/FOLDER")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def missing_bucket(path: str) -> str | None:
    """The bucket of a path in a store, where the store says that there is none.

    Example::

        >>> missing_bucket("memory://nowhere/data"), missing_bucket("runs/a")
        ('memory://nowhere', None)
    """
    if not is_store(path):
        return None
    scheme, _, rest = path.partition("://")
    bucket = f"{scheme}://{rest.split('/')[0]}"
    try:
        return None if manager(bucket).exists(bucket) else bucket
    except OSError:  # who may read its files need not be let see the bucket
        return None


def full_path(path: str) -> str:
    """The same path from anywhere; raises what :func:`located` raises.

    Example::

        >>> full_path("memory://a/b"), full_path("a") == os.path.abspath("a")
        ('memory://a/b', True)
    """
    path = located(path)
    return path if is_store(path) else os.path.abspath(path)
