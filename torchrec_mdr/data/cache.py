"""Prepared data sets are made once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict
from typing import Any

from torchrec_mdr.data.datasets.base import Dataset
from torchrec_mdr.data.schema import SCHEMA_FILE
from torchrec_mdr.storage import expand, make_folder, path_manager

# raised whenever the same options and files give other prepared data, so that cached ones are made anew
_VERSION = 3


def prepared_folder(source: Dataset, name: str, output: str | None = None, cache_dir: str | None = None) -> str:
    """Gives the folder of a prepared data set, and makes it if it is not there yet.

    The cache's folders are named by data set, protocol, division and a hash of all options and of the source files'
    sizes and times. A folder appears under its name only when complete, so several processes may prepare the same data
    at once.

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
        if not output:
            raise ValueError("--output is empty; leave it out, or name a folder")
        folder = os.path.abspath(expand(output))
        if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise ValueError(f"the output folder {output} is in use; name a new or empty one")
        make_folder(os.path.dirname(folder), "the folder of --output")
    else:
        root = os.path.abspath(expand(cache_dir or os.environ.get("MDR_CACHE") or "~/.cache/torchrec_mdr"))
        folder = os.path.join(root, _cache_name(name, source))
        if os.path.exists(os.path.join(folder, SCHEMA_FILE)):
            return folder
        make_folder(root, "the cache folder ($MDR_CACHE)")
    _write_whole(source, folder)
    return folder


def _cache_name(name: str, source: Dataset) -> str:
    options: dict[str, Any] = asdict(source)
    stats = [os.stat(_local(path)) for path in source.sources]
    key = {"version": _VERSION, "options": options, "files": [(stat.st_size, stat.st_mtime_ns) for stat in stats]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return "-".join(part for part in (name, options.get("protocol"), options.get("division"), digest) if part)


def _local(path: str) -> str:
    if not path_manager.isfile(path):
        raise ValueError(f"the file {path} is missing; point --data_dir at the folder of the original files")
    local: str = path_manager.get_local_path(path)
    return local


def _write_whole(source: Dataset, folder: str) -> None:
    parent, name = os.path.split(folder)
    unfinished = os.path.join(parent, f".{name}.{uuid.uuid4().hex}")
    os.makedirs(unfinished)
    try:
        source.write(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            # another process was quicker: its folder holds the same data
            if not os.path.exists(os.path.join(folder, SCHEMA_FILE)):
                raise ValueError(f"{folder} exists but holds no prepared data; delete it and try again") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
