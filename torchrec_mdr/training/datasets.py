"""From a data set's name to its prepared folder."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torchrec_mdr.data.cache import prepared_folder
from torchrec_mdr.data.datasets.base import COMMON_OPTIONS, Dataset
from torchrec_mdr.registry import DATASETS
from torchrec_mdr.storage import isfile, located

FOLDER_HINT = "; a folder of prepared data is named with a slash in it"


def is_folder(dataset: str) -> bool:
    """Whether a data set is named as a folder of prepared data: with a slash in it."""
    return dataset not in DATASETS and "/" in dataset


def open_dataset(dataset: str, *, output: str | None = None, cache_dir: str | None = None, **options: Any) -> str:
    """The folder of a data set, prepared on first use.

    Args:
        dataset (str): a name in `DATASETS`, or a folder of prepared data, which has a slash in its name.
        output (str | None): a new folder to write, in place of one in the cache.
        cache_dir (str | None): the cache; see :func:`prepared_folder`.
        **options (Any): the data set's options. One of `data_dir`, `division` and `protocol` that is None takes the
            data set's default.

    Returns:
        str: the folder.

    Raises:
        ValueError: an unknown data set or option, or source files that are missing or faulty.
    """
    if isfile(located(dataset)):
        raise ValueError(
            f"{dataset} is a file, and --dataset takes a folder of prepared data; make one of it: python -m "
            f"torchrec_mdr.prepare --input {dataset} --label COLUMN --domain COLUMN --output FOLDER"
        )
    if is_folder(dataset):
        for name in ("data_dir", "protocol"):
            if options.get(name) is not None:
                raise ValueError(f"{dataset} is prepared already; leave out --{name}")
        return located(dataset)
    return prepared_folder(make_dataset(dataset, **options), dataset, output, cache_dir)


def make_dataset(dataset: str, **options: Any) -> Dataset:
    """A data set by name, with its options; see :func:`open_dataset`."""
    DATASETS.check(dataset, "--dataset", FOLDER_HINT)
    kind = DATASETS[dataset]
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in options.items() if name not in COMMON_OPTIONS or value is not None}
    for name in given:
        if name == "data_dir" and name not in known:
            raise ValueError(f"data set '{dataset}' is made here and reads no files; leave out --data_dir")
        if name not in known and name not in COMMON_OPTIONS:
            listed = ", ".join(sorted(known.difference(COMMON_OPTIONS))) or "none"
            raise ValueError(f"data set '{dataset}' has no option '{name}'; it has {listed}")
    if "protocol" in given and "protocol" not in known:
        raise ValueError(f"data set '{dataset}' is labelled and split in one way only; leave out --protocol")
    if "data_dir" in known:
        if not given.get("data_dir"):
            raise ValueError(f"data set '{dataset}' is read from its original files; name their folder with --data_dir")
        given["data_dir"] = located(given["data_dir"])
    made: Dataset = kind(**{name: value for name, value in given.items() if name in known})
    return made
