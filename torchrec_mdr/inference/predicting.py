"""From a table of raw rows to their scores and metrics, some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.feature_files import has_features
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.features.plan import WEIGHT
from torchrec_mdr.data.schema import domain_column
from torchrec_mdr.data.tables import RawTable, open_table
from torchrec_mdr.inference.prepared_rows import PreparedRows
from torchrec_mdr.inference.run import Run
from torchrec_mdr.inference.scorer import Scorer
from torchrec_mdr.inference.scoring import BundleScorer, RowScores, RunScorer
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.registry import METRICS

ADDED = ("score", "unknown_domain", "reason")
STRANGERS = "(unknown)"  # the domains that training did not know, in tables of metrics
Plan = FeaturePlan | PreparedRows


def plan_of(run: Run | Scorer, table: RawTable, need_label: bool = False) -> Plan:
    """How a table's rows become what the model takes: by the run's feature plan, or as they are.

    Rows that are prepared already are taken where the run has no plan, or where they lack what it reads.
    """
    prepared = PreparedRows(run.schema)
    if not has_features(run.folder):
        return prepared
    plan = FeaturePlan.load(run.folder)
    raw, ready = (set(one.raw_columns(need_label)) <= set(table.columns) for one in (plan, prepared))
    return prepared if ready and not raw else plan


def table_of(rows: Any) -> RawTable:
    """A table of paths or of a frame; see :func:`~torchrec_mdr.data.tables.open_table`."""
    listed = rows if isinstance(rows, list | tuple) else [rows]
    if all(isinstance(path, str | os.PathLike) for path in listed):
        return open_table([os.fspath(path) for path in listed])
    return RawTable.from_frame(rows)


def predicted(run: Run | Scorer, table: RawTable, keep: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
    """Scores of a table's rows, in their order and number.

    Args:
        run (Run | Scorer): see :func:`~torchrec_mdr.inference.load_run`; or an open bundle.
        table (RawTable): raw rows; a label is not needed.
        keep (Sequence[str]): columns of the table to give back beside the scores; `*` is all of them.

    Yields:
        pl.DataFrame: the kept columns; `score`, the probability of a positive label, Float64, null where a row is bad;
        `unknown_domain`, the divisions whose domain training did not know, null where it knew all; `reason`, why a row
        has no score, null where it has one.

    Raises:
        ValueError: a column is missing, or a file is damaged.
    """
    plan, scorer = plan_of(run, table), RunScorer(run) if isinstance(run, Run) else BundleScorer(run)
    kept = _kept(table, keep)
    columns = _require(plan, table, need_label=False)
    empty = True
    for frame in _batches(table, list(dict.fromkeys([*kept, *columns])), "predict"):
        empty = False
        scores = scorer(plan.encode(frame))
        yield pl.DataFrame([*frame.select(kept), scores.probabilities, scores.unknown, scores.reasons])
    if empty:
        none = {"score": pl.Float64, "unknown_domain": pl.String, "reason": pl.String}
        yield pl.DataFrame(schema={**{name: table.types[name] for name in kept}, **none})


def evaluated(run: Run, table: RawTable) -> dict[str, Any]:
    """Metrics of a table's labelled rows, by the run's natural division.

    Rows of domains that training did not know come under `(unknown)`, scored by the backbone. Bad rows are left out and
    counted.

    Args:
        run (Run): see :func:`~torchrec_mdr.inference.load_run`.
        table (RawTable): raw rows with their labels.

    Returns:
        dict: `model` and, where there is one, `backbone`, in the form of `test` in `metrics.json`; `left_out`, how many
        rows are bad; `first_left_out`, where the first one lies and what is wrong with it.

    Raises:
        ValueError: a column is missing, a file is damaged, or no row can be scored.
    """
    plan, scorer, natural = plan_of(run, table, need_label=True), RunScorer(run), run.divisions[0]
    further = {name: METRICS[name] for name in run.config.metrics}
    compared = run.experiment.method.keeps_backbone(run.divisions)
    names = natural.domain_names
    metrics = {title: DomainMetrics(names, further) for title in ["model", *(["backbone"] if compared else [])]}
    left_out, first, start, has_strangers = 0, None, 0, False
    for frame in _batches(table, _require(plan, table, need_label=True), "evaluate"):
        encoded = plan.encode(frame, need_label=True)
        scores = {title: scorer(encoded, Route.BASE if title == "backbone" else None) for title in metrics}
        good = np.isfinite(scores["model"].logits)
        if not good.all():
            left_out += int((~good).sum())
            row = int(np.flatnonzero(~good)[0])
            first = first or f"{table.place(start + row)}: {_reason(scores['model'], row)}"
        ids = encoded.columns[domain_column(natural.name)].to_numpy()
        ids = np.where(encoded.unknown[natural.name].to_numpy(), natural.num_domains, ids)[good]
        labels = encoded.columns[run.schema.label].to_numpy()[good]
        weights = None
        if plan.weight is not None:
            column = WEIGHT if isinstance(plan, FeaturePlan) else plan.weight
            weights = torch.from_numpy(encoded.columns[column].to_numpy()[good])
        has_strangers |= bool((ids == natural.num_domains).any())
        for title, metric in metrics.items():
            logits = torch.from_numpy(scores[title].logits[good])
            metric.update(logits, torch.from_numpy(labels), torch.from_numpy(ids.astype(np.int32)), weights)
        start += frame.height
    if left_out == start:
        raise ValueError(f"no row can be evaluated{f'; the first: {first}' if first else ': there is none'}")
    if has_strangers:
        names = DomainMetrics([*names, STRANGERS]).domain_names
    results: dict[str, Any] = {}
    for title, metric in metrics.items():
        metric.domain_names = tuple(names)
        results[title] = metric.compute().to_dict()
        metric.reset()
    return {"backbone": None, **results, "left_out": left_out, "first_left_out": first}


def _reason(scores: RowScores, row: int) -> str:
    return str(scores.reasons[row] or "its score is no finite number")


def _kept(table: RawTable, keep: Sequence[str]) -> list[str]:
    kept = list(table.columns) if list(keep) == ["*"] else list(dict.fromkeys(keep))
    for name in kept:
        if name not in table.columns:
            raise ValueError(f"--keep names the column '{name}', which the rows lack; they have {_list(table.columns)}")
        if name in ADDED:
            raise ValueError(f"--keep names the column '{name}', as which a column of scores is named; leave it out")
    return kept


def _require(plan: Plan, table: RawTable, need_label: bool) -> list[str]:
    """The columns that are needed, which a table must have."""
    columns = plan.raw_columns(need_label)
    missing = [name for name in columns if name not in table.columns]
    if missing and isinstance(plan, PreparedRows):
        plan.encode(pl.DataFrame(schema=dict.fromkeys(table.columns, pl.String)), need_label)  # says what is needed
    table.require(columns)
    return columns


def _batches(table: RawTable, columns: list[str], title: str) -> Iterator[pl.DataFrame]:
    total = table.known_rows()
    with tqdm(desc=title, total=total, unit=" rows", unit_scale=True, leave=False, mininterval=0.5) as bar:
        for frame in table.batches(columns=columns):
            yield frame
            bar.update(frame.height)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
