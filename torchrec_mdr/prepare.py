"""Makes a prepared data set: `python -m torchrec_mdr.prepare --dataset movielens-1m --data_dir DIR --output DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torchrec_mdr.data.datasets.base import COMMON_OPTIONS
from torchrec_mdr.registry import DATASETS
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence
from torchrec_mdr.training.datasets import open_dataset


def prepare(dataset: str, **options: Any) -> str:
    """The folder of a prepared data set, which is made on first use.

    Args:
        dataset (str): a name in `torchrec_mdr.registry.DATASETS`.
        **options (Any): `data_dir`, `division` and `protocol`; `output`, a new folder to write in place of one in the
            cache; `cache_dir`; and the data set's own options.

    Returns:
        str: the folder.

    Raises:
        ValueError: an unknown data set or option, or source files that are missing or faulty.

    Example::

        >>> import os, tempfile
        >>> folder = prepare("synthetic", cache_dir=tempfile.mkdtemp(), rows=1000, num_domains=5)
        >>> sorted(os.listdir(folder))
        ['schema.json', 'test.parquet', 'train.parquet', 'validation.parquet']
    """
    DATASETS.check(dataset, "--dataset")
    if options.get("division") is not None and "division" not in {field.name for field in fields(DATASETS[dataset])}:
        raise ValueError(f"data set '{dataset}' has no choice of its natural division; leave out --division")
    return open_dataset(dataset, **options)


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.prepare",
        description="Makes a prepared data set: a folder of Parquet files with schema.json.",
    )
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", type=str | None, help="folder of the original files")
    parser.add_argument("--division", type=str | None, help="the natural division, such as gender or age3")
    parser.add_argument("--protocol", type=str | None, help="how the data are labelled and split, such as multilora")
    parser.add_argument("--output", type=str | None, help="a new folder to write; by default one in the cache")
    for name in DATASETS:
        try:
            config = DATASETS[name]
        except ValueError:
            continue  # a package that cannot be imported concerns those who ask for its data set
        if {field.name for field in fields(config)}.difference(COMMON_OPTIONS):
            parser.add_class_arguments(config, name.replace("-", "_"), skip=set(COMMON_OPTIONS))
    read = vars(parser.parse_args(arguments).as_flat())
    common = {name: read[name] for name in ("dataset", "output", *COMMON_OPTIONS)}
    prefix = f"{common['dataset']}.".replace("-", "_")
    options = {name.removeprefix(prefix): value for name, value in read.items() if name.startswith(prefix)}
    print(prepare(**common, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
