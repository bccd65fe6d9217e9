"""Prepared data sets are made once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict
from functools import cache
from typing import Any

from torchrec_mdr.data.datasets.base import Dataset
from torchrec_mdr.data.owners import is_dead, this_process
from torchrec_mdr.data.schema import SCHEMA_FILE, SPLITS
from torchrec_mdr.data.upload import OWNER_FILE, is_taken, lock_of, new_in_store, uploaded
from torchrec_mdr.data.writer import split_path
from torchrec_mdr.storage import (
    exclusive,
    exists,
    full_path,
    is_store,
    isdir,
    isfile,
    ls,
    make_folder,
    read_json,
    remove,
    remove_folder,
    size,
    stamp,
    write_json,
)

logger = logging.getLogger(__name__)

# raised whenever the same options and files give other prepared data, so that cached ones are made anew
_VERSION = 4


def prepared_folder(source: Dataset, name: str, output: str | None = None, cache_dir: str | None = None) -> str:
    """Gives the folder of a prepared data set, and makes it if it is not there yet.

    The cache's folders are named by data set, protocol, division and a hash of all options and of the source files'
    sizes and times. A folder appears under its name only when complete, so several processes may prepare the same data
    at once; in a store one of them does, and the others wait for it.

    Args:
        source (Dataset): the data set with its options.
        name (str): what it is called.
        output (str | None): a new folder to write, in place of one in the cache.
        cache_dir (str | None): the cache; None takes $MDR_CACHE, or else ~/.cache/torchrec_mdr.

    Returns:
        str: the folder.

    Raises:
        ValueError: source files that are missing or faulty, or a folder that cannot be written.

    Example::

        >>> import tempfile
        >>> from torchrec_mdr.data.datasets.synthetic import Synthetic
        >>> folder = prepared_folder(Synthetic(rows=1000, num_domains=5), "synthetic", cache_dir=tempfile.mkdtemp())
        >>> sorted(os.listdir(folder))
        ['schema.json', 'test.parquet', 'train.parquet', 'validation.parquet']
    """
    if output is not None:
        for path in source.sources:
            _check_there(path, source.origin)
        folder = new_folder(output)
        if is_store(folder):
            with new_in_store(folder, output) as made:
                source.write(made)
            return folder
    else:
        root = cache_root(cache_dir)
        folder = os.path.join(root, _cache_name(name, source))
        if _is_prepared(folder):
            return folder
        make_folder(root, "the cache folder ($MDR_CACHE)")
        if is_store(folder):
            with exclusive(lock_of(folder)) as hold:
                if not _is_prepared(folder):  # by another process, for which this one waited
                    with uploaded(folder, hold) as made:
                        source.write(made)
            return folder
        if isfile(os.path.join(folder, SCHEMA_FILE)):
            remove_folder(folder, first=SCHEMA_FILE)
    _write_whole(source, folder)
    return folder


def new_folder(output: str) -> str:
    """The full path of a folder that may be written; the one that it lies in is made.

    Raises:
        ValueError: it is in use, or cannot be made.
    """
    if not output:
        raise ValueError("--output is empty; name a new folder")
    folder = full_path(output)
    if is_store(folder):
        in_use = isfile(folder) or is_taken(folder)
    else:
        in_use = exists(folder) and (not isdir(folder) or bool(ls(folder)))
    if in_use:
        raise ValueError(f"the output folder {output} is in use; name a new or empty one")
    make_folder(os.path.dirname(folder), "the folder of --output")
    return folder


def cache_root(cache_dir: str | None = None) -> str:
    """The cache's folder: the one that is named, else $MDR_CACHE, else ~/.cache/torchrec_mdr."""
    return full_path(cache_dir or os.environ.get("MDR_CACHE") or "~/.cache/torchrec_mdr")


def _is_prepared(folder: str) -> bool:
    """Whether a folder of the cache is there and whole."""
    if not isfile(os.path.join(folder, SCHEMA_FILE)):
        return False
    lost = [split for split in SPLITS if not isfile(split_path(folder, split))]
    if lost:
        _tell("%s has lost its split '%s', and is prepared anew", folder, lost[0])
    return not lost


@cache
def _tell(sentence: str, *words: str) -> None:
    """Says a sentence once."""
    logger.warning(sentence, *words)


def _cache_name(name: str, source: Dataset) -> str:
    options: dict[str, Any] = asdict(source)
    files = [_version(path, source.origin) for path in source.sources]
    key = {"version": _VERSION, "options": options, "files": files}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return "-".join(part for part in (name, options.get("protocol"), options.get("division"), digest) if part)


def _version(path: str, origin: str) -> tuple[object, ...]:
    """What changes whenever a source file does."""
    _check_there(path, origin)
    if is_store(path):
        return size(path), stamp(path)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _check_there(path: str, origin: str) -> None:
    if not isfile(path):
        where = f", which come from {origin}" if origin else ""
        raise ValueError(f"the file {path} is missing; point --data_dir at the folder of the original files{where}")


def _write_whole(source: Dataset, folder: str) -> None:
    parent, name = os.path.split(folder)
    _remove_abandoned(parent)
    unfinished = os.path.join(parent, f".{name}.{uuid.uuid4().hex}")
    make_folder(unfinished, "the folder")
    owner = os.path.join(unfinished, OWNER_FILE)
    try:
        write_json(owner, this_process())
        source.write(unfinished)
        remove(owner)
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            # another process was quicker: its folder holds the same data
            if not isfile(os.path.join(folder, SCHEMA_FILE)):
                raise ValueError(f"{folder} exists but holds no prepared data; delete it and try again") from error
    finally:
        remove_folder(unfinished)


def _remove_abandoned(parent: str) -> None:
    """Removes what killed preparations on this machine have left in a folder."""
    for name in ls(parent):
        left = os.path.join(parent, name)
        try:
            if name.startswith(".") and isfile(os.path.join(left, OWNER_FILE)):
                if is_dead(read_json(os.path.join(left, OWNER_FILE))):
                    remove_folder(left)
        except ValueError:  # gone by now
            continue
