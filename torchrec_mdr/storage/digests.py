"""Digests of a folder's files, which tell whether these are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping

from torchrec_mdr.storage.files import exists, isdir, isfile, open_read
from torchrec_mdr.storage.handlers import StoreFails
from torchrec_mdr.storage.paths import is_store
from torchrec_mdr.storage.texts import read_json, write_json

DIGESTS_FILE = "digests.json"


def is_whole(folder: str) -> bool:
    """Whether a folder whose digests are written last, like a checkpoint's, is there and finished.

    On a disk it is: it got its name by a rename. In a store it counts from its `digests.json` on.
    """
    return isfile(os.path.join(folder, DIGESTS_FILE)) if is_store(folder) else isdir(folder)


def digest_of(path: str) -> str:
    """SHA-256 of a file, read piece by piece, as `sha256sum` prints it.

    Raises:
        ValueError: it cannot be read.
    """
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_digests(folder: str, digests: Mapping[str, str]) -> None:
    """Writes `digests.json`, which keeps the digests of a folder's files and one of these.

    Raises:
        ValueError: it cannot be written.
    """
    write_json(os.path.join(folder, DIGESTS_FILE), {"sha256": dict(digests), "of_these": _digest_of_digests(digests)})


def read_digests(folder: str) -> dict[str, str] | None:
    """The digests of a folder's files by name; None where it keeps none.

    Raises:
        ValueError: `digests.json` cannot be read, or is not what was written.
    """
    path = os.path.join(folder, DIGESTS_FILE)
    if not exists(path):
        return None
    content = read_json(path)
    digests = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(digests, dict) or content.get("of_these") != _digest_of_digests(digests):
        raise ValueError(f"{path} is damaged: it is not what was written")
    return digests


def damaged_files(folder: str, digests: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Which of a folder's files are not what was written: a sentence each; names without a digest are passed over.

    Raises:
        StoreFails: their store does, so that they may be sound.

    Example::

        >>> damaged_files("runs/a", {"config.yaml": "0" * 64}, ["config.yaml"])
        ['runs/a/config.yaml cannot be read: No such file or directory']
    """
    wrong = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            if name in digests and digest_of(path) != digests[name]:
                wrong.append(f"{path} is damaged: it is not what was written")
        except StoreFails:
            raise
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def _digest_of_digests(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
