"""Reads a prepared split by row groups, only the columns that are needed, and checks what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrec_mdr.data.rows import Bags, Rows
from torchrec_mdr.data.schema import SPLITS, Schema, domain_column
from torchrec_mdr.data.writer import split_path
from torchrec_mdr.storage import path_manager

Array = NDArray[Any]
_ANEW = "prepare the data set anew"
_MEND = f"correct it or schema.json, or {_ANEW}"


class RowGroup(NamedTuple):
    """A row group's file, its number there, the row of the file and of the split it starts with, and its rows."""

    file: int
    number: int
    file_start: int
    start: int
    rows: int


class SplitReader:
    """One split of a prepared data set: a file `SPLIT.parquet`, or a folder `SPLIT` of several.

    Opening reads metadata only. Values are checked when they are read.

    Args:
        folder (str): the prepared data set.
        schema (Schema): its schema.
        split (str): train, validation or test.
        divisions (Sequence[str]): divisions whose domain ids the rows carry, in this order.

    Raises:
        ValueError: a file is missing or corrupt, a column is missing or of a wrong type, the number of rows is not the
            schema's, or a division is unknown.
    """

    def __init__(self, folder: str, schema: Schema, split: str, divisions: Sequence[str]) -> None:
        self.schema = schema
        self.divisions = [schema.division(name) for name in divisions]
        self._paths = _files(folder, split)
        self._metadata = [_open(path).metadata for path in self._paths]
        self.groups: list[RowGroup] = []
        start = 0
        for file, metadata in enumerate(self._metadata):
            file_start = start
            for number in range(metadata.num_row_groups):
                rows = metadata.row_group(number).num_rows
                self.groups.append(RowGroup(file, number, start - file_start, start, rows))
                start += rows
        if start != schema.rows[split]:
            raise ValueError(
                f"{self._paths[0]}: the split has {start} rows, schema.json says {schema.rows[split]}; {_MEND}"
            )
        self.multi_hot = tuple(self._is_list(feature.name) for feature in schema.sparse_features)
        self._columns = [
            schema.label,
            *(feature.name for feature in schema.sparse_features),
            *schema.dense_features,
            *(domain_column(division.name) for division in self.divisions),
        ]
        self._check_types()
        sizes = [division.num_domains for division in self.divisions]
        self._strides = np.array([prod(sizes[v + 1 :]) for v in range(len(sizes))], dtype=np.int64)
        self._key_type = np.min_scalar_type(prod(sizes) - 1)
        if prod(sizes) >= 2**63:
            raise ValueError(f"the divisions {', '.join(divisions)} have too many combinations of domains; use fewer")
        widest = max((feature.num_embeddings for feature in schema.sparse_features), default=0)
        self._id_type = np.int32 if widest <= 2**31 else np.int64

    @property
    def bytes(self) -> int:
        """Memory that all rows take, about."""
        columns = set(self._columns)
        leaves = 0
        for metadata in self._metadata:
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                chunks = (group.column(i) for i in range(group.num_columns))
                # the path of a list's values has two parts more than its column's name
                leaves += sum(
                    chunk.num_values
                    for chunk in chunks
                    if chunk.path_in_schema in columns or chunk.path_in_schema.rsplit(".", 2)[0] in columns
                )
        return leaves * np.dtype(self._id_type).itemsize

    def domains(self, group: RowGroup, division: str) -> Array:
        """Domain ids of a row group's rows under one division: int64 [rows]."""
        column = domain_column(division)
        table = self._read(group, [column])
        return self._ids(table, group, column, self.schema.division(division).num_domains, "division").astype(np.int64)

    def rows(self, group: RowGroup) -> Rows:
        """All rows of a row group.

        Raises:
            ValueError: the group is corrupt, or a value is missing or out of its range.
        """
        schema = self.schema
        table = self._read(group, list(dict.fromkeys(self._columns)))
        ids: list[Array] = []
        bags: list[Bags] = []
        for feature, many in zip(schema.sparse_features, self.multi_hot, strict=True):
            if many:
                bags.append(self._bags(table, group, feature.name, feature.num_embeddings))
            else:
                ids.append(self._ids(table, group, feature.name, feature.num_embeddings, "embedding table"))
        dense = [self._floats(table, group, name) for name in schema.dense_features]
        domains = [
            self._ids(table, group, domain_column(division.name), division.num_domains, "division")
            for division in self.divisions
        ]
        labels = self._floats(table, group, schema.label)
        self._require((labels == 0) | (labels == 1), labels, group, schema.label, "is no label, which is 0 or 1")
        keys = np.stack(domains, axis=1).astype(np.int64) @ self._strides
        return Rows(
            labels=labels,
            dense=_matrix(dense, group.rows, np.float32),
            domains=_matrix(domains, group.rows, np.int32),
            keys=keys.astype(self._key_type),
            ids=_matrix(ids, group.rows, self._id_type),
            bags=tuple(bags),
        )

    def empty(self) -> Rows:
        """No rows."""
        schema, many = self.schema, sum(self.multi_hot)
        return Rows(
            labels=np.empty(0, dtype=np.float32),
            dense=np.empty((0, len(schema.dense_features)), dtype=np.float32),
            domains=np.empty((0, len(self.divisions)), dtype=np.int32),
            keys=np.empty(0, dtype=self._key_type),
            ids=np.empty((0, len(schema.sparse_features) - many), dtype=self._id_type),
            bags=(Bags(np.empty(0, dtype=self._id_type), np.zeros(1, dtype=np.int64)),) * many,
        )

    def _read(self, group: RowGroup, columns: list[str]) -> pa.Table:
        path = self._paths[group.file]
        try:
            return _open(path, self._metadata[group.file]).read_row_group(group.number, columns)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} is corrupt in row group {group.number} ({_line(error)}); {_ANEW}") from error

    def _ids(self, table: pa.Table, group: RowGroup, name: str, size: int, kind: str) -> Array:
        values = self._values(table, group, name).to_numpy(zero_copy_only=False)
        self._require((values >= 0) & (values < size), values, group, name, f"is outside its {kind}, [0, {size})")
        return values

    def _bags(self, table: pa.Table, group: RowGroup, name: str, size: int) -> Bags:
        column = self._values(table, group, name)
        offsets = column.offsets.to_numpy().astype(np.int64)
        leaves = column.flatten()
        values = leaves.to_numpy(zero_copy_only=False)
        good = (values >= 0) & (values < size)
        if leaves.null_count or not good.all():
            row = int(np.searchsorted(offsets - offsets[0], np.flatnonzero(~good)[0], side="right")) - 1
            complaint = f"{column[row].as_py()} holds an id outside its embedding table, [0, {size})"
            raise self._fault(group, name, row, complaint)
        return Bags(values.astype(self._id_type), offsets - offsets[0])

    def _floats(self, table: pa.Table, group: RowGroup, name: str) -> Array:
        values = self._values(table, group, name).to_numpy(zero_copy_only=False).astype(np.float32)
        self._require(np.isfinite(values), values, group, name, "is no finite number")
        return values

    def _values(self, table: pa.Table, group: RowGroup, name: str) -> pa.Array:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise self._fault(group, name, row, "the value is missing")
        return column

    def _require(self, good: NDArray[np.bool_], values: Array, group: RowGroup, name: str, complaint: str) -> None:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise self._fault(group, name, row, f"{values[row]} {complaint}")

    def _fault(self, group: RowGroup, name: str, row: int, complaint: str) -> ValueError:
        place = f"{self._paths[group.file]}, column '{name}', row {group.file_start + row} (from 0)"
        return ValueError(f"{place}: {complaint}; correct the data or schema.json")

    def _is_list(self, name: str) -> bool:
        schema = self._metadata[0].schema.to_arrow_schema()
        return name in schema.names and _is_list(schema.field(name).type)

    def _check_types(self) -> None:
        names = [feature.name for feature in self.schema.sparse_features]
        lists = {name for name, many in zip(names, self.multi_hot, strict=True) if many}
        floats = {self.schema.label, *self.schema.dense_features}
        for path, metadata in zip(self._paths, self._metadata, strict=True):
            found = metadata.schema.to_arrow_schema()
            for name in self._columns:
                if name not in found.names:
                    raise ValueError(f"{path} has no column '{name}', which schema.json names; {_MEND}")
                kind = found.field(name).type
                if name in lists:
                    good, wanted = _is_list(kind) and pa.types.is_integer(kind.value_type), "lists of integers"
                elif name in floats:
                    good, wanted = pa.types.is_floating(kind) or pa.types.is_integer(kind), "numbers"
                else:
                    good, wanted = pa.types.is_integer(kind), "integers"
                if not good:
                    raise ValueError(f"{path}: column '{name}' holds {kind}, not {wanted}; {_MEND}")


def check_splits(folder: str, schema: Schema, divisions: Sequence[str]) -> None:
    """Checks before a training run that each split is there, has rows, and has the schema's columns.

    Raises:
        ValueError: see :class:`SplitReader`; or a split has no rows.
    """
    for split in SPLITS:
        if not schema.rows[split]:
            raise ValueError(
                f"{folder}: split '{split}' has no rows, and training needs some in each of {', '.join(SPLITS)}"
            )
        SplitReader(folder, schema, split, divisions)


def _files(folder: str, split: str) -> list[str]:
    single, parts = split_path(folder, split), f"{folder}/{split}"
    if path_manager.isfile(single):
        return [single]
    if path_manager.isdir(parts):
        found = sorted(name for name in path_manager.ls(parts) if name.endswith(".parquet"))
        if found:
            return [f"{parts}/{name}" for name in found]
    raise ValueError(f"{folder} has neither {split}.parquet nor Parquet files in {split}/; {_ANEW}")


def _open(path: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    try:
        local = path_manager.get_local_path(path)
        return pq.ParquetFile(local, metadata=metadata, memory_map=True, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no readable Parquet file ({_line(error)}); {_ANEW}") from error


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _matrix(columns: list[Array], rows: int, kind: Any) -> Array:
    matrix = np.empty((rows, len(columns)), dtype=kind)
    for i, column in enumerate(columns):
        matrix[:, i] = column
    return matrix
