"""One form for a value, however a file writes it: 7, 7.0 and "7" are one category, and "2024-01-01" is a moment."""

from __future__ import annotations

from typing import Literal

import polars as pl

Form = Literal["integer", "text", "boolean"]
Unit = Literal["s", "ms", "us", "ns"]
Marks = Literal["plain", "comma", "thousands"]

MISSING_NUMBERS = ("", "na", "n/a", "nan", "null", "none", "nat", "?", "-")
# text of numbers that Python does not read as it stands; 1.234 alone is no decimal comma's, as it may be 1,234 or 1.234
MARKED: dict[Marks, str] = {
    "comma": r"^[+-]?(\d+(,\d+)?|[1-9]\d{0,2}((\.\d{3})+,\d+|(\.\d{3}){2,}))$",
    "thousands": r"^[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?$",
}
# the year first, or the day first with dots: others cannot be told apart
_MOMENTS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%d.%m.%Y %H:%M:%S",
    "%d.%m.%Y %H:%M",
)
_DAYS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y")
_ZONED = "%Y-%m-%dT%H:%M:%S%.f%:z"
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}


def key(column: str | pl.Expr, kind: pl.DataType, form: Form) -> pl.Expr:
    """The text that stands for a category.

    Args:
        column (str | pl.Expr): the column.
        kind (pl.DataType): its type.
        form (Form): `integer` where the training rows' categories are whole numbers, so that 7.0 and "7" are 7;
            `boolean` where they are true and false; otherwise `text`.

    Returns:
        pl.Expr: String; null where the value is missing.
    """
    value = pl.col(column) if isinstance(column, str) else column
    if kind.is_float():
        whole = value.cast(pl.Int64, strict=False)
        text = pl.when(whole.cast(kind) == value).then(whole.cast(pl.String)).otherwise(value.cast(pl.String))
        text = pl.when(value.is_not_nan()).then(text)
    elif kind.is_decimal():
        text = value.cast(pl.String).str.replace(r"\.0*$", "")
    elif kind == pl.Boolean:
        numbers = pl.when(value).then(pl.lit("1")).when(~value).then(pl.lit("0"))
        text = numbers if form == "integer" else value.cast(pl.String)
    elif kind.is_integer():
        text = value.cast(pl.String)
    else:
        text = value.cast(pl.String).str.strip_chars()
        text = pl.when(text != "").then(text)
        if form == "integer":
            plain = text.str.replace(r"^([+-]?\d+)\.0+$", "${1}")
            text = pl.coalesce(plain.cast(pl.Int64, strict=False).cast(pl.String), plain)
    if form == "boolean":
        lower = text.str.to_lowercase()
        text = (
            pl.when(lower.is_in(_TRUE)).then(pl.lit("true")).when(lower.is_in(_FALSE)).then(pl.lit("false"))
        ).otherwise(text)
    return text


def number(column: str, kind: pl.DataType, marks: Marks = "plain") -> pl.Expr:
    """A column as Float64: numbers, decimals, true and false, seconds of a duration, or text of a number.

    Null where it is missing, infinite where it is so or where text is no number.

    Args:
        column (str): its name.
        kind (pl.DataType): its type.
        marks (Marks): how text writes numbers: 1234.5 (`plain`), 1.234,5 (`comma`) or 1,234.5 (`thousands`).
    """
    value = pl.col(column)
    if kind.is_numeric() or kind == pl.Boolean:
        return value.cast(pl.Float64).fill_nan(None)
    if kind == pl.Duration:
        return value.dt.total_microseconds().cast(pl.Float64) / 1e6
    text = value.cast(pl.String).str.strip_chars()
    lower = text.str.to_lowercase()
    truth = pl.when(lower.is_in(("true", "yes"))).then(1.0).when(lower.is_in(("false", "no"))).then(0.0)
    parsed = pl.coalesce(unmarked(text, marks).cast(pl.Float64, strict=False), truth).fill_nan(None)
    missing = text.is_null() | lower.is_in(MISSING_NUMBERS)
    return pl.when(missing).then(None).otherwise(parsed.fill_null(float("inf")))


def unmarked(text: pl.Expr, marks: Marks) -> pl.Expr:
    """Text of numbers as Python writes them; null where decimal commas are meant and text has none of their forms.

    Example::

        >>> pl.select(unmarked(pl.lit("1.234,5"), "comma")).item()
        '1234.5'
    """
    if marks == "plain":
        return text
    is_marked = text.str.contains(MARKED[marks])
    if marks == "comma":
        bare = text.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
        return pl.when(is_marked).then(bare)
    return pl.when(is_marked).then(text.str.replace_all(",", "", literal=True)).otherwise(text)


def moment(column: str, kind: pl.DataType, unit: Unit | None) -> pl.Expr:
    """A column as a moment, Datetime in UTC: dates, times, numbers since 1970 in a unit, or text of a date.

    Null where it is missing, and where it is no moment.
    """
    value = pl.col(column)
    if kind == pl.Date:
        return value.cast(pl.Datetime("us"))
    if isinstance(kind, pl.Datetime):
        zoned = value.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if kind.time_zone else value
        return zoned.cast(pl.Datetime("us"))
    if unit is not None:
        since = number(column, kind)
        micro = since / 1_000 if unit == "ns" else since * _MICROSECONDS[unit]
        return micro.cast(pl.Int64, strict=False).cast(pl.Datetime("us"))
    text = value.cast(pl.String).str.strip_chars()
    tries = [text.str.to_datetime(pattern, time_unit="us", strict=False) for pattern in _MOMENTS]
    zoned = text.str.to_datetime(_ZONED, time_unit="us", time_zone="UTC", strict=False).dt.replace_time_zone(None)
    days = [text.str.to_date(pattern, strict=False).cast(pl.Datetime("us")) for pattern in _DAYS]
    return pl.coalesce(*tries, zoned, *days)


def items(column: str, kind: pl.DataType, separator: str | None, form: Form, max_length: int) -> pl.Expr:
    """The keys of a list, the first ones up to a largest length: lists, or text such as `a|b` or `[1, 2]`.

    Missing entries are left out; null where the list is missing.
    """
    value = pl.col(column)
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if not isinstance(kind, pl.List):
        text = value.cast(pl.String).str.strip_chars()
        bare = text.str.strip_chars("[](){} ")
        parts = bare.str.split(separator or ",").list.eval(pl.element().str.strip_chars(" \"'"))
        value, kind = pl.when(text != "").then(parts), pl.List(pl.String)
    inner = kind.inner if isinstance(kind.inner, pl.DataType) else kind.inner()
    return value.list.eval(key(pl.element(), inner, form).drop_nulls().head(max_length))
