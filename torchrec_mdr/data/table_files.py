"""Which files a table has: those that are named, and those of folders and globs, on disk or in a store."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torchrec_mdr.storage import files_below, full_path, is_store, isdir, isfile, located

_ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
KNOWN = ".parquet, .csv, .tsv, .jsonl, .ndjson or .json, all but the first also with .gz behind"


def find_files(text: str, option: str) -> tuple[list[str], str]:
    """The files that a path stands for, sorted by name, and the folder whose folders' names count (`day=3`).

    Args:
        text (str): a file, a folder or a glob.
        option (str): what names it, for errors.

    Raises:
        ValueError: there are none.
    """
    path = located(text)
    if isdir(path):
        files, root = _inside(path), path
        if not files:
            raise ValueError(f"{option}: the folder {text} holds no file to read, which ends with {KNOWN}")
        return files, root
    root = _fixed(path)
    if isfile(path):
        files = [path]
    elif is_store(path):
        pattern = path.removeprefix(f"{root}/").split("/")
        files = [f"{root}/{name}" for name in files_below(root) if _matches(name.split("/"), pattern)]
    else:
        found = sorted(glob.glob(path, recursive=True))
        files = [file for match in found for file in (_inside(match) if isdir(match) else [match])]
    if not files:
        raise ValueError(f"{option}: there is no file {text}; name files, folders or globs in quotes")
    return files, root


def kind_of(path: str) -> str | None:
    """What a file's name says that it holds: parquet, csv or json."""
    name = path.lower().removesuffix(".gz")
    return _ENDINGS.get(os.path.splitext(name)[1])


def refuse_input(output: str, inputs: Iterable[str]) -> None:
    """Raises ValueError where a file to write is one of those that are read."""
    if full_path(output) in map(full_path, inputs):
        raise ValueError(f"--output {output} is one of the files of --input; name another one, so that its rows stay")


def _inside(folder: str) -> list[str]:
    if is_store(folder):
        return [f"{folder}/{name}" for name in files_below(folder) if _is_wanted(name.split("/"))]
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] not in "._"]
        found += [os.path.join(where, name) for name in files if _is_wanted([name])]
    return sorted(found)


def _is_wanted(parts: Sequence[str]) -> bool:
    """Whether a file in a folder is read, by its names from there."""
    return all(name[0] not in "._" for name in parts) and kind_of(parts[-1]) is not None


def _fixed(pattern: str) -> str:
    """The folders of a path before its first wildcard."""
    parts = pattern.split(os.sep)
    until = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return os.sep.join(parts[:until])


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob takes a file of a store, itself or as one in a folder that it takes; as `glob` does on disk."""
    if not pattern:
        return not parts or _is_wanted(parts)
    if not parts:
        return False
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (parts[0][0] != "." and _matches(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
