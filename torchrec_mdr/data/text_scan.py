"""Reads text files of any size lazily, plain or gz, and names the line where one is faulty."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from torchrec_mdr.storage import local_copy, open_read

LINE = "line"  # column that holds the lines' numbers, the first line being 1
_TEXT = "text"
_COUNT = "number of fields"
_MEND = "restore the original file"
_WHOLE_LINES = pl.QueryOptFlags(projection_pushdown=False)  # or else fields too many are not seen


class Fault(NamedTuple):
    """What a field may not be.

    Args:
        where (pl.Expr): true, or null, in faulty lines.
        wanted (str): what the field ought to be.
    """

    where: pl.Expr
    wanted: str


@dataclass(frozen=True)
class TextScan:
    """Lines of a file, not read yet.

    Args:
        path (str): the file.
        rows (pl.LazyFrame): a text column each field, null where it is empty, and LINE.
        faults (Mapping[str, Fault]): by field, what the form of the file forbids.
        separator (str): between two fields; empty where lines have another form.
    """

    path: str
    rows: pl.LazyFrame
    faults: Mapping[str, Fault]
    separator: str = ""

    def checked(self, faults: Mapping[str, Fault]) -> pl.LazyFrame:
        """The rows, after one streamed pass that looks for faulty lines.

        Args:
            faults (Mapping[str, Fault]): by field, what it may not be.

        Raises:
            ValueError: the file has no row, cannot be read, or has a faulty line; the first one is named.
        """
        every = {**self.faults, **faults}
        firsts = [pl.col(LINE).filter(fault.where.fill_null(True)).min().alias(name) for name, fault in every.items()]
        try:
            found = self.rows.select(pl.len(), *firsts).collect(engine="streaming", optimizations=_WHOLE_LINES)
            first = found.row(0, named=True)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(self._unreadable(error)) from error
        if not first.pop("len"):
            raise ValueError(f"{self.path} is empty; {_MEND}")
        faulty = [(line, name) for name, line in first.items() if line is not None]
        if faulty:
            line, name = min(faulty, key=lambda pair: pair[0])
            value = self.rows.filter(pl.col(LINE) == line).select(name).collect(engine="streaming").item()
            shown = "missing" if value is None else f"'{value}'"
            raise ValueError(f"{self.path}, line {line}: {name} is {shown}, not {every[name].wanted}; {_MEND}")
        return self.rows

    def _unreadable(self, error: Exception) -> str:
        reason = f"{self.path} cannot be read: {str(error).splitlines()[0]}"
        if self.separator:
            try:
                with open_read(self.path) as file:
                    plain = gzip.open(file) if self.path.endswith(".gz") else file
                    rows = csv.reader(io.TextIOWrapper(plain, errors="replace"), delimiter=self.separator)
                    width = len(next(rows))
                    for row in rows:
                        if len(row) > width:
                            reason = f"{self.path}, line {rows.line_num}: {len(row)} fields where {width} are expected"
                            break
            except (OSError, EOFError, ValueError, csv.Error):
                pass  # the file cannot be read this way either
        return f"{reason}; {_MEND}"


def scan_fields(path: str, separator: str, fields: Sequence[str]) -> TextScan:
    """Lines that hold the same fields, without a header or quotes.

    Args:
        path (str): the file.
        separator (str): between two fields.
        fields (Sequence[str]): names of the fields, in their order.
    """
    few = ", ".join(fields[:5]) + (", ..." if len(fields) > 5 else "")
    text = pl.col(_TEXT).str.strip_chars_end("\r\n")
    rows = _lines(path).select(
        LINE,
        (text.str.count_matches(separator, literal=True) + 1).alias(_COUNT),
        text.str.split_exact(separator, len(fields) - 1).struct.rename_fields(list(fields)).alias(_TEXT),
    )
    wrong = Fault(pl.col(_COUNT) != len(fields), f"{len(fields)} ({few}), separated by {separator!r}")
    # replace() would make polars read the whole file into memory
    known = [pl.when(pl.col(name) != "").then(pl.col(name)) for name in fields]
    return TextScan(path, rows.unnest(_TEXT).with_columns(known), {_COUNT: wrong})


def scan_table(path: str, separator: str, fields: Sequence[str]) -> TextScan:
    """Lines under a header, with quotes where a field needs them; LINE counts rows where a field holds a line break.

    Args:
        path (str): the file.
        separator (str): between two fields.
        fields (Sequence[str]): the columns wanted.

    Raises:
        ValueError: the header lacks one of them.
    """
    known = header(path, separator)
    for name in fields:
        if name not in known:
            raise ValueError(
                f"{path} has no column '{name}'; its first line names {', '.join(known[:5])}, ...; {_MEND}"
            )
    rows = pl.scan_csv(
        local_copy(path), separator=separator, infer_schema=False, row_index_name=LINE, row_index_offset=2
    )
    return TextScan(path, rows.select(LINE, *fields), {}, separator)


def header(path: str, separator: str) -> list[str]:
    """The columns that a file's first line names.

    Args:
        path (str): the file.
        separator (str): between two fields.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return pl.scan_csv(local_copy(path), separator=separator, infer_schema=False).collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}; {_MEND}") from error


def scan_json(path: str, fields: Sequence[str]) -> TextScan:
    """Lines of JSON objects.

    Args:
        path (str): the file.
        fields (Sequence[str]): the fields wanted; null where an object lacks one, or where a line is no object.
    """
    texts = [pl.col(_TEXT).str.json_path_match(f"$.{name}").alias(name) for name in fields]
    return TextScan(path, _lines(path).select(LINE, *texts), {})


def not_number(field: str) -> Fault:
    """A field that must be a number."""
    return Fault(pl.col(field).cast(pl.Float64, strict=False).is_finite().not_(), "a number")


def not_one_of(field: str, values: Sequence[str]) -> Fault:
    """A field that must be one of some texts."""
    return Fault(pl.col(field).is_in(list(values)).not_(), " or ".join(values))


def is_missing(field: str) -> Fault:
    """A field that must not be empty."""
    return Fault(pl.col(field).is_null(), "a text")


def _lines(path: str) -> pl.LazyFrame:
    return pl.scan_lines(local_copy(path), name=_TEXT, row_index_name=LINE, row_index_offset=1)
