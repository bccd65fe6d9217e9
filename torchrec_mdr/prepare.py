"""Makes a prepared data set: of a public one by its name, or of one's own rows in Parquet, CSV or JSON lines."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torchrec_mdr.data.datasets.base import COMMON_OPTIONS
from torchrec_mdr.registry import DATASETS
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence
from torchrec_mdr.training.datasets import open_dataset

try:
    from torchrec_mdr.data.importing.listing import listing
    from torchrec_mdr.data.importing.options import ImportOptions
    from torchrec_mdr.data.importing.prepare import import_rows
    from torchrec_mdr.report.data_page import PAGE_FILE, write_page
except ImportError as error:  # own rows are read by a library that not all installations have
    _missing: ImportError | None = error
else:
    _missing = None


# options that take several words, and flags
_FILES = {
    "input": "files, folders or globs of rows: Parquet, CSV or JSON lines, also with .gz behind",
    "validation_input": "the same for validation rows, where they are in files of their own",
    "test_input": "the same for test rows",
    "share": "groups of columns that share a vocabulary: user_a,user_b",
}


def prepare(dataset: str | None = None, *, input: Any = None, **options: Any) -> str:
    """The folder of a prepared data set: a public one, which is made on first use, or one's own rows.

    Args:
        dataset (str | None): a name in `torchrec_mdr.registry.DATASETS`.
        input (Any): instead, own rows: a polars or pandas frame, a path, or a list of paths.
        **options (Any): of a public data set: `data_dir`, `division` and `protocol`; `output`, a new folder to write
            in place of one in the cache; `cache_dir`; and the data set's own options. Of own rows: `output`, and what
            :class:`torchrec_mdr.data.importing.options.ImportOptions` lists.

    Returns:
        str: the folder.

    Raises:
        ValueError: an unknown data set or option, or source files that are missing or faulty.

    Example::

        >>> import os, tempfile
        >>> folder = prepare("synthetic", cache_dir=tempfile.mkdtemp(), rows=1000, num_domains=5)
        >>> sorted(os.listdir(folder))
        ['schema.json', 'test.parquet', 'train.parquet', 'validation.parquet']

        >>> import polars as pl
        >>> clicks = {"shop": ["Oslo", "Rome"] * 500, "item": list(range(10)) * 100, "clicked": [0, 1, 1, 0] * 250}
        >>> output = f"{tempfile.mkdtemp()}/clicks"
        >>> folder = prepare(input=pl.DataFrame(clicks), label="clicked", domain="shop", output=output)
        >>> sorted(os.listdir(folder))
        ['features.yaml', 'schema.json', 'test.parquet', 'train.parquet', 'validation.parquet', 'vocabularies.parquet']
    """
    if input is not None:
        if dataset is not None:
            raise ValueError("a data set and input are given; give one of them")
        return _own(input, options)
    DATASETS.check(dataset, "--dataset")
    assert dataset is not None
    if options.get("division") is not None and "division" not in {field.name for field in fields(DATASETS[dataset])}:
        raise ValueError(f"data set '{dataset}' has no choice of its natural division; leave out --division")
    return open_dataset(dataset, **options)


def _own(rows: Any, options: dict[str, Any], show: bool = False) -> str:
    _check_installed()
    output = options.pop("output", None)
    if output is None:
        raise ValueError("--output is missing; name a new folder for the prepared rows")
    known = {field.name for field in fields(ImportOptions)}
    for name in options:
        if name not in known:
            raise ValueError(f"there is no option '{name}' for rows of one's own; there are {', '.join(sorted(known))}")
    listed = rows if isinstance(rows, list | tuple) else [rows]
    is_path = all(isinstance(path, str | os.PathLike) for path in listed)
    paths = [os.fspath(path) for path in listed] if is_path else []
    imported = import_rows(ImportOptions(**{**options, "input": paths}), output, None if is_path else rows, show)
    if options.get("report"):
        write_page(imported)
    if show:
        shown = output.rstrip("/") if "/" in output.rstrip("/") else f"./{output.rstrip('/')}"
        print(listing(imported))
        if options.get("report"):
            print(f"report: {shown}/{PAGE_FILE}")
        print(f"train on it: python -m torchrec_mdr.train --dataset {shlex.quote(f'{shown}/')}")
    return imported.folder


def _check_installed() -> None:
    if _missing is not None:
        raise ValueError(f"own rows cannot be read: {_missing}; install what reads them: pip install '.[data]'")


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.prepare",
        description="Makes a prepared data set, a folder of Parquet files with schema.json: of a public one by its "
        "name (--dataset), or of rows of one's own (--input, --label, --domain, --output).",
    )
    parser.add_argument("--dataset", type=str | None, help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", type=str | None, help="folder of the original files")
    parser.add_argument("--division", type=str | None, help="the natural division, such as gender or age3")
    parser.add_argument("--protocol", type=str | None, help="how the data are labelled and split, such as multilora")
    parser.add_argument("--output", type=str | None, help="a new folder to write; by default one in the cache")
    own: set[str] = set()
    if _missing is None:
        for name, what in _FILES.items():
            parser.add_argument(f"--{name}", nargs="+", default=[], help=what)
        parser.add_argument("--report", action="store_true", help="write report.html into the output folder")
        parser.add_class_arguments(ImportOptions, as_group=True, skip={*_FILES, "report"})
        own = {field.name for field in fields(ImportOptions)}
    for name in DATASETS:
        try:
            config = DATASETS[name]
        except ValueError:
            continue  # a package that cannot be imported concerns those who ask for its data set
        if {field.name for field in fields(config)}.difference(COMMON_OPTIONS):
            parser.add_class_arguments(config, name.replace("-", "_"), skip=set(COMMON_OPTIONS))
    read = vars(parser.parse_args(arguments).as_flat())
    if read["dataset"] is None:
        _check_installed()
        if not read["input"]:
            raise ValueError(
                "name your own rows with --input, or a public data set with --dataset (all options: --help)"
            )
        for name in COMMON_OPTIONS:
            if read[name] is not None:
                raise ValueError(f"--{name} belongs to --dataset; leave it out")
        options = {name: read[name] for name in ("output", *own)}
        _own(options.pop("input"), options, show=True)
    else:
        given = [name for name in own if read[name] != getattr(ImportOptions(), name)]
        if given:
            raise ValueError(f"--{given[0]} belongs to --input; leave it out, or leave out --dataset")
        common = {name: read[name] for name in ("dataset", "output", *COMMON_OPTIONS)}
        prefix = f"{common['dataset']}.".replace("-", "_")
        options = {name.removeprefix(prefix): value for name, value in read.items() if name.startswith(prefix)}
        print(prepare(**common, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
