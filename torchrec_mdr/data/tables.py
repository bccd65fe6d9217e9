"""Raw tables: rows in Parquet, CSV or JSON lines, in one file or many, or in a frame, read by streaming."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import polars as pl
from polars.exceptions import PolarsError
from polars.io.plugins import register_io_source

from torchrec_mdr.data.table_faults import DAMAGED, fault_of, opened
from torchrec_mdr.data.table_files import KNOWN, find_files, kind_of
from torchrec_mdr.storage import borrowed_copy, full_path, is_store, read_range, size

BATCH_ROWS = 131_072
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Part:
    """A file of a table, or a frame: its path for messages, its rows, and what its folders' names say (`day=3`)."""

    path: str
    rows: pl.LazyFrame
    columns: tuple[str, ...]


class RawTable:
    """Rows as users have them, in the order of their files' names; nothing is read until it is needed.

    Args:
        parts (Sequence[Part]): at least one.

    Raises:
        ValueError: a part cannot be read.

    Example::

        >>> table = RawTable.from_frame(pl.DataFrame({"user": [7, 8], "clicked": [0, 1]}))
        >>> table.columns, sum(frame.height for frame in table.batches())
        (('user', 'clicked'), 2)
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        # types that differ between files become the narrowest that holds both, where need be text
        self.rows = pl.concat([part.rows for part in self.parts], how="diagonal_relaxed")
        try:
            self.rows = flat(self.rows)
            self.types = dict(self.rows.collect_schema())
        except PolarsError as error:
            raise self.fault(error) from error

    @staticmethod
    def from_frame(frame: Any, name: str = "the table") -> RawTable:
        """A table of a polars frame, lazy or not, or of a pandas frame.

        Raises:
            ValueError: it is no frame, or pandas holds values of several types in a column.
        """
        if not isinstance(frame, pl.DataFrame | pl.LazyFrame):
            try:
                frame = pl.from_pandas(_plain(frame))
            except (TypeError, ValueError, ImportError, PolarsError) as error:
                reason = _line(error)
                raise ValueError(
                    f"{name} is no frame that can be read: {reason}; give a polars or pandas frame"
                ) from error
        rows = frame.lazy()
        return RawTable([Part(name, rows, tuple(flat(rows).collect_schema()))])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of all parts."""
        return tuple(self.types)

    def require(self, columns: Sequence[str]) -> None:
        """Checks that every part has some columns.

        Raises:
            ValueError: one has not; all that are missing there are named.
        """
        for part in self.parts:
            missing = [f"'{name}'" for name in columns if name not in part.columns]
            if missing:
                has = ", ".join(part.columns[:20]) + (", ..." if len(part.columns) > 20 else "")
                raise ValueError(f"{part.path} has no column {', '.join(missing)}; it has {has}")

    def batches(self, rows: int = BATCH_ROWS, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """The rows in their order, some at a time.

        Args:
            rows (int): rows of a batch, at most.
            columns (Sequence[str] | None): which to read; all where left out.

        Raises:
            ValueError: a file is damaged.
        """
        frame = self.rows if columns is None else self.rows.select(columns)
        try:
            for batch in frame.collect_batches(chunk_size=rows, maintain_order=True):
                yield from batch.iter_slices(rows)
        except PolarsError as error:
            raise self.fault(error) from error

    def count(self) -> int:
        """Number of rows."""
        return sum(_count(part) for part in self.parts)

    def known_rows(self) -> int | None:
        """Number of rows where it can be had without reading them: of Parquet files; None elsewhere."""
        return self.count() if all(kind_of(part.path) == "parquet" for part in self.parts) else None

    def place(self, row: int) -> str:
        """Where a row lies, for messages: its file and its number there, from 0."""
        for part in self.parts:
            rows = _count(part)
            if row < rows:
                return f"{part.path}, row {row} (from 0)"
            row -= rows
        raise IndexError(row)

    def fault(self, error: Exception) -> ValueError:
        """What to raise for an error of reading: it names the file, which the error itself may not."""
        for part in self.parts:
            try:
                part.rows.collect_schema()
                for _ in part.rows.collect_batches(chunk_size=BATCH_ROWS):
                    pass
            except PolarsError as own:
                return _unreadable(part.path, own)
        return ValueError(f"{self.parts[0].path} cannot be read together with the others: {_line(error)}")


def open_table(inputs: Sequence[str], option: str = "--input") -> RawTable:
    """Opens files of rows: Parquet, CSV or JSON lines, also compressed by gzip.

    Folders are searched to any depth, without hidden files; names such as `day=3` of folders below a named one become
    columns. Files are taken in the order in which they are named, those of a folder or a glob sorted by name.

    Args:
        inputs (Sequence[str]): files, folders and globs, on disk or in a store.
        option (str): what names them, for errors.

    Raises:
        ValueError: nothing is found, a file is of a kind that is not read, or it is damaged.
    """
    parts = []
    for text in inputs:
        files, root = find_files(text, option)
        parts += [_part(file, root, option) for file in files]
    if not parts:
        raise ValueError(f"{option} names no file")
    return RawTable(parts)


def _plain(frame: Any) -> Any:
    """A pandas frame whose intervals and periods, as of `pandas.qcut`, are text: polars knows no such types."""
    odd = []
    for place, kind in enumerate(getattr(frame, "dtypes", ())):
        categories = getattr(kind, "categories", None)
        kind = kind if categories is None else categories.dtype
        if kind.name.startswith(("interval", "period")):
            odd.append(place)
    if not odd:
        return frame
    texts = {frame.columns[place]: frame.iloc[:, place].map(str, na_action="ignore") for place in odd}
    return frame.assign(**texts)


def flat(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows whose nested fields are columns of their own: field `id` of column `user` is `user.id`.

    Example::

        >>> flat(pl.LazyFrame({"user": [{"id": 7, "home": {"zip": 1}}]})).collect_schema().names()
        ['user.id', 'user.home.zip']
    """
    while structs := {name: kind for name, kind in rows.collect_schema().items() if isinstance(kind, pl.Struct)}:
        columns: list[pl.Expr] = []
        for name in rows.collect_schema():
            fields = [field.name for field in structs[name].fields] if name in structs else None
            value = pl.col(name)
            columns += (
                [value] if fields is None else [value.struct.field(field).alias(f"{name}.{field}") for field in fields]
            )
        rows = rows.select(columns)
    return rows


def _part(path: str, root: str, option: str) -> Part:
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{option}: {path} is of a kind that is not read; its name must end with {KNOWN}")
    if size(path) == 0:
        raise ValueError(f"{option}: {path} is empty; leave it out")
    try:
        rows = _stored(path) if is_store(path) else _READERS[kind](path, path)
        columns = tuple(flat(rows).collect_schema())
    except (PolarsError, *DAMAGED, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    folders = os.path.dirname(full_path(path)).removeprefix(full_path(root or ".")).split(os.sep)
    values = dict(folder.split("=", 1) for folder in folders if "=" in folder)
    own = {name: value for name, value in values.items() if name not in columns}
    null = "__HIVE_DEFAULT_PARTITION__"
    rows = rows.with_columns(
        pl.lit(None if value == null else value, pl.String).alias(name) for name, value in own.items()
    )
    return Part(path, rows, (*columns, *own))


def _stored(path: str) -> pl.LazyFrame:
    """A file of a store: its copy on this node's disk is there while it is read, and may go in between."""

    def rows_of(
        columns: list[str] | None, condition: pl.Expr | None, most: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        with borrowed_copy(path) as copy:
            try:
                rows = read(copy, path)
            except (*DAMAGED, UnicodeDecodeError) as error:  # it has changed since it was opened
                raise _unreadable(path, error) from error
            rows = rows if columns is None else rows.select(columns)
            rows = rows if condition is None else rows.filter(condition)
            rows = rows if most is None else rows.head(most)
            yield from rows.collect_batches(chunk_size=size or BATCH_ROWS, maintain_order=True)

    read = _READERS[str(kind_of(path))]
    if kind_of(path) == "parquet":
        return register_io_source(rows_of, schema=_footer(path).collect_schema())
    with borrowed_copy(path) as copy:
        return register_io_source(rows_of, schema=read(copy, path).collect_schema())


def _footer(path: str) -> pl.LazyFrame:
    """A Parquet file of a store of which only the end is read: good for its columns and number of rows alone."""
    end = size(path)
    length = int.from_bytes(read_range(path, max(end - 8, 0), end)[:4], "little")
    return pl.scan_parquet(io.BytesIO(b"PAR1" + read_range(path, max(end - 8 - length, 0), end)))


def _parquet(local: str, path: str) -> pl.LazyFrame:
    return pl.scan_parquet(local, hive_partitioning=False, glob=False)


def _csv(local: str, path: str) -> pl.LazyFrame:
    header, separator = _header(local, path)
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    for name, count in Counter(names).items():
        if name and count > 1:  # polars would rename the second
            raise ValueError(f"{path} has the column '{name}' twice; take one out")
    # all as text: what a column holds is decided from all of its rows, not from the first ones
    rows = pl.scan_csv(local, separator=separator, infer_schema=False, glob=False)
    return rows.rename(str.strip)


def _header(local: str, path: str, errors: str = "strict") -> tuple[str, str]:
    """The first line of a CSV file, and what separates its fields."""
    with opened(local, errors) as file:
        line = file.readline()
    return line, "\t" if ".tsv" in path.lower() else max(_SEPARATORS, key=line.count)


def _json(local: str, path: str) -> pl.LazyFrame:
    return pl.scan_ndjson(local, infer_schema_length=None)


_READERS = {"parquet": _parquet, "csv": _csv, "json": _json}


def _count(part: Part) -> int:
    rows = _footer(part.path) if is_store(part.path) and kind_of(part.path) == "parquet" else part.rows
    return int(rows.select(pl.len()).collect(engine="streaming").item())


def _unreadable(path: str, error: Exception) -> ValueError:
    with suppress(*DAMAGED, ValueError), borrowed_copy(path) if is_store(path) else nullcontext(path) as local:
        separator = _header(local, path, errors="replace")[1] if kind_of(path) == "csv" else None
        if (fault := fault_of(local, path, separator)) is not None:
            return ValueError(fault)
    return ValueError(f"{path} cannot be read: {_line(error)}; correct the file or leave it out")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".") or type(error).__name__
