"""Prepared data that go to an object store: made on the local disk, then copied, `schema.json` last."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from torchrec_mdr.data.owners import this_process
from torchrec_mdr.data.schema import SCHEMA_FILE
from torchrec_mdr.storage import (
    exclusive,
    files_below,
    put_file,
    remove,
    scratch_folder,
    size,
    write_json,
)
from torchrec_mdr.storage.mutex import Hold

OWNER_FILE = ".owner.json"  # of a folder that is being written
LOCK_FILE = ".lock"


def lock_of(folder: str) -> str:
    """The lock of a folder in a store, which whoever writes it holds."""
    return os.path.join(folder, LOCK_FILE)


def is_taken(folder: str) -> bool:
    """Whether something lies in a folder of a store that is not what a killed preparation left there."""
    found = set(files_below(folder)) - {LOCK_FILE}
    return bool(found) and (OWNER_FILE not in found or SCHEMA_FILE in found)


@contextmanager
def new_in_store(folder: str, output: str) -> Iterator[str]:
    """A local folder whose files lie in a new folder of a store after the block.

    Args:
        folder (str): the new folder.
        output (str): what it is called, for errors.

    Raises:
        ValueError: another process writes it, or it cannot be written.
    """
    busy = f"the output folder {output} is being written by another process; name another one"
    with exclusive(lock_of(folder), busy) as hold, uploaded(folder, hold) as made:
        if is_taken(folder):  # by a process that was quicker
            raise ValueError(f"the output folder {output} is in use; name a new or empty one")
        yield made


@contextmanager
def uploaded(folder: str, hold: Hold) -> Iterator[str]:
    """A local folder whose files replace those of a folder in a store after the block.

    The folder counts from its `schema.json` on, which comes last; so what a killed upload leaves is no prepared data.

    Args:
        folder (str): the folder in a store.
        hold (Hold): its lock.

    Raises:
        ValueError: it cannot be written, or the lock has become another's.
    """
    with scratch_folder() as made:
        yield made
        hold.check()
        remove(os.path.join(folder, SCHEMA_FILE))  # without it what is left does not count
        for name in set(files_below(folder)) - {LOCK_FILE}:
            remove(os.path.join(folder, name))
        write_json(os.path.join(folder, OWNER_FILE), this_process())
        names = sorted(files_below(made), key=lambda name: (name == SCHEMA_FILE, name))
        total = sum(size(os.path.join(made, name)) for name in names)
        with tqdm(total=total, desc=f"writing {folder}", unit="B", unit_scale=True, leave=False, delay=1) as bar:
            for name in names:
                if name == SCHEMA_FILE:
                    hold.check()
                put_file(os.path.join(made, name), os.path.join(folder, name), bar.update)
        remove(os.path.join(folder, OWNER_FILE))
