"""Makes prepared data sets and keeps them in a cache; a command, ``python -m torchrec_mdr.data.prepare``, too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

from torchrec_mdr.data.datasets.movielens import MovieLens1M, MovieLens100K
from torchrec_mdr.data.datasets.synthetic import SyntheticConfig
from torchrec_mdr.data.schema import SCHEMA_FILE, path_manager

DATASETS: dict[str, type] = {
    "synthetic": SyntheticConfig,
    "movielens-1m": MovieLens1M,
    "movielens-100k": MovieLens100K,
}
COMMON_OPTIONS = ("data_dir", "division", "protocol")
# raised whenever the same options and files give other prepared data, so that cached ones are made anew
_VERSION = 2


class Dataset(Protocol):
    """What an entry of `DATASETS` is: a frozen dataclass of options that can write the data set."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the files that the data set is made from."""

    def write(self, folder: str) -> None:
        """Writes the splits and `schema.json` into an existing folder."""


def prepare(
    dataset: str,
    *,
    data_dir: str | None = None,
    division: str | None = None,
    protocol: str | None = None,
    output: str | None = None,
    cache_dir: str | None = None,
    **options: Any,
) -> str:
    """Gives the folder of a prepared data set, and makes it if it is not there yet.

    The cache's folders are named by data set, protocol, division and a hash of all options and of the source files'
    sizes and times. A folder appears under its name only when complete, so several processes may prepare the same data
    at once.

    Args:
        dataset (str): a key of `DATASETS`.
        data_dir (str | None): folder of the original files; for data sets that are read from files.
        division (str | None): the natural division; None takes the data set's default.
        protocol (str | None): `multilora` or `mlora` for MovieLens; None takes the data set's default. A data set that
            knows no protocols takes no notice of it.
        output (str | None): a new folder to write, in place of one in the cache.
        cache_dir (str | None): the cache; None takes $MDR_CACHE, or else ~/.cache/torchrec_mdr.
        **options (Any): further options of the data set, such as those of `SyntheticConfig`.

    Returns:
        str: the folder.

    Raises:
        ValueError: an unknown data set or option, or source files that are missing or faulty.

    Example::

        >>> import tempfile
        >>> folder = prepare("synthetic", cache_dir=tempfile.mkdtemp(), rows=1000, num_domains=5)
        >>> sorted(os.listdir(folder))
        ['schema.json', 'test.parquet', 'train.parquet', 'validation.parquet']
    """
    source = _configure(dataset, options, data_dir=data_dir, division=division, protocol=protocol)
    if output is not None:
        if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
            raise ValueError(f"the output folder {output} is in use; name a new or empty one")
        folder = os.path.abspath(output)
    else:
        root = cache_dir or os.environ.get("MDR_CACHE") or os.path.expanduser("~/.cache/torchrec_mdr")
        folder = os.path.join(os.path.abspath(root), _cache_name(dataset, source))
        if os.path.exists(os.path.join(folder, SCHEMA_FILE)):
            return folder
    _write_whole(source, folder)
    return folder


def _configure(dataset: str, options: dict[str, Any], **common: str | None) -> Dataset:
    if dataset not in DATASETS:
        raise ValueError(f"there is no data set '{dataset}'; choose one of {', '.join(DATASETS)}")
    known = {field.name for field in fields(DATASETS[dataset])}
    for name in options:
        if name not in known:
            listed = ", ".join(sorted(known.difference(COMMON_OPTIONS))) or "none"
            raise ValueError(f"data set '{dataset}' has no option '{name}'; it has {listed}")
    if "data_dir" in known and common["data_dir"] is None:
        raise ValueError(f"data set '{dataset}' is read from its original files; name their folder with --data_dir")
    if "data_dir" not in known and common["data_dir"] is not None:
        raise ValueError(f"data set '{dataset}' is generated; leave out --data_dir")
    given = {name: value for name, value in common.items() if name in known and value is not None}
    result: Dataset = DATASETS[dataset](**options, **given)
    return result


def _cache_name(dataset: str, source: Dataset) -> str:
    options = asdict(source)  # type: ignore[call-overload]
    stats = [os.stat(_local(path)) for path in source.sources]
    key = {"version": _VERSION, "options": options, "files": [(stat.st_size, stat.st_mtime_ns) for stat in stats]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return "-".join(part for part in (dataset, options.get("protocol"), options["division"], digest) if part)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m torchrec_mdr.data.prepare",
        description="Makes a prepared data set: a folder of Parquet files with schema.json.",
    )
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", type=str | None, help="folder of the original files")
    parser.add_argument("--division", type=str | None, help="the natural division, such as gender or age3")
    parser.add_argument("--protocol", type=str | None, help="multilora or mlora")
    parser.add_argument("--output", type=str | None, help="a new folder to write; by default one in the cache")
    for name, config in DATASETS.items():
        if {field.name for field in fields(config)}.difference(COMMON_OPTIONS):
            parser.add_class_arguments(config, name.replace("-", "_"), skip=set(COMMON_OPTIONS))
    arguments_read = vars(parser.parse_args(arguments).as_flat())
    common = {name: arguments_read[name] for name in ("dataset", "output", *COMMON_OPTIONS)}
    prefix = f"{common['dataset']}.".replace("-", "_")
    options = {name.removeprefix(prefix): v for name, v in arguments_read.items() if name.startswith(prefix)}
    try:
        print(prepare(**common, **options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
