"""What looks wrong in prepared rows, before anything is trained on them."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from torchrec_mdr.data.features import FeaturePlan, keys
from torchrec_mdr.data.importing.decide import Decision
from torchrec_mdr.data.importing.options import Request
from torchrec_mdr.data.importing.staging import Staged
from torchrec_mdr.data.schema import SPLITS, domain_column
from torchrec_mdr.data.writer import split_path
from torchrec_mdr.metrics.group_metrics import group_results
from torchrec_mdr.metrics.sorted_rows import Block

_SAMPLE = 200_000
_LEAK = 0.98  # AUC of one column alone
_REPEATED = 0.01
_AMBIGUOUS = (  # what all known values look like, what some hold, and what to say then
    (
        r"^\d{1,2}[/-]\d{1,2}[/-]\d{4}\b",
        r"\d",
        "its dates may have the day or the month first; write them as 2024-03-31",
    ),
    (r"^[+-]?\d{1,3}(,\d{3})?$", ",", "1,234 there may be 1234 or 1.234; write it so"),
)


def find_warnings(folder: str, staged: Staged, decision: Decision, asked: Request) -> list[str]:
    """One sentence each.

    Args:
        folder (str): the prepared splits.
        staged (Staged): their raw rows.
        decision (Decision): what was decided.
        asked (Request): what was asked for.
    """
    found = [*_leaks(folder, decision.plan), *_repeated_rows(staged, asked), *_times(staged, decision, asked)]
    found += _ambiguous(staged, decision, asked)
    return [*found, *_one_class(folder, decision.plan)]


def _leaks(folder: str, plan: FeaturePlan) -> Iterator[str]:
    """Columns that predict the label alone: a number by its order, a category by its mean label in other rows."""
    rows = pl.scan_parquet(split_path(folder, "train"))
    total = rows.select(pl.len()).collect().item()
    every = max(total // _SAMPLE, 1)
    names = [plan.label.name, *(f.name for f in plan.sparse if f.kind != "list"), *(f.name for f in plan.dense)]
    sample = rows.select(names).gather_every(every).collect(engine="streaming")
    label = sample[plan.label.name]
    is_odd = pl.Series(np.random.default_rng(0).random(sample.height) < 0.5)
    told: set[str] = set()
    columns = {feature.name: feature.column for feature in plan.sparse} | {f.name: f.column for f in plan.dense}
    for name, column in columns.items():
        if name not in sample.columns or column in told:
            continue
        if sample[name].dtype == pl.Float32:
            score, truth = sample[name], label
        else:
            one = sample.filter(is_odd).group_by(name).agg(pl.col(plan.label.name).mean().alias("rate"))
            other = sample.filter(~is_odd).join(one, on=name, how="left", maintain_order="left")
            score, truth = other["rate"].fill_null(label.mean()), other[plan.label.name]
        auc = _auc(score, truth)
        if auc is not None and max(auc, 1 - auc) > _LEAK:
            told.add(column)
            yield (
                f"column '{column}' predicts the label alone (AUC {max(auc, 1 - auc):.3f}); if it is not known "
                f"before the label, leave it out: {_option('--exclude', column)}"
            )


def _option(option: str, column: str) -> str:
    """An option that names a column, as a shell takes it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([column])
    return f"{option} {shlex.quote(text.getvalue())}"


def _auc(score: pl.Series, label: pl.Series) -> float | None:
    """AUC of a score; None for few rows of a class."""
    if label.sum() < 20 or len(label) - label.sum() < 20:
        return None
    rows = pl.DataFrame({"score": score.cast(pl.Float64), "label": label.cast(pl.Int64)}).sort("score", "label")
    ordered, positive = (torch.from_numpy(rows[name].to_numpy(writable=True)) for name in ("score", "label"))
    return float(group_results([Block(ordered, positive, torch.zeros_like(positive))], 1).auc[0])


def _repeated_rows(staged: Staged, asked: Request) -> Iterator[str]:
    columns = [name for name in staged.columns if asked.cut.by != "column" or name != asked.cut.column]

    def hashes(split: str) -> pl.LazyFrame:
        return staged.scan(split).select(pl.struct(columns).hash().alias("hash"))

    train = hashes("train").unique()
    for split in SPLITS[1:]:
        same = hashes(split).join(train, on="hash", how="semi").select(pl.len()).collect(engine="streaming").item()
        if same > _REPEATED * staged.rows[split]:
            yield (
                f"{same:,} of {staged.rows[split]:,} rows of split '{split}' are also training rows, the same in every "
                "column; remove duplicates before the rows are cut"
            )


def _times(staged: Staged, decision: Decision, asked: Request) -> Iterator[str]:
    moments = [column for column in decision.columns if column.kind == "timestamp"]
    own_files = len({id(table) for table in staged.tables.values()}) > 1
    if moments and asked.cut.by == "random" and not own_files:
        name = moments[0].name
        yield (
            f"rows are cut at random although column '{name}' is a time; to test on later rows, as a model in use "
            f"meets them, say --split {shlex.quote(f'time:{name}')}"
        )
        return
    if asked.cut.by == "time":
        return
    for column in moments:
        ranges = {}
        for split in SPLITS:
            rows = staged.scan(split)
            when = keys.moment(column.name, rows.collect_schema()[column.name], column.unit)
            ends = rows.select(when.min().alias("least"), when.max().alias("most"))
            ranges[split] = ends.collect(engine="streaming").row(0)
        first, last = ranges["test"][0], ranges["train"][1]
        if first is not None and last is not None and first < last:
            yield (
                f"times overlap: test rows begin at {first} in column '{column.name}', training rows end at {last}; "
                "check the split if the test is of later rows"
            )


def _ambiguous(staged: Staged, decision: Decision, asked: Request) -> Iterator[str]:
    """Text that became no number and no time since its form may mean two things."""
    rows = staged.scan("train")
    types = rows.collect_schema()
    asks = {}
    for name in (column.name for column in decision.columns if column.kind in ("category", "none")):
        if types[name] != pl.String or name in asked.kinds or name in asked.divisions:
            continue
        text = pl.col(name).str.strip_chars()
        known = text.filter(~text.str.to_lowercase().is_in(keys.MISSING_NUMBERS))
        for form, mark, words in _AMBIGUOUS:
            said = f"column '{name}' is read as mere text: {words}, or name it in --sparse"
            asks[said] = known.str.contains(form).all() & known.str.contains(mark).any()
    answers = rows.select(look.alias(said) for said, look in asks.items()).collect(engine="streaming")
    yield from (said for said in asks if answers[said].item())


def _one_class(folder: str, plan: FeaturePlan) -> Iterator[str]:
    for one in plan.divisions:
        if len(one.names) == 1:
            yield f"all training rows are in one domain of division '{one.name}', so there is nothing to tell apart"
    division = plan.divisions[0]
    domain, label = domain_column(division.name), plan.label.name
    for split in SPLITS:
        rate = (
            pl.scan_parquet(split_path(folder, split)).select(pl.col(label).mean()).collect(engine="streaming").item()
        )
        if rate in (0, 1):
            yield f"all labels of split '{split}' are {rate:g}, so AUC is undefined there; cut the rows anew"
            continue
        rates = pl.scan_parquet(split_path(folder, split)).group_by(domain).agg(pl.col(label).mean())
        table = rates.collect(engine="streaming").filter(pl.col(label).is_in([0.0, 1.0])).sort(domain)
        names = [f"'{division.names[i]}'" for i in table[domain]]
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            effect = "their adapters learn that alone" if split == "train" else "they have no AUC there"
            yield f"{len(names)} domain(s) have rows of one class only in split '{split}', {effect}: {shown}"
