"""Files of a distributed checkpoint in an object store: DCP writes and reads them through the door."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.futures import Future

from torchrec_mdr.storage import (
    DIGESTS_FILE,
    exists,
    is_store,
    open_read,
    open_write,
    read_bytes,
    remove,
    remove_folder,
)

PIECE = 1 << 23  # bytes handed on at once, so that no second copy of a tensor is held
WHOLE = 1 << 26  # a stored tensor up to so many bytes is read in one request


class StoreWriter(FileSystemWriter):
    """Writes a checkpoint into a store, and knows the digests of what this rank has written.

    Args:
        folder (str): the checkpoint's.
        attempt (str): a part of the names of files with tensors, so that what an earlier attempt still sends meets none
            of this one's.
    """

    def __init__(self, folder: str, attempt: str) -> None:
        super().__init__(folder, sync_files=False)
        self.attempt = attempt
        files = StoreFiles()
        self.fs, self.path = files, files.init_path(folder)  # type: ignore[assignment]
        self.digests = files.digests  # of this rank's files, by name

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See StorageWriter."""
        planned = super().prepare_global_plan(plans)
        for plan in planned:
            plan.storage_data.prefix += f"{self.attempt}_"
        return planned


class StoreReader(FileSystemReader):
    """Reads a checkpoint in a store, each tensor by the range of bytes that it takes."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        files = StoreFiles()
        self.fs, self.path = files, files.init_path(folder)  # type: ignore[assignment]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See StorageReader; in the files' order, so that what is read ahead is what comes next."""
        items = sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset)
        return super().read_data(replace(plan, items=items), planner)

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        if sinfo.length > WHOLE:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def reader_of(folder: str) -> FileSystemReader:
    """What reads a checkpoint, wherever it lies."""
    return StoreReader(folder) if is_store(folder) else FileSystemReader(folder)


def remove_checkpoint(folder: str) -> None:
    """Removes a checkpoint, or what is left of one; in a store such that it does not count from the first moment on.

    Raises:
        ValueError: it cannot be removed from its store.
    """
    remove_folder(folder, first=DIGESTS_FILE if is_store(folder) else None)


class StoreFiles(FileSystemBase):
    """What DCP asks of a file system; digests are made while files are written."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Opens a file to be read, or to be written whole."""
        path = os.fspath(path)
        if mode == "rb":
            with open_read(path) as file:
                yield file  # type: ignore[misc]
            return
        with open_write(path) as file:
            stream = _Digested(file)
            yield stream
        self.digests[os.path.basename(path)] = stream.sha256.hexdigest()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """The path of a file in a folder."""
        return os.path.join(os.fspath(path), suffix)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """A folder's path, as it is."""
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Copies a small file, DCP's index, and removes the old one: a store has no rename."""
        path, new_path = os.fspath(path), os.fspath(new_path)
        with self.create_stream(new_path, "wb") as file:
            file.write(read_bytes(path))
        remove(path)
        self.digests.pop(os.path.basename(path), None)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """A store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path lies in a store."""
        return is_store(os.fspath(checkpoint_id))

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is a file."""
        return exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Removes a file."""
        remove(os.fspath(path))


class _Digested(io.RawIOBase):
    """Hands on what is written, and makes its digest; who has opened the file closes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._written = file, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self.sha256.update(piece)
            self._file.write(piece)
        self._written += len(view)
        return len(view)
