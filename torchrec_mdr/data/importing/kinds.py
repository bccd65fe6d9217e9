"""What raw columns hold: categories, numbers, lists, moments, or nothing to learn from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from torchrec_mdr.data.features.keys import Form, Marks, Unit
from torchrec_mdr.data.importing.facts import SEPARATORS, Facts, check_moments, check_numbers, marks_of, questions
from torchrec_mdr.data.importing.staging import Staged

_IDS = (
    "id|ids|uid|iid|pid|user|item|product|movie|video|author|zip|zipcode|code|category|cat|brand|shop|store|sku|ad|"
    "advertiser|campaign|publisher|city|country|region|device|session|hash|type|kind|class|group|segment|cluster|asin"
)
_NUMBERS = (
    "num|count|counts|cnt|age|price|amount|avg|mean|sum|total|ratio|rate|score|rating|days|hours|minutes|seconds|size|"
    "length|width|height|qty|quantity|duration|gain|loss|income|balance|views|clicks|share|percent"
)
_TIMES = "time|timestamp|ts|date|datetime|day|at"
_LOW_YEAR, _HIGH_YEAR = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds
_UNITS: dict[Unit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FEW = 20  # whole numbers of so few values are categories


@dataclass(frozen=True)
class Column:
    """What a raw column holds.

    Args:
        name (str): of the column.
        kind (str): category, number, list, timestamp, or none for one that is left out.
        form (Form): of categories.
        reason (str): why it is left out.
        unit (Unit | None): of a timestamp that is a number.
        separator (str | None): of a list that is text.
        missing (int): training rows without a value.
        marks (Marks): how text writes a number.
    """

    name: str
    kind: str
    form: Form = "text"
    reason: str = ""
    unit: Unit | None = None
    separator: str | None = None
    missing: int = 0
    marks: Marks = "plain"


def infer(staged: Staged, columns: Sequence[str], given: Mapping[str, str], separator: str | None) -> list[Column]:
    """Finds what columns hold, from all training rows.

    Args:
        staged (Staged): the rows.
        columns (Sequence[str]): to look at.
        given (Mapping[str, str]): kinds that the user has named, by column.
        separator (str | None): of lists that are text; found where left out.

    Returns:
        list[Column]: in the same order.

    Raises:
        ValueError: a column is not what the user calls it, or almost only numbers.
    """
    if not columns:
        return []
    rows = staged.scan("train")
    types = rows.collect_schema()
    asked = [
        question.alias(f"{i} {key}")
        for i, name in enumerate(columns)
        for key, question in questions(name, types[name]).items()
    ]
    answers = rows.select(asked).collect(engine="streaming").row(0, named=True)
    found = []
    for i, name in enumerate(columns):
        own = {key.split(" ", 1)[1]: value for key, value in answers.items() if key.split(" ", 1)[0] == str(i)}
        facts = Facts(name, types[name], staged.rows["train"], own, staged)
        found.append(_column(facts, given.get(name), separator))
    return found


def _column(facts: Facts, given: str | None, separator: str | None) -> Column:
    name, missing = facts.name, int(facts["missing"])
    unknown = facts.rows - int(facts.answers.get("candidates", facts.known))  # NA and the like, too
    if given == "list" or (given is None and _is_list(facts)):
        return _list(facts, separator)
    if facts.kind.is_nested() or facts.kind in (pl.Binary, pl.Object, pl.Null):
        if given is not None:
            raise ValueError(f"column '{name}' holds {facts.kind} and cannot be a {given}")
        return Column(name, "none", reason=f"holds {facts.kind}, of which no feature is made")
    if facts["values"] == 0:
        return Column(name, "none", reason="no training row has a value")
    if given is None and facts["values"] == 1 and not missing:
        return Column(name, "none", reason="constant in the training rows")
    kind = given or _kind(facts)
    if kind == "none":
        return Column(name, "none", reason=_reason(facts))
    if kind == "timestamp":
        unit = _unit(facts, given is not None)
        if unit is None:
            check_moments(facts)
        return Column(name, kind, unit=unit, missing=unknown)
    if kind == "number":
        check_numbers(facts)
        return Column(name, kind, missing=unknown, marks=marks_of(facts))
    return Column(name, "category", form=form_of(facts), missing=missing)


def form_of(facts: Facts) -> Form:
    """The form of a column's categories."""
    if facts.kind == pl.Boolean:
        return "boolean"
    if facts.kind.is_numeric():
        return "integer" if facts["whole"] + facts["infinite"] == facts.known or facts.kind.is_integer() else "text"
    if facts.kind.is_temporal() or not facts.staged.from_text:
        return "text"
    if facts["truths"] == facts.known:
        return "boolean"
    return "integer" if facts["whole"] == facts.known and not facts["zeros"] else "text"


def _kind(facts: Facts) -> str:
    """What a column holds that is no list, has two values or more, and of which nothing was said."""
    if facts.kind == pl.Boolean or facts.kind == pl.Duration or facts.kind.is_decimal():
        return "number"
    if facts.kind.is_temporal():
        return "category" if facts.kind == pl.Time else "timestamp"
    if not facts.kind.is_numeric():
        if facts["candidates"] and facts["moments"] == facts["candidates"]:
            return "timestamp"
        if facts["truths"] == facts.known:
            return "number"
        # types of Parquet and JSON are meant: text is a category there, whatever it looks like
        if not facts.staged.from_text or not _is_numbers(facts):
            return "none" if _reason(facts) else "category"
    if facts["whole"] < facts.known - _infinite(facts):
        return "number"
    return _whole_kind(facts)


def _infinite(facts: Facts) -> int:
    # tokens for missing numbers count as known text
    return int(facts["infinite"]) + (facts.known - int(facts["candidates"]) if "candidates" in facts.answers else 0)


def _is_numbers(facts: Facts) -> bool:
    """Whether text is numbers; an error where all but a few values are."""
    candidates = facts["candidates"]
    if not candidates or facts["zeros"]:
        return False
    numbers = facts[f"{marks_of(facts)} numbers"]
    if candidates > numbers >= 0.95 * candidates:
        check_numbers(facts)
    return bool(numbers == candidates)


def _whole_kind(facts: Facts) -> str:
    """Whether whole numbers are categories, moments or numbers."""
    words = _words(facts.name)
    least, most, values = facts["least"], facts["most"], facts["values"]
    if _unit(facts, forced=False) and words & set(_TIMES.split("|")):
        return "timestamp"
    if _reason(facts):
        return "none"
    if words & set(_IDS.split("|")) or facts.name.lower().endswith("id"):
        return "category"
    if words & set(_NUMBERS.split("|")) and values > 2:
        return "number"
    if most >= 2**31 or least < -(2**31) or values <= _FEW:
        return "category"
    is_dense_range = values > 1000 and values >= 0.5 * (most - least + 1) and facts.known >= 3 * values
    return "category" if is_dense_range else "number"


def _reason(facts: Facts) -> str:
    """Why a column of categories would teach nothing; empty where it may teach something."""
    if facts.known < 100 or facts["values"] < 0.9 * facts.known:
        is_text = "length" in facts.answers and facts["length"] > 40 and facts["values"] > 0.5 * facts.known
        return "free text, of which no feature is made" if is_text else ""
    if facts.kind.is_numeric() and not (_words(facts.name) & set(_IDS.split("|")) or facts.name.lower().endswith("id")):
        return ""
    column = pl.col(facts.name)
    exact = facts.staged.scan("train").select(column.drop_nulls().n_unique()).collect(engine="streaming").item()
    return "another value in (almost) every row" if exact >= 0.95 * facts.known else ""


def _words(name: str) -> set[str]:
    """The words of a name: userId, user_id and user.id are user and id."""
    return set(re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()))


def _unit(facts: Facts, forced: bool) -> Unit | None:
    """The unit of numbers that are moments between 1990 and 2100."""
    if facts.kind.is_temporal() or facts.answers.get("least") is None:
        return None
    if not facts.kind.is_numeric() and facts["plain numbers"] < facts["candidates"]:
        return None
    for unit, factor in _UNITS.items():
        if _LOW_YEAR * factor <= facts["least"] and facts["most"] <= _HIGH_YEAR * factor:
            return unit
    if forced:
        raise ValueError(
            f"--timestamps: column '{facts.name}' holds numbers from {facts['least']:g} to {facts['most']:g}, "
            "which are no times between 1990 and 2100 in seconds or parts of them; name it in --dense"
        )
    return None


def _is_list(facts: Facts) -> bool:
    if isinstance(facts.kind, pl.List | pl.Array):
        inner = facts.kind.inner
        return inner in (pl.String, pl.Categorical) or bool(inner.is_integer())
    if "with |" not in facts.answers or not facts.known:
        return False
    return facts["brackets"] == facts.known or facts["with |"] > 0.2 * facts.known


def _list(facts: Facts, separator: str | None) -> Column:
    name, missing = facts.name, int(facts["missing"])
    if isinstance(facts.kind, pl.List | pl.Array):
        inner = facts.kind.inner
        whole = inner.is_integer()
        return Column(name, "list", form="integer" if whole else "text", missing=missing)
    if "with |" not in facts.answers:
        raise ValueError(f"--lists: column '{name}' holds {facts.kind}, which is no list and no text of one")
    found = separator or next((mark for mark in SEPARATORS if facts[f"with {mark}"] > 0.01 * facts.known), "|")
    return Column(name, "list", separator=found, missing=missing)
