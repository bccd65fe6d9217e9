"""Some rows of a tensor in a distributed checkpoint, without the others: what DCP itself would read in whole."""

from __future__ import annotations

import mmap
import os
import zipfile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchrec_mdr.distributed.checkpoint_store import reader_of
from torchrec_mdr.storage import local_copy

_HEADER = 30  # bytes of a record's header in a zip file, before its name and its extra field


class StoredTensor:
    """A tensor of a checkpoint whose rows can be read one by one.

    Files are mapped into memory, those of a store by their copies on this node: what is not asked for is not read. They
    are not checked against their digests.

    Args:
        folder (str): the checkpoint.
        name (str): the tensor's name there.

    Raises:
        ValueError: the checkpoint has no such tensor, or a file of it is not what DCP writes.

    Example::

        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"table": torch.arange(6.0).view(3, 2)}, checkpoint_id=folder, no_dist=True)
        >>> StoredTensor(folder, "table").rows(1, 3).tolist()
        [[2.0, 3.0], [4.0, 5.0]]
        >>> StoredTensor(folder, "table").at(torch.tensor([2, 0])).tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """

    def __init__(self, folder: str, name: str) -> None:
        metadata = reader_of(folder).read_metadata()
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"checkpoint {folder} has no tensor '{name}'")
        self.size, self.dtype = entry.size, entry.properties.dtype
        self._pieces: list[tuple[tuple[int, ...], Tensor]] = []
        self._mappings: list[mmap.mmap] = []
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            path = local_copy(os.path.join(folder, place.relative_path))
            mapped = _mapped(path, place, tuple(chunk.sizes), self.dtype)
            self._pieces.append((tuple(chunk.offsets), torch.from_numpy(mapped)))
            if isinstance(mapped.base, mmap.mmap):
                self._mappings.append(mapped.base)

    def rows(self, first: int, last: int) -> Tensor:
        """A copy of the rows [first, last), in the type of the checkpoint."""
        found = torch.empty(last - first, *self.size[1:], dtype=self.dtype)
        for offsets, piece in self._pieces:
            begin, end = max(first, offsets[0]), min(last, offsets[0] + len(piece))
            if begin < end:
                columns = tuple(slice(o, o + s) for o, s in zip(offsets[1:], piece.shape[1:], strict=True))
                found[(slice(begin - first, end - first), *columns)] = piece[begin - offsets[0] : end - offsets[0]]
        return found

    def at(self, rows: Tensor) -> Tensor:
        """A copy of rows int64 [U], in the type of the checkpoint; of what is read, nothing stays in this process."""
        found = torch.empty(len(rows), *self.size[1:], dtype=self.dtype)
        for offsets, piece in self._pieces:
            here = ((rows >= offsets[0]) & (rows < offsets[0] + len(piece))).nonzero().flatten()
            own = found if not offsets[1:] else found.narrow(1, offsets[1], piece.shape[1])  # of a table by columns
            own[here] = piece[rows[here] - offsets[0]]
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)
        return found


def _mapped(path: str, place: Any, size: tuple[int, ...], dtype: torch.dtype) -> np.memmap[Any, Any]:
    """The tensor that torch.save wrote into a part of a file: the one record of numbers in a zip archive."""
    numbers = torch.empty(0, dtype=dtype).numpy().dtype
    try:
        with open(path, "rb") as file:
            start = place.offset + _record(file, place.offset, place.length, int(np.prod(size)) * numbers.itemsize)
        # copied where it is written to, which torch asks for
        mapped: np.memmap[Any, Any] = np.memmap(path, numbers, "c", start, size)
    except (OSError, ValueError, zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(
            f"{path} is not what torch.distributed.checkpoint writes ({error}); use another copy"
        ) from error
    return mapped


def _record(file: IO[bytes], offset: int, length: int, wanted: int) -> int:
    """Where a tensor's numbers begin, counted from the start of its archive."""
    with zipfile.ZipFile(_Part(file, offset, length)) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != wanted:
            raise ValueError(f"a record has {record.file_size} bytes, not {wanted}")
        start = record.header_offset
    file.seek(offset + start)
    header = file.read(_HEADER)
    return start + _HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Part:
    """A part of a file, as a file that zipfile can read."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        self.place = place + (0, self.place, self.length)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, count: int = -1) -> bytes:
        left = self.length - self.place
        self.file.seek(self.offset + self.place)
        found = self.file.read(left if count < 0 else min(count, left))
        self.place += len(found)
        return found
