"""Turns raw rows into ids and numbers, as a plan says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import TYPE_CHECKING

import polars as pl
from polars.exceptions import PolarsError

from torchrec_mdr.data.features import keys
from torchrec_mdr.data.features.plan import MISSING, WEIGHT, DensePlan, DivisionPlan, SparsePlan
from torchrec_mdr.data.schema import domain_column
from torchrec_mdr.data.tables import flat

if TYPE_CHECKING:
    from torchrec_mdr.data.features.plan import FeaturePlan

_INT32_IDS = 2**31
_NO_ID = "is unknown, and the features that were trained have no id for unknown values"


@dataclass(frozen=True)
class EncodedRows:
    """Raw rows in the form of the prepared data.

    Args:
        columns (pl.DataFrame): [n], every column of the schema; label and weight only where they were asked for. Where
            a row is bad, neutral values that are finite and in range.
        errors (pl.Series): String [n], null where the row is good, or else what is wrong with it.
        unknown (pl.DataFrame): Boolean [n], a column a division: whether the row's domain is unknown, its id -1.
        names (pl.DataFrame): String [n], a column a division: the name of the row's domain, known or not.
    """

    columns: pl.DataFrame
    errors: pl.Series
    unknown: pl.DataFrame
    names: pl.DataFrame

    def __len__(self) -> int:
        return len(self.errors)


class Encoder:
    """Encodes rows by a plan; see :meth:`FeaturePlan.encode`."""

    def __init__(self, plan: FeaturePlan) -> None:
        self.plan = plan

    def __call__(self, frame: pl.DataFrame, need_label: bool = False) -> EncodedRows:
        """Raw rows -> :class:`EncodedRows`."""
        plan = self.plan
        if any(isinstance(kind, pl.Struct) for kind in frame.schema.values()):
            frame = flat(frame.lazy()).collect()
        missing = [f"'{name}'" for name in plan.raw_columns(need_label) if name not in frame.columns]
        if missing:
            raise ValueError(f"the rows have no column {', '.join(missing)}, which training rows had")
        columns: dict[str, pl.Series] = {}
        errors = [pl.repeat(None, frame.height, dtype=pl.String, eager=True).alias("error")]
        if need_label:
            columns[plan.label.name] = self._label(frame, errors)
            if plan.weight is not None:
                columns[WEIGHT] = self._weight(frame, plan.weight, errors)
        for feature in plan.sparse:
            columns[feature.name] = self._sparse(frame, feature, errors)
        for number in plan.dense:
            columns[number.name] = self._dense(frame, number, errors)
        unknown, names = {}, {}
        for division in plan.divisions:
            names[division.name] = _domain_names(frame, division)
            ids = self._domains(names[division.name], division)
            columns[domain_column(division.name)] = ids
            unknown[division.name] = ids == -1
        first = pl.DataFrame(errors).select(pl.coalesce(pl.all())).to_series()
        return EncodedRows(
            columns=pl.DataFrame([values.alias(name) for name, values in columns.items()]),
            errors=first.alias("error"),
            unknown=pl.DataFrame([values.alias(name) for name, values in unknown.items()]),
            names=pl.DataFrame([values.alias(name) for name, values in names.items()]),
        )

    def _sparse(self, frame: pl.DataFrame, feature: SparsePlan, errors: list[pl.Series]) -> pl.Series:
        kind = frame.schema[feature.column]
        small = pl.Int32 if feature.num_embeddings <= _INT32_IDS else pl.Int64
        if feature.kind == "domain":
            return self._domain_feature(frame, feature, errors)
        if feature.kind == "time":
            assert feature.part is not None
            when = _moments(frame, feature, errors)
            part = {"hour": when.dt.hour(), "weekday": when.dt.weekday() - 1, "month": when.dt.month() - 1}
            return (part[feature.part].cast(pl.Int32) + 1).fill_null(0)
        if feature.kind == "category":
            values = frame.select(keys.key(feature.column, kind, feature.form)).to_series()
            ids = self._ids(values, feature)
            if feature.unknown is None:
                _note(errors, frame, feature.column, ids.is_null(), _NO_ID)
                ids = ids.fill_null(0)
            return ids.cast(small)
        listed = frame.select(
            keys.items(feature.column, kind, feature.separator, feature.form, feature.max_length)
        ).to_series()
        lengths = listed.list.len()
        flat = listed.drop_nulls().explode(empty_as_null=False)
        ids = self._ids(flat, feature).cast(small)
        by_row = pl.DataFrame({"row": pl.arange(0, len(listed), eager=True), "length": lengths})
        filled = by_row.filter(pl.col("length") > 0)
        rows = filled.select(pl.col("row").repeat_by("length").explode())["row"]
        grouped = pl.DataFrame({"row": rows, "id": ids}).group_by("row", maintain_order=True).agg("id")
        joined = by_row.join(grouped, on="row", how="left", maintain_order="left")
        empty = pl.lit([], pl.List(small))
        none = pl.lit([MISSING if feature.has_missing else feature.unknown], pl.List(small))
        return joined.select(
            pl.when(pl.col("length").is_null()).then(none).when(pl.col("length") == 0).then(empty).otherwise("id")
        ).to_series()

    def _ids(self, values: pl.Series, feature: SparsePlan) -> pl.Series:
        """Ids; null where a value is unknown and the feature has no id for that."""
        if feature.vocabulary is None:
            return hashed(values, feature.num_embeddings)
        ids = self.plan.vocabularies.ids(feature.vocabulary, values)
        if feature.unknown is not None:
            ids = ids.fill_null(feature.unknown)
        if not feature.has_missing:
            return ids
        return pl.select(pl.when(values.is_null()).then(MISSING).otherwise(ids)).to_series()

    def _domain_feature(self, frame: pl.DataFrame, feature: SparsePlan, errors: list[pl.Series]) -> pl.Series:
        division = next(division for division in self.plan.divisions if division.name == feature.division)
        ids, known = self._domains(_domain_names(frame, division), division), len(division.names)
        if feature.num_embeddings > known:
            return ids.replace(-1, known)
        _note(errors, frame, feature.column, ids == -1, _NO_ID)
        return ids.replace(-1, 0)

    def _dense(self, frame: pl.DataFrame, feature: DensePlan, errors: list[pl.Series]) -> pl.Series:
        value = frame.select(keys.number(feature.column, frame.schema[feature.column], feature.marks).alias("x"))
        if feature.kind == "missing":
            return value["x"].is_null().cast(pl.Float32)
        bad = value["x"].is_infinite().fill_null(False)
        _note(errors, frame, feature.column, bad, "is no finite number")
        x = pl.when(bad).then(None).otherwise(pl.col("x")).fill_null(feature.median)
        if feature.least > -math.inf:
            x = x.clip(feature.least)
        if feature.log1p:
            x = log1p(x)
        scaled = ((x - feature.mean) / feature.std).clip(-feature.clip, feature.clip)
        return value.select(scaled.cast(pl.Float32)).to_series()

    def _domains(self, values: pl.Series, division: DivisionPlan) -> pl.Series:
        ids = self.plan.vocabularies.ids(division.vocabulary, values)
        if division.others is not None:
            ids = ids.fill_null(division.others)
        if division.missing is not None:
            ids = pl.select(pl.when(values.is_null()).then(division.missing).otherwise(ids)).to_series()
        return ids.fill_null(-1).cast(pl.Int32)

    def _label(self, frame: pl.DataFrame, errors: list[pl.Series]) -> pl.Series:
        label = self.plan.label
        if label.rule is not None:
            holds = by_rule(frame, label.rule)
            _note(
                errors,
                frame,
                None,
                holds.is_null(),
                f"the label's rule {label.rule} gives nothing, as a value is missing or no number",
            )
            return holds.fill_null(False).cast(pl.Float32)
        assert label.column is not None
        value = frame.select(keys.number(label.column, frame.schema[label.column])).to_series()
        good = (value == 1) | (value == label.negative)
        _note(errors, frame, label.column, ~good.fill_null(False), f"is no label, which is {label.negative} or 1")
        return (value == 1).fill_null(False).cast(pl.Float32)

    def _weight(self, frame: pl.DataFrame, column: str, errors: list[pl.Series]) -> pl.Series:
        value = frame.select(keys.number(column, frame.schema[column])).to_series()
        good = (value.is_finite() & (value >= 0)).fill_null(False)
        _note(errors, frame, column, ~good, "is no weight, which is a finite number of at least 0")
        scaled = pl.select(pl.when(good).then(value / self.plan.weight_mean).otherwise(0.0)).to_series()
        return scaled.cast(pl.Float32)


def _domain_names(frame: pl.DataFrame, division: DivisionPlan) -> pl.Series:
    return frame.select(keys.key(division.column, frame.schema[division.column], division.form)).to_series()


def hashed(values: pl.Series, num_embeddings: int) -> pl.Series:
    """Ids by hashing: 0 where a value is null, otherwise one of [1, num_embeddings), the same on every machine."""
    distinct = values.unique().drop_nulls()
    buckets = [
        1 + int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % (num_embeddings - 1)
        for text in distinct
    ]
    return values.replace_strict(
        distinct, pl.Series(buckets, dtype=pl.Int64), default=None, return_dtype=pl.Int64
    ).fill_null(0)


def log1p(x: pl.Expr) -> pl.Expr:
    """sign(x) log(1 + |x|), which is log1p where x is positive."""
    return x.sign() * x.abs().log1p()


def by_rule(frame: pl.DataFrame, rule: str) -> pl.Series:
    """Whether a condition in SQL's words holds, row by row.

    Text of a column that is compared with numbers, as CSV has it, is read as numbers.

    Raises:
        ValueError: the condition cannot be read, or is none.
    """
    try:
        expression = pl.sql_expr(rule)
        names = [name for name in expression.meta.root_names() if frame.schema[name] == pl.String]
        holds, refused = None, None
        # as they are; or one, two, ... of the columns as numbers
        for count in range(len(names) + 1):
            for chosen in combinations(names, count):
                values = {name: keys.number(name, pl.String()) for name in chosen}
                # what is no number meets no condition and fails none
                numbers = [pl.when(value.is_finite()).then(value).alias(name) for name, value in values.items()]
                try:
                    holds = frame.with_columns(numbers).select(expression.alias("rule"))["rule"]
                    break
                except PolarsError as error:
                    refused = refused or error
            if holds is not None:
                break
        if holds is None:
            assert refused is not None
            raise refused
    except PolarsError as error:
        raise ValueError(
            f"--label_rule '{rule}' cannot be read: {' '.join(str(error).split())[:200]}; write a condition such as "
            "rating > 3"
        ) from error
    if holds.dtype != pl.Boolean:
        raise ValueError(f"--label_rule '{rule}' is no condition; write one such as rating > 3")
    return holds


def _moments(frame: pl.DataFrame, feature: SparsePlan, errors: list[pl.Series]) -> pl.Series:
    kind = frame.schema[feature.column]
    when = frame.select(keys.moment(feature.column, kind, feature.unit)).to_series()
    text = frame.select(pl.col(feature.column).cast(pl.String).str.strip_chars().str.to_lowercase()).to_series()
    given = text.is_not_null() & ~text.is_in(keys.MISSING_NUMBERS)
    _note(errors, frame, feature.column, given & when.is_null(), "is no date or time")
    return when


def _note(errors: list[pl.Series], frame: pl.DataFrame, column: str | None, bad: pl.Series, complaint: str) -> None:
    """Adds a reason for the rows where a mask is true."""
    if not bad.any():
        return
    if column is None:
        reason = pl.lit(complaint)
    else:
        shown = pl.format("'{}'", pl.col(column).cast(pl.String).str.slice(0, 60)).fill_null("a missing value")
        reason = pl.lit(f"column '{column}': ") + shown + pl.lit(f" {complaint}")
    errors.append(frame.select(pl.when(bad).then(reason).alias(f"error{len(errors)}")).to_series())
