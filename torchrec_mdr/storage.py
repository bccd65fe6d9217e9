"""The one door to files: paths, reading, and writing that leaves a file whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from iopath.common.file_io import PathManager

path_manager = PathManager()


def expand(path: str) -> str:
    """A path as the user means it: `~` is the home folder.

    Example::

        >>> expand("runs/a"), expand("~") == os.path.expanduser("~")
        ('runs/a', True)
    """
    return os.path.expanduser(path)


def read_text(path: str) -> str:
    """Reads a text file in UTF-8.

    Raises:
        ValueError: it cannot be read, or is in another encoding.
    """
    try:
        with path_manager.open(path, "rb") as file:
            content: bytes = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def read_json(path: str) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: it cannot be read, or is not valid JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file such that it is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2))


def write_text(path: str, text: str) -> None:
    """Writes a text file, in UTF-8, such that it is there whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = f"{path}.writing"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {_reason(error)}") from error


def make_folder(path: str, option: str) -> None:
    """Makes a folder, and those above it.

    Args:
        path (str): the folder; may exist.
        option (str): the option that names it, for the error.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be made: {_reason(error)}; name another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written to; name another folder")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
