"""Reads a prepared split by row groups, only the columns that are needed, and checks what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchrec_mdr.data.files import Content, check_types, is_list, plain_column
from torchrec_mdr.data.read_ahead import ReadAhead
from torchrec_mdr.data.rows import WIDTHS, Bags, Form, Rows, id_width
from torchrec_mdr.data.schema import Schema, domain_column
from torchrec_mdr.data.split_files import open_split

Array = NDArray[Any]
_MEND = "correct it or schema.json"
_AT_ONCE = 8  # row groups of a store of which one column is read


class RowGroup(NamedTuple):
    """A row group's file, its number there, the row of the file and of the split it starts with, and its rows."""

    file: int
    number: int
    file_start: int
    start: int
    rows: int


class SplitReader:
    """One split of a prepared data set: a file `SPLIT.parquet`, a folder of several, or `SPLIT.arrow`.

    They may lie in an object store. Opening reads metadata only. Values are checked when they are read.

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
        self.files = open_split(folder, split)
        self.groups: list[RowGroup] = []
        start = 0
        for place, file in enumerate(self.files):
            file_start = start
            for number, rows in enumerate(file.group_rows):
                self.groups.append(RowGroup(place, number, start - file_start, start, rows))
                start += rows
        if start != schema.rows[split]:
            raise ValueError(
                f"{self.files[0].path}: the split has {start} rows, schema.json says {schema.rows[split]}; {_MEND}"
            )
        self.multi_hot = tuple(self._is_list(feature.name) for feature in schema.sparse_features)
        for feature, many in zip(schema.sparse_features, self.multi_hot, strict=True):
            if feature.multi_hot != many and feature.name in self.files[0].schema.names:
                has, says = ("lists", "false") if many else ("single ids", "true")
                raise ValueError(
                    f"{self.files[0].path}: column '{feature.name}' holds {has}, but multi_hot is {says} in "
                    "schema.json; correct one of them (lists are pooled as 'pooling' says, mean or sum)"
                )
        names = [feature.name for feature in schema.sparse_features]
        numbers = [schema.label, *([schema.weight] if schema.weight else []), *schema.dense_features]
        kinds = dict.fromkeys(numbers, "numbers") | {
            name: "lists of integers" if many else "integers" for name, many in zip(names, self.multi_hot, strict=True)
        }
        kinds |= {column: "integers" for d in self.divisions if (column := domain_column(d.name)) not in kinds}
        self._columns = list(kinds)
        check_types(self.files, kinds, _MEND)
        sizes = [division.num_domains for division in self.divisions]
        if prod(sizes) >= 2**63:
            raise ValueError(f"the divisions {', '.join(divisions)} have too many combinations of domains; use fewer")
        self._strides = [prod(sizes[v + 1 :]) for v in range(len(sizes))]
        features = list(zip(schema.sparse_features, self.multi_hot, strict=True))
        widest = max((feature.num_embeddings for feature, many in features if many), default=0)
        self.form = Form(
            widths=tuple(id_width(feature.num_embeddings) for feature, many in features if not many),
            num_bags=sum(self.multi_hot),
            num_dense=len(schema.dense_features),
            key_type=np.min_scalar_type(prod(sizes) - 1),
            bag_type=np.dtype(np.int32 if widest <= 2**31 else np.int64),
            has_weights=schema.weight is not None,
        )

    @property
    def bytes(self) -> int:
        """Memory that all rows take, about."""
        lists = [f.name for f, many in zip(self.schema.sparse_features, self.multi_hot, strict=True) if many]
        values = sum(file.num_values(name) for file in self.files for name in lists)
        return self.form.row_bytes * sum(group.rows for group in self.groups) + values * self.form.bag_type.itemsize

    def read_ahead(self) -> ReadAhead:
        """What fetches row groups from a store before they are read; groups are announced by their first two fields."""
        return ReadAhead(self.files)

    def all_rows(self) -> Iterator[tuple[RowGroup, Rows]]:
        """Every row group with its rows; see :meth:`rows`."""
        with self.read_ahead() as ahead:
            ahead.announce(group[:2] for group in self.groups)
            for group in self.groups:
                with ahead.taken(group[:2]) as content:
                    yield group, self.rows(group, content)

    def all_domains(self, division: str) -> Iterator[Array]:
        """Domain ids of every row group's rows under one division; see :meth:`domains`."""
        if not any(file.stored for file in self.files):
            yield from (self.domains(group, division) for group in self.groups)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # a request each
            for start in range(0, len(self.groups), _AT_ONCE):
                groups = self.groups[start : start + _AT_ONCE]
                yield from pool.map(lambda group: self.domains(group, division), groups)

    def domains(self, group: RowGroup, division: str, content: Content = None) -> Array:
        """Domain ids of a row group's rows under one division: int64 [rows]; content as in :meth:`rows`."""
        column = domain_column(division)
        table = self._read(group, [column], content)
        return self._ids(table, group, column, self.schema.division(division).num_domains, "division").astype(np.int64)

    def labels(self, group: RowGroup) -> Array:
        """Labels of a row group's rows: float32 [rows], 0 or 1."""
        return self._labels(self._read(group, [self.schema.label]), group)

    def rows(self, group: RowGroup, content: Content = None) -> Rows:
        """All rows of a row group.

        Args:
            group (RowGroup): one of `groups`.
            content (bytes | None): its bytes, as far as :meth:`read_ahead` has them in memory.

        Raises:
            ValueError: the group is corrupt, or a value is missing or out of its range.
        """
        schema = self.schema
        table = self._read(group, self._columns, content)
        labels, weights, dense, keys, *matrices = self.form.columns(group.rows)
        by_width = dict(zip(WIDTHS, matrices, strict=True))
        places = dict.fromkeys(by_width, 0)
        bags: list[Bags] = []
        widths = iter(self.form.widths)
        for feature, many in zip(schema.sparse_features, self.multi_hot, strict=True):
            if many:
                bags.append(self._bags(table, group, feature.name, feature.num_embeddings))
                continue
            width = next(widths)
            by_width[width][:, places[width]] = self._ids(
                table, group, feature.name, feature.num_embeddings, "embedding table"
            )
            places[width] += 1
        for place, name in enumerate(schema.dense_features):
            dense[:, place] = self._floats(table, group, name)
        combination = np.zeros(group.rows, dtype=np.int64)
        for division, stride in zip(self.divisions, self._strides, strict=True):
            ids = self._ids(table, group, domain_column(division.name), division.num_domains, "division")
            combination += ids.astype(np.int64) * stride
        keys[:] = combination
        labels[:] = self._labels(table, group)
        if schema.weight is not None:
            weights[:] = self._floats(table, group, schema.weight)
            self._require(weights >= 0, weights, group, schema.weight, "is no weight, which is not negative")
        return Rows(self.form, [labels, weights, dense, keys, *matrices], tuple(bags))

    def _labels(self, table: pa.Table, group: RowGroup) -> Array:
        label = self.schema.label
        labels = self._floats(table, group, label)
        self._require((labels == 0) | (labels == 1), labels, group, label, "is no label, which is 0 or 1")
        return labels

    def _read(self, group: RowGroup, columns: list[str], content: Content = None) -> pa.Table:
        return self.files[group.file].read(group.number, columns, content)

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
        return Bags(values.astype(self.form.bag_type), offsets - offsets[0])

    def _floats(self, table: pa.Table, group: RowGroup, name: str) -> Array:
        values = self._values(table, group, name).to_numpy(zero_copy_only=False).astype(np.float32)
        self._require(np.isfinite(values), values, group, name, "is no finite number")
        return values

    def _values(self, table: pa.Table, group: RowGroup, name: str) -> pa.Array:
        column = plain_column(table, name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise self._fault(group, name, row, "the value is missing")
        return column

    def _require(self, good: NDArray[np.bool_], values: Array, group: RowGroup, name: str, complaint: str) -> None:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise self._fault(group, name, row, f"{values[row]} {complaint}")

    def _fault(self, group: RowGroup, name: str, row: int, complaint: str) -> ValueError:
        place = f"{self.files[group.file].path}, column '{name}', row {group.file_start + row} (from 0)"
        return ValueError(f"{place}: {complaint}; correct the data or schema.json")

    def _is_list(self, name: str) -> bool:
        schema = self.files[0].schema
        return name in schema.names and is_list(schema.field(name).type)
