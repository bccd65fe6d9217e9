"""From what columns hold to a feature plan: vocabularies, scaling and domains, all from training rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import polars as pl
from tqdm import tqdm

from torchrec_mdr.data.features import DensePlan, DivisionPlan, FeaturePlan, SparsePlan, Vocabularies, keys
from torchrec_mdr.data.features.encode import log1p
from torchrec_mdr.data.features.plan import FIRST_KNOWN, TIME_PARTS, WEIGHT
from torchrec_mdr.data.importing.kinds import Column, infer
from torchrec_mdr.data.importing.options import Request
from torchrec_mdr.data.importing.staging import ROW, Staged
from torchrec_mdr.data.schema import domain_column

MAX_DOMAINS = 10_000
RARE, NO_VALUE = "(rare)", "(missing)"
_SKEWED = 2.0


@dataclass(frozen=True)
class Decision:
    """A plan, and what each column was taken for.

    Args:
        plan (FeaturePlan): the plan.
        columns (tuple[Column, ...]): the raw columns that may be features, in the table's order.
        known (dict[str, int]): categories of each vocabulary in the training rows, rare ones too.
    """

    plan: FeaturePlan
    columns: tuple[Column, ...]
    known: dict[str, int]


def decide(staged: Staged, asked: Request, dataset: str, progress: bool) -> Decision:
    """Decides about all columns.

    Args:
        staged (Staged): the rows.
        asked (Request): what the user asks for.
        dataset (str): name of the data set.
        progress (bool): whether to show a bar.

    Raises:
        ValueError: a column is not what it is called, there are too many domains, or no feature is left.
    """
    label = FeaturePlan("rows", staged.label, (), (), ()).label_columns()
    no_features = {*label, asked.label, asked.weight, asked.cut.column if asked.cut.by == "column" else None}
    for name in asked.kinds:
        if name in no_features:
            raise ValueError(f"column '{name}' is named as a feature, but it makes the label, the weight or the split")
    names = [name for name in staged.columns if name not in no_features]
    for name in asked.divisions:
        if name in label and asked.label_rule is None:
            raise ValueError(f"column '{name}' is the label and cannot divide the rows, too")
    given = {**{name: "category" for name in asked.divisions}, **asked.kinds}
    columns = infer(staged, names, given, asked.separator)
    by_name = {column.name: column for column in columns}
    for name in (name for group in asked.shared for name in group):
        if name in by_name and by_name[name].kind in ("number", "timestamp"):
            raise ValueError(
                f"--share: column '{name}' is a {by_name[name].kind}, and only categories share a vocabulary; name it "
                "in --sparse, too, or leave it out"
            )
    left_out = {name: "makes the label" for name in label if name not in asked.divisions}
    if asked.label in staged.columns and asked.label not in label:
        left_out[asked.label] = "has the label's name, which a rule makes"
    left_out |= {column.name: column.reason for column in columns if column.kind == "none"}
    builder = _Builder(staged, asked)
    with tqdm(
        total=len(columns) + len(asked.divisions), desc="columns", leave=False, disable=None if progress else True
    ) as bar:
        divisions = []
        for name in asked.divisions:
            divisions.append(builder.division(by_name.get(name) or Column(name, "category")))
            bar.update()
        dense = builder.numbers([column for column in columns if column.kind == "number"])
        sparse = builder.times([column for column in columns if column.kind == "timestamp"])
        for column in columns:
            if column.kind in ("category", "list"):
                if column.name in asked.divisions and not asked.domain_feature:
                    left_out[column.name] = "divides the rows, and is no feature (--domain_feature false)"
                else:
                    sparse += builder.categories(column)
            bar.update()
    left_out |= builder.left_out
    order = {name: place for place, name in enumerate(names)}
    sparse.sort(key=lambda feature: order[feature.column])
    dense.sort(key=lambda feature: order[feature.column])
    if not sparse:
        raise ValueError("no column is a category, and a backbone needs at least one; name one with --sparse")
    plan = FeaturePlan(
        dataset=dataset,
        label=staged.label,
        sparse=tuple(sparse),
        dense=tuple(dense),
        divisions=tuple(divisions),
        weight=asked.weight,
        weight_mean=1.0 if asked.weight is None else _weight_mean(staged, asked.weight),
        left_out=left_out,
        vocabularies=Vocabularies(builder.vocabularies),
    )
    return Decision(_with_free_names(plan), tuple(columns), builder.known)


class _Builder:
    """Makes the parts of a plan, and gathers vocabularies and what is left out."""

    def __init__(self, staged: Staged, asked: Request) -> None:
        self.staged = staged
        self.asked = asked
        self.rows = staged.scan("train")
        self.types = self.rows.collect_schema()
        self.vocabularies: dict[str, pl.DataFrame] = {}
        self.known: dict[str, int] = {}
        self.left_out: dict[str, str] = {}

    def division(self, column: Column) -> DivisionPlan:
        """A division by a column's values."""
        name = column.name
        if column.kind != "category":
            what = column.reason if column.kind == "none" else f"it is a {column.kind}"
            raise ValueError(f"column '{name}' cannot divide the rows: {what}; name another column")
        counts = self._counts(name, self._key(column))
        fractional = counts["value"].str.contains(r"^[+-]?\d*\.\d+(e[+-]?\d+)?$")
        if fractional.any() and fractional.mean() > 0.5:  # type: ignore[operator]
            raise ValueError(
                f"column '{name}' holds fractional numbers, and each would be a domain; make a column of ranges first"
            )
        few = counts.filter(pl.col("len") < self.asked.min_rows)
        many = counts.filter(pl.col("len") >= self.asked.min_rows)
        if column.form == "integer":
            many = many.sort(pl.col("value").cast(pl.Int64, strict=False), "value")
        else:
            many = many.sort("value")
        names = many["value"].to_list()
        missing = None
        rare_id = pl.repeat(len(names), few.height, dtype=pl.Int64, eager=True)
        pooled = pl.DataFrame({"value": few["value"], "id": rare_id})
        if few.height:
            names.append(RARE)
        if column.missing:
            missing = len(names)
            names.append(NO_VALUE)
        if len(names) > MAX_DOMAINS:
            raise ValueError(
                f"column '{name}' has {len(names):,} different values in the training rows, and at most "
                f"{MAX_DOMAINS:,} domains can be trained; pool rare ones with --min_rows, or name another column"
            )
        table = pl.DataFrame({"value": many["value"], "id": pl.arange(0, many.height, dtype=pl.Int64, eager=True)})
        division = DivisionPlan(name, name, tuple(names), column.form, missing)
        self.vocabularies[division.vocabulary] = pl.concat([table, pooled])
        return division

    def categories(self, column: Column) -> list[SparsePlan]:
        """A categorical feature, of one value a row or a list of them."""
        name, asked = column.name, self.asked
        options = {
            "kind": "list" if column.kind == "list" else "category",
            "form": column.form,
            "has_missing": bool(column.missing),
            "separator": column.separator,
            "max_length": asked.max_length if column.kind == "list" else 0,
            "pooling": asked.pooling,
        }
        if name in asked.hashed:
            return [SparsePlan(name, name, asked.hashed[name], **options)]  # type: ignore[arg-type]
        group = next((group for group in asked.shared if name in group), (name,))
        vocabulary = group[0]
        if vocabulary not in self.vocabularies:
            self._vocabulary(vocabulary, group, column)
        size = self.vocabularies[vocabulary].height
        if not size and name not in asked.divisions:
            self.left_out[name] = f"no value is in {asked.min_count} training rows (--min_count)"
            return []
        if size == 1 and name in asked.divisions and not column.missing:
            self.left_out[name] = "constant in the training rows"
            return []
        return [SparsePlan(name, name, FIRST_KNOWN + size, vocabulary=vocabulary, **options)]  # type: ignore[arg-type]

    def _vocabulary(self, vocabulary: str, group: Sequence[str], column: Column) -> None:
        parts = []
        for member in group:
            parts.append(self._counts(member, self._key(replace(column, name=member))))
        counts = pl.concat(parts).group_by("value").agg(pl.col("len").sum())
        least = 1 if column.name in self.asked.divisions else self.asked.min_count
        kept = counts.filter(pl.col("len") >= least).sort(["len", "value"], descending=[True, False])
        ids = pl.arange(FIRST_KNOWN, FIRST_KNOWN + kept.height, dtype=pl.Int64, eager=True)
        self.vocabularies[vocabulary] = pl.DataFrame({"value": kept["value"], "id": ids})
        self.known[vocabulary] = counts.height

    def _key(self, column: Column) -> pl.Expr:
        kind = self.types[column.name]
        if column.kind == "list" or kind.is_nested():
            return keys.items(column.name, kind, column.separator, column.form, self.asked.max_length).explode()
        return keys.key(column.name, kind, column.form)

    def _counts(self, name: str, key: pl.Expr) -> pl.DataFrame:
        grouped = self.rows.select(key.alias("value")).drop_nulls().group_by("value").len()
        return grouped.collect(engine="streaming").select("value", pl.col("len").cast(pl.Int64))

    def times(self, columns: Iterable[Column]) -> list[SparsePlan]:
        """Parts of moments that differ between training rows: hour, weekday, month."""
        features = []
        for column in columns:
            when = keys.moment(column.name, self.types[column.name], column.unit)
            parts = {"hour": when.dt.hour(), "weekday": when.dt.weekday(), "month": when.dt.month()}
            values = self.rows.select(part.n_unique().alias(name) for name, part in parts.items())
            counts = values.collect(engine="streaming").row(0, named=True)
            made = [
                SparsePlan(
                    f"{column.name}_{part}",
                    column.name,
                    size + 1,
                    kind="time",
                    part=part,
                    unit=column.unit,
                    has_missing=bool(column.missing),
                )
                for part, size in TIME_PARTS.items()
                if counts[part] > 1
            ]
            if not made:
                self.left_out[column.name] = "all training rows have the same hour, weekday and month"
            features += made
        return features

    def numbers(self, columns: Sequence[Column]) -> list[DensePlan]:
        """Numbers with their scaling, and marks of missing ones."""
        if not columns:
            return []
        values = {c.name: keys.number(c.name, self.types[c.name], c.marks) for c in columns}
        forms = {(name, log): log1p(value) if log else value for name, value in values.items() for log in (False, True)}
        moments = self.rows.select(
            *(form.mean().alias(f"mean {log} {name}") for (name, log), form in forms.items()),
            *(form.std(ddof=0).alias(f"std {log} {name}") for (name, log), form in forms.items()),
        )
        first = moments.collect(engine="streaming").row(0, named=True)
        thirds = self.rows.select(
            (((form - first[f"mean {log} {name}"]) / (first[f"std {log} {name}"] or 1)) ** 3)
            .mean()
            .alias(f"{log} {name}")
            for (name, log), form in forms.items()
        )
        skew = thirds.collect(engine="streaming").row(0, named=True)
        features = []
        for column in columns:
            name = column.name
            log = abs(skew[f"False {name}"]) > _SKEWED and abs(skew[f"True {name}"]) < abs(skew[f"False {name}"])
            mean, std = first[f"mean {log} {name}"], first[f"std {log} {name}"]
            median = self.rows.select(values[name].median()).collect(engine="streaming").item()
            if std > 1e-9 * max(abs(mean), 1e-30):
                features.append(DensePlan(name, name, log1p=log, median=median, mean=mean, std=std, marks=column.marks))
            elif not column.missing:
                self.left_out[name] = "constant in the training rows"
            if column.missing:
                features.append(DensePlan(f"{name}_missing", name, "missing"))
        return features


def _weight_mean(staged: Staged, weight: str) -> float:
    rows = staged.scan("train")
    mean = rows.select(keys.number(weight, rows.collect_schema()[weight]).mean()).collect(engine="streaming").item()
    if not mean:
        raise ValueError(f"--weight: column '{weight}' is 0 in all training rows, so that none would count")
    return float(mean)


def _with_free_names(plan: FeaturePlan) -> FeaturePlan:
    """The plan with names of features that meet neither each other nor another column of the prepared data."""
    taken = {plan.label.name, WEIGHT, ROW, *(domain_column(division.name) for division in plan.divisions)}

    def free(name: str) -> str:
        tries = (name if number == 1 else f"{name}_{number}" for number in count(1))
        found = next(tried for tried in tries if tried not in taken)
        taken.add(found)
        return found

    return replace(
        plan,
        sparse=tuple(replace(feature, name=free(feature.name)) for feature in plan.sparse),
        dense=tuple(replace(feature, name=free(feature.name)) for feature in plan.dense),
    )
