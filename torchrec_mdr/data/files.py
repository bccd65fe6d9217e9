"""Files of a split on disk, Parquet or Arrow IPC, in groups of rows that are read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ANEW = "write it anew"
Content = bytes | None  # of a row group, where it is in memory


class SplitFile(ABC):
    """One file of a split.

    Args:
        path (str): the file.

    Raises:
        ValueError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.schema, self.group_rows = self._open()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} is no readable {self.kind} file ({_line(error)}); {ANEW}") from error

    kind: str
    stored = False  # in an object store
    schema: pa.Schema
    group_rows: list[int]  # rows of each group

    @abstractmethod
    def _open(self) -> tuple[pa.Schema, list[int]]: ...

    @abstractmethod
    def _read(self, group: int, columns: list[str], content: Content) -> pa.Table: ...

    @abstractmethod
    def num_values(self, column: str) -> int:
        """Values in the lists of a column, about."""

    def largest(self, column: str) -> float:
        """The largest magnitude of a column of numbers, as far as the file tells without being read; 0 if it does not.

        Args:
            column (str): its name.
        """
        return 0.0

    def fetch(self, group: int) -> Content:
        """Brings a group from its store to this node's disk; what finds no room there is given, for :meth:`read`.

        Raises:
            ValueError: it cannot be read.
        """
        return None

    def read(self, group: int, columns: list[str], content: Content = None) -> pa.Table:
        """Columns of a group.

        Args:
            group (int): its number.
            columns (list[str]): their names.
            content (bytes | None): what :meth:`fetch` gave.

        Raises:
            ValueError: the file is corrupt there, or cannot be read.
        """
        try:
            return self._read(group, columns, content)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path} is corrupt in row group {group} ({_line(error)}); {ANEW}") from error


class ParquetFile(SplitFile):
    """A Parquet file, by row groups."""

    kind = "Parquet"

    def _open(self) -> tuple[pa.Schema, list[int]]:
        self._metadata = self._read_metadata()
        counts = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        self._paths = [self._metadata.schema.column(place).path for place in range(self._metadata.num_columns)]
        return self._metadata.schema.to_arrow_schema(), counts

    def _read_metadata(self) -> pq.FileMetaData:
        return self._file(self.path).metadata

    def _read(self, group: int, columns: list[str], content: Content) -> pa.Table:
        return self._file(self.path, self._metadata).read_row_group(group, columns)

    def num_values(self, column: str) -> int:
        """See :class:`SplitFile`."""
        # the path of a list's values has two parts more than its column's name
        places = [place for place, path in enumerate(self._paths) if path.rsplit(".", 2)[0] == column]
        return sum(chunk.num_values for chunk in self._chunks(places))

    def largest(self, column: str) -> float:
        """See :class:`SplitFile`."""
        places = [place for place, path in enumerate(self._paths) if path == column]
        known = [chunk.statistics for chunk in self._chunks(places) if chunk.statistics is not None]
        ends = [end for told in known if told.has_min_max for end in (told.min, told.max)]
        return max((abs(float(end)) for end in ends if isinstance(end, int | float)), default=0.0)

    def _chunks(self, places: list[int]) -> Iterator[pq.ColumnChunkMetaData]:
        """What is known of some columns in each row group."""
        for number in range(self._metadata.num_row_groups):
            group = self._metadata.row_group(number)
            yield from (group.column(place) for place in places)

    @staticmethod
    def _file(path: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(path, metadata=metadata, memory_map=True, page_checksum_verification=True)


class ArrowFile(SplitFile):
    """An Arrow IPC file, by record batches; read, not memory-mapped, so that nothing read stays resident."""

    kind = "Arrow IPC"

    def _open(self) -> tuple[pa.Schema, list[int]]:
        with self._source() as source:
            schema = pa.ipc.open_file(source).schema
            # one column says how many rows a batch has; all of them would be the whole file
            narrow = pa.ipc.IpcReadOptions(included_fields=[0]) if len(schema) else None
            file = pa.ipc.open_file(source, options=narrow)
            counts = [int(file.get_batch(number).num_rows) for number in range(file.num_record_batches)]
            return schema, counts

    def _read(self, group: int, columns: list[str], content: Content) -> pa.Table:
        wanted = [self.schema.get_field_index(name) for name in columns]
        with self._source() as source:
            file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
            return pa.Table.from_batches([file.get_batch(group)])

    def _source(self) -> Any:
        return pa.OSFile(self.path)

    def num_values(self, column: str) -> int:
        """See :class:`SplitFile`."""
        if not self.group_rows or not self.group_rows[0]:
            return 0
        first = self.read(0, [column]).column(column)
        return int(sum(len(chunk.flatten()) for chunk in first.chunks) / self.group_rows[0] * sum(self.group_rows))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def plain_column(table: pa.Table, name: str) -> Any:
    """A column of a table as one array."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return column


def check_types(files: Sequence[SplitFile], kinds: dict[str, str], mend: str) -> None:
    """Checks columns of all files.

    Args:
        files (Sequence[SplitFile]): of a split.
        kinds (dict[str, str]): what each column must hold: `integers`, `numbers` or `lists of integers`.
        mend (str): what helps, for the error.

    Raises:
        ValueError: a column is missing, there twice or of another type.
    """
    for file in files:
        for name, wanted in kinds.items():
            if name not in file.schema.names:
                raise ValueError(f"{file.path} has no column '{name}', which schema.json names; {mend}")
            if file.schema.names.count(name) > 1:
                raise ValueError(f"{file.path} has the column '{name}' twice; take one out")
            kind = file.schema.field(name).type
            if wanted == "lists of integers":
                good = is_list(kind) and pa.types.is_integer(kind.value_type)
            else:
                good = pa.types.is_integer(kind) or (wanted == "numbers" and pa.types.is_floating(kind))
            if not good:
                raise ValueError(f"{file.path}: column '{name}' holds {kind}, not {wanted}; {mend}")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
