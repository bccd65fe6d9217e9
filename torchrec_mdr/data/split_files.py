"""The files of a split, wherever they lie: from an object store their parts come to the disk as they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_mdr.data.files import ArrowFile, Content, ParquetFile, SplitFile
from torchrec_mdr.data.writer import arrow_path, split_path
from torchrec_mdr.storage import NoRoom, PartialCopy, RangeFile, is_store, isfile, local_copy, ls, size

_AT_ONCE = 8  # footers


class StoredParquetFile(ParquetFile):
    """A Parquet file in a store.

    Its row groups are kept in the node's cache once they have been read, as far as there is room; beyond that, and
    where few of the columns are wanted, what is wanted is read from the store.
    """

    stored = True

    def fetch(self, group: int) -> Content:
        """See :class:`SplitFile`."""
        return None if self._copy.fetch(group) else self._copy.read(group)

    def _open(self) -> tuple[pa.Schema, list[int]]:
        self._length = size(self.path)
        found = super()._open()
        places = [self._place(group) for group in range(self._metadata.num_row_groups)]
        self._copy = PartialCopy(self.path, places, self._length)
        return found

    def _read(self, group: int, columns: list[str], content: Content) -> pa.Table:
        if content is None and (self._copy.has(group) or self._wants_most(group, columns)):
            local = self._copy.fetch(group)
            if local is not None:
                return self._file(local, self._metadata).read_row_group(group, columns)
        read = None
        if content is not None:
            first = self._copy.parts[group][0]

            def read(start: int, stop: int) -> bytes:
                return content[start - first : stop - first]

        source = RangeFile(self.path, self._length, read)
        options: dict[str, Any] = {"pre_buffer": True, "page_checksum_verification": True}
        return pq.ParquetFile(source, metadata=self._metadata, **options).read_row_group(group, columns)

    def _read_metadata(self) -> pq.FileMetaData:
        return pq.ParquetFile(RangeFile(self.path, self._length)).metadata

    def _place(self, group: int) -> tuple[int, int]:
        """A row group's bytes [start, stop) in the file."""
        columns = self._columns(group)
        starts = [
            column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            for column in columns
        ]
        ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
        return min(starts, default=0), max(ends, default=0)

    def _wants_most(self, group: int, names: Sequence[str]) -> bool:
        """Whether some columns are at least half of a row group."""
        sizes = {column.path_in_schema: column.total_compressed_size for column in self._columns(group)}
        # the path of a list's values has two parts more than its column's name
        wanted = sum(own for path, own in sizes.items() if path in names or path.rsplit(".", 2)[0] in names)
        return 2 * wanted >= sum(sizes.values())

    def _columns(self, group: int) -> list[pq.ColumnChunkMetaData]:
        found = self._metadata.row_group(group)
        return [found.column(place) for place in range(found.num_columns)]


class StoredArrowFile(ArrowFile):
    """An Arrow IPC file in a store: copied whole into the node's cache, or read by ranges where that has no room."""

    stored = True

    def _source(self) -> Any:
        try:
            return pa.OSFile(local_copy(self.path))
        except NoRoom:
            return pa.PythonFile(RangeFile(self.path), "r")


def open_split(folder: str, split: str) -> list[SplitFile]:
    """The files of a split: `SPLIT.parquet`, a folder of that name or `SPLIT` of several, or `SPLIT.arrow`.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    single, arrow = split_path(folder, split), arrow_path(folder, split)
    if isfile(single):
        return _opened([single])
    if isfile(arrow):
        return [StoredArrowFile(arrow) if is_store(arrow) else ArrowFile(arrow)]
    for parts in (f"{folder}/{split}", single):
        found = [name for name in ls(parts) if name.endswith(".parquet")]
        if found:
            return _opened([f"{parts}/{name}" for name in found])
    raise ValueError(f"{folder} has neither {split}.parquet nor Parquet files in {split}/; put the split there")


def _opened(paths: Sequence[str]) -> list[SplitFile]:
    if not is_store(paths[0]):
        return [ParquetFile(path) for path in paths]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # each takes a few requests
        return list(pool.map(StoredParquetFile, paths))
