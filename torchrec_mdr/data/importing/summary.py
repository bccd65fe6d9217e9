"""What one wants to see of data before training: rows, label rates, ids, missing values and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from torchrec_mdr.data.features import DivisionPlan, FeaturePlan, SparsePlan, keys
from torchrec_mdr.data.features.plan import UNKNOWN
from torchrec_mdr.data.importing.decide import Decision
from torchrec_mdr.data.importing.kinds import Column
from torchrec_mdr.data.importing.staging import Staged
from torchrec_mdr.data.schema import SPLITS, domain_column
from torchrec_mdr.data.writer import split_path

_MOST_DOMAINS = 200
_MOST_FEATURES = 8  # whose ids are counted by domain
_BINS = 10
_TOP_IDS = 50


class Table(NamedTuple):
    """A table of texts, with a note below it."""

    title: str
    headers: list[str]
    lines: list[list[str]]
    note: str = ""


def summarise(folder: str, staged: Staged, decision: Decision) -> list[Table]:
    """The tables of a report.

    Args:
        folder (str): the prepared splits.
        staged (Staged): their raw rows.
        decision (Decision): what was decided.
    """
    plan = decision.plan
    splits = {split: pl.scan_parquet(split_path(folder, split)) for split in SPLITS}
    return [
        _rows(splits, plan),
        *(_domains(splits, plan, division) for division in plan.divisions),
        _ids(splits, plan),
        _missing(staged, decision),
        _drift(splits, plan),
    ]


def _rows(splits: Mapping[str, pl.LazyFrame], plan: FeaturePlan) -> Table:
    lines = []
    for split, rows in splits.items():
        label = pl.col(plan.label.name)
        count, rate = rows.select(pl.len(), label.mean().alias("rate")).collect(engine="streaming").row(0)
        lines.append([split, f"{count:,}", f"{rate:.4f}"])
    return Table("Rows and label rate", ["split", "rows", "label rate"], lines)


def _domains(splits: Mapping[str, pl.LazyFrame], plan: FeaturePlan, division: DivisionPlan) -> Table:
    domain, label = domain_column(division.name), pl.col(plan.label.name)
    features = [feature for feature in plan.sparse if feature.kind == "category" and feature.column != division.column]
    features = sorted(features, key=lambda feature: -feature.num_embeddings)[:_MOST_FEATURES]
    by_split = {}
    for split, rows in splits.items():
        # ids are counted where adapters learn them
        counted = [pl.col(f.name).n_unique().alias(f"ids {f.name}") for f in features if split == "train"]
        table = rows.group_by(domain).agg(pl.len().alias("rows"), label.mean().alias("rate"), *counted)
        by_split[split] = {row[domain]: row for row in table.collect(engine="streaming").iter_rows(named=True)}
    order = sorted(range(len(division.names)), key=lambda i: -by_split["train"].get(i, {"rows": 0})["rows"])
    lines = []
    for i in order[:_MOST_DOMAINS]:
        found = [by_split[split].get(i) for split in SPLITS]
        counts = [f"{row['rows']:,}" if row else "0" for row in found]
        rates = [f"{row['rate']:.4f}" if row else "" for row in found]
        ids = [f"{found[0][f'ids {f.name}']:,}" if found[0] else "0" for f in features]
        lines.append([division.names[i], *counts, *rates, *ids])
    headers = ["domain", *(f"rows, {split}" for split in SPLITS), *(f"label rate, {split}" for split in SPLITS)]
    note = f"The {_MOST_DOMAINS} largest of {len(order):,} domains." if len(order) > _MOST_DOMAINS else ""
    title = f"Domains of division {division.name}, largest first"
    return Table(title, [*headers, *(f"{f.name}: ids, train" for f in features)], lines, note)


def _ids(splits: Mapping[str, pl.LazyFrame], plan: FeaturePlan) -> Table:
    lines = []
    for feature in plan.sparse:
        cells = [feature.name, f"{feature.num_embeddings:,}"]
        shares = []
        for rows in splits.values():
            ids = pl.col(feature.name).explode() if feature.kind == "list" else pl.col(feature.name)
            unknown = (pl.col("id") == UNKNOWN).mean() if feature.vocabulary else pl.lit(None, pl.Float64)
            counts = rows.select(ids.alias("id")).select(pl.col("id").n_unique(), unknown.alias("unknown"))
            distinct, share = counts.collect(engine="streaming").row(0)
            cells.append(f"{distinct:,}")
            shares.append("" if share is None else f"{share:.2%}")
        lines.append([*cells, *shares])
    headers = ["feature", "ids", *(f"seen, {split}" for split in SPLITS), *(f"unknown, {split}" for split in SPLITS)]
    note = "Unknown: categories that are too rare in training rows, or not there."
    return Table("Ids of categorical features", headers, lines, note)


def _missing(staged: Staged, decision: Decision) -> Table:
    shares: dict[str, list[float]] = {}
    for split in SPLITS:
        rows = staged.scan(split)
        types = rows.collect_schema()
        asked = [_value(column, types[column.name]).is_null().mean().alias(column.name) for column in decision.columns]
        for name, share in rows.select(asked).collect(engine="streaming").row(0, named=True).items():
            shares.setdefault(name, []).append(share)
    lines = [[name, *(f"{share:.2%}" for share in found)] for name, found in shares.items() if any(found)]
    note = "" if lines else "No value is missing."
    return Table("Missing values", ["column", *SPLITS], lines, note)


def _value(column: Column, kind: pl.DataType) -> pl.Expr:
    """A column, null where nothing is known of it."""
    if column.kind == "number":
        return keys.number(column.name, kind, column.marks)
    if column.kind == "timestamp":
        return keys.moment(column.name, kind, column.unit)
    return pl.col(column.name) if kind.is_nested() else keys.key(column.name, kind, "text")


def _drift(splits: Mapping[str, pl.LazyFrame], plan: FeaturePlan) -> Table:
    lines = []
    for feature in plan.sparse:
        lines.append([feature.name, *(f"{value:.3f}" for value in _sparse_drift(splits, feature))])
    for name in (feature.name for feature in plan.dense):
        lines.append([name, *(f"{value:.3f}" for value in _dense_drift(splits, name))])
    lines.sort(key=lambda line: -float(line[-1]))
    note = (
        "Population stability index against the training rows, over the most frequent ids or ten equal parts of them. "
        "Below 0.1 little has changed, above 0.25 much."
    )
    return Table("Drift", ["feature", *SPLITS[1:]], lines, note)


def _sparse_drift(splits: Mapping[str, pl.LazyFrame], feature: SparsePlan) -> list[float]:
    ids = pl.col(feature.name).explode() if feature.kind == "list" else pl.col(feature.name)
    counts = {
        split: rows.select(ids.alias("id")).group_by("id").len().collect(engine="streaming")
        for split, rows in splits.items()
    }
    top = counts["train"].sort(["len", "id"], descending=[True, False]).head(_TOP_IDS)["id"]
    shares = {}
    for split, table in counts.items():
        known = dict(table.filter(pl.col("id").is_in(top.implode())).iter_rows())
        found = [known.get(i, 0) for i in top]
        shares[split] = np.array([*found, table["len"].sum() - sum(found)], dtype=float)
    return [stability(shares["train"], shares[split]) for split in SPLITS[1:]]


def _dense_drift(splits: Mapping[str, pl.LazyFrame], name: str) -> list[float]:
    value = pl.col(name)
    places = np.linspace(0, 1, _BINS + 1)[1:-1]
    cuts = splits["train"].select(value.quantile(p).alias(str(p)) for p in places).collect(engine="streaming").row(0)
    edges = sorted(set(cuts))
    counts = {}
    for split, rows in splits.items():
        above = rows.select(
            *((value > edge).sum().alias(str(i)) for i, edge in enumerate(edges)), pl.len().alias("all")
        )
        found = above.collect(engine="streaming").row(0)
        counts[split] = -np.diff([found[-1], *found[:-1], 0]).astype(float)
    return [stability(counts["train"], counts[split]) for split in SPLITS[1:]]


def stability(expected: Sequence[float] | np.ndarray, found: Sequence[float] | np.ndarray) -> float:
    """Population stability index of counts in bins: sum (q - p) ln(q / p), empty bins counting as half a row.

    Example::

        >>> round(stability([50, 50], [70, 30]), 3), stability([5, 5], [10, 10])
        (0.169, 0.0)
    """
    p, q = (np.maximum(np.asarray(counts, dtype=float), 0.5) for counts in (expected, found))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())
