"""What all training rows say about a column: counts that tell its kind, and the first row that contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from torchrec_mdr.data.features import keys
from torchrec_mdr.data.features.keys import MARKED, Marks
from torchrec_mdr.data.importing.staging import Staged

SEPARATORS = ("|", ";", ",", " ")


@dataclass(frozen=True)
class Facts:
    """A column's type, the number of training rows, and answers to :func:`questions`."""

    name: str
    kind: pl.DataType
    rows: int
    answers: Mapping[str, Any]
    staged: Staged

    def __getitem__(self, key: str) -> Any:
        return self.answers[key]

    @property
    def known(self) -> int:
        """Training rows with a value."""
        return self.rows - int(self["missing"])


def questions(name: str, kind: pl.DataType) -> dict[str, pl.Expr]:
    """Aggregates of a column, by name.

    Args:
        name (str): of the column.
        kind (pl.DataType): its type.
    """
    column = pl.col(name)
    if kind.is_nested() or kind in (pl.Binary, pl.Object, pl.Null):
        return {"missing": column.null_count(), "values": column.is_not_null().any().cast(pl.Int64) * 2}
    if kind.is_numeric() or kind == pl.Boolean or kind == pl.Duration:
        value = keys.number(name, kind)
        finite = pl.when(value.is_finite()).then(value)
        return {
            "missing": value.null_count(),
            "values": column.approx_n_unique() - value.is_null().any(),
            "least": finite.min(),
            "most": finite.max(),
            "whole": (finite == finite.round()).sum(),
            "infinite": value.is_infinite().sum(),
        }
    text = column.cast(pl.String).str.strip_chars()
    known = pl.when(text != "").then(text)
    if kind.is_temporal():
        return {"missing": column.null_count(), "values": text.approx_n_unique() - text.is_null().any()}
    lower = known.str.to_lowercase()
    is_number = known.is_not_null() & ~lower.is_in(keys.MISSING_NUMBERS)
    value = known.cast(pl.Float64, strict=False)
    finite = pl.when(value.is_finite()).then(value)
    return {
        "missing": known.null_count(),
        "values": known.approx_n_unique() - known.is_null().any(),
        "candidates": is_number.sum(),
        **_numbers(known, is_number),
        "infinite": value.is_infinite().sum(),
        "zeros": known.str.contains(r"^[+-]?0\d").sum(),
        "whole": known.str.contains(r"^[+-]?\d+(\.0+)?$").sum(),
        "truths": lower.is_in(("true", "false", "yes", "no")).sum(),
        "least": finite.min(),
        "most": finite.max(),
        "moments": (is_number & keys.moment(name, pl.String(), None).is_not_null()).sum(),
        "length": known.str.len_chars().mean(),
        "brackets": known.str.contains(r"^\[.*\]$").sum(),
        **{f"with {mark}": known.str.contains(mark, literal=True).sum() for mark in SEPARATORS},
    }


def marks_of(facts: Facts) -> Marks:
    """How a column of text writes its numbers; plainly where that cannot be told: 1,234 may be either of two."""
    if "plain numbers" not in facts.answers:
        return "plain"
    sure: tuple[Marks, ...] = tuple(marks for marks in MARKED if facts[f"{marks} surely"])
    best: Marks = max(("plain", *sure), key=lambda marks: int(facts[f"{marks} numbers"]))
    return best


def check_numbers(facts: Facts) -> None:
    """Raises ValueError for the first training row where a column of numbers holds none."""
    marks = marks_of(facts)
    bad = facts["infinite"]
    if "plain numbers" in facts.answers:
        bad += facts["candidates"] - facts[f"{marks} numbers"] - facts["truths"]
    if bad <= 0:
        return
    value = keys.number(facts.name, facts.kind, marks)
    row, shown = _first(facts, value.is_infinite())
    raise ValueError(
        f"{facts.staged.place('train', row)}: column '{facts.name}' holds numbers, but '{shown}' here is no finite one "
        f"(of {bad:,} such rows); correct them, or name the column in --sparse or --exclude"
    )


def check_moments(facts: Facts) -> None:
    """Raises ValueError for the first training row where a column of dates and times, written as text, holds none."""
    if "moments" not in facts.answers or facts["moments"] == facts["candidates"]:
        return
    known = ~pl.col(facts.name).cast(pl.String).str.strip_chars().str.to_lowercase().is_in(keys.MISSING_NUMBERS)
    row, shown = _first(facts, known & keys.moment(facts.name, facts.kind, None).is_null())
    raise ValueError(
        f"{facts.staged.place('train', row)}: column '{facts.name}' holds times, but '{shown}' here is none "
        f"that can be read (of {facts['candidates'] - facts['moments']:,} such rows); write them as 2024-03-31 18:00, "
        "or name the column in --sparse or --exclude"
    )


def _first(facts: Facts, where: pl.Expr) -> tuple[int, str]:
    found = facts.staged.scan("train").filter(where).select("__row", facts.name).head(1).collect()
    row, shown = found.row(0)
    return row, shown


def _numbers(known: pl.Expr, is_number: pl.Expr) -> dict[str, pl.Expr]:
    """For each way to write numbers, rows that are some, and rows that can be no other's."""

    def count(marks: Marks) -> pl.Expr:
        return (is_number & keys.unmarked(known, marks).cast(pl.Float64, strict=False).is_not_null()).sum()

    marked = {marks: known.str.contains(pattern) for marks, pattern in MARKED.items()}
    is_plain = known.cast(pl.Float64, strict=False).is_not_null()
    # 1,234,567 and 1,234.5 are no decimal commas; 12,5 and 1.234,5 are no thousands
    return {
        "plain numbers": count("plain"),
        **{f"{marks} numbers": count(marks) for marks in MARKED},
        "comma surely": (marked["comma"] & ~marked["thousands"] & ~is_plain).sum(),
        "thousands surely": (marked["thousands"] & ~marked["comma"]).sum(),
    }
