"""Text and JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchrec_mdr.storage.files import read_bytes, write_bytes


def read_text(path: str) -> str:
    """Reads a text file in UTF-8.

    Raises:
        ValueError: it cannot be read, or is in another encoding.
    """
    try:
        return read_bytes(path).decode("utf-8")
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
    write_bytes(path, text.encode())
