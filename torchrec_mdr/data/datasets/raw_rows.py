"""From raw rows to prepared ones: vocabularies, domains and scales from the training rows, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from torchrec_mdr.data.datasets.staged_rows import StagedRows
from torchrec_mdr.data.features import DensePlan, DivisionPlan, FeaturePlan, LabelPlan, SparsePlan, Vocabularies
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.writer import write_split
from torchrec_mdr.storage import remove_folder

LABEL = "label"
MISSING = "missing"  # name of the domain of rows whose column is empty
RARE = "rare"  # name of the domain that those of fewer than min_rows training rows become
UNKNOWN = 0  # id of a value that is missing, or rarer in training rows than min_count


@dataclass(frozen=True)
class Activity:
    """A division, `activity`, by how often a value is in training rows; values that none has are in the first domain.

    Args:
        column (str): one of the sparse features, such as user.
        more_than (int): a value in more training rows than this is active.
        names (tuple[str, str]): of the domains of other values, and of active ones.
    """

    column: str
    more_than: int
    names: tuple[str, str]


@dataclass(frozen=True)
class RawRows:
    """Rows of a data set, read lazily, and what its columns are.

    Args:
        splits (Mapping[str, pl.LazyFrame]): of each split, its rows: `label`, and the columns named below.
        sparse (tuple[str, ...]): columns of texts, one sparse feature each; the natural domain is one more, `domain`.
        dense (tuple[str, ...]): columns of numbers; null counts as 0 once scaled.
        divisions (tuple[str, ...]): columns of texts, the natural one first; every text is a domain.
        activity (Activity | None): one more division, the last.
        min_count (int): how often training rows must have a value for it to get an id of its own; rarer ones share the
            id of unknown values, which is so trained.
        min_rows (int): how many training rows a domain needs to be one of its own.
        scaling (Literal): of dense features: `range` moves them to [0, 1] by the training rows' smallest and largest
            value, `log1p` is log(1 + max(x, 0)), `none` leaves them.
        raw_label (LabelPlan): how raw rows that are evaluated later say the label.
        raw_names (Mapping[str, str]): what columns are called in raw rows that are scored later, where that differs.
        source (dict[str, Any]): how the data were made, for the schema.
    """

    splits: Mapping[str, pl.LazyFrame]
    sparse: tuple[str, ...]
    dense: tuple[str, ...] = ()
    divisions: tuple[str, ...] = ()
    activity: Activity | None = None
    min_count: int = 2
    min_rows: int = 1
    scaling: Literal["range", "log1p", "none"] = "range"
    raw_label: LabelPlan = LabelPlan(LABEL, LABEL)
    raw_names: Mapping[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: str, dataset: str) -> None:
        """Writes the three splits, `schema.json` and `features.yaml` into an existing folder.

        An auxiliary division is left out if another split has a domain of it that training rows lack. While it works,
        the folder also holds a copy of the rows' columns.

        Raises:
            ValueError: a split without rows, or a natural domain that training rows lack.
        """
        texts = tuple(dict.fromkeys((*self.sparse, *self.divisions)))
        aside = f"{folder}/raw"
        try:
            staged = StagedRows.write(aside, self.splits, (LABEL, *texts, *self.dense), texts)
            plan = self._plan(dataset, staged)
            rows = {split: write_split(folder, split, _encoded(plan, staged, split)) for split in SPLITS}
        finally:
            remove_folder(aside)
        self._for_raw_rows(plan).save(folder)
        plan.schema(rows, self.source).save(folder)

    def _plan(self, dataset: str, staged: StagedRows) -> FeaturePlan:
        """How the staged rows become features, from the training rows."""
        vocabularies: dict[str, pl.DataFrame] = {}
        divisions = [self._division(name, staged, vocabularies) for name in self.divisions]
        if self.activity is not None:
            divisions += _activity(self.activity, staged, vocabularies)
        divisions = _complete(
            FeaturePlan(dataset, LabelPlan(LABEL, LABEL), (), (), tuple(divisions)), vocabularies, staged
        )
        sparse = []
        for name in self.sparse:
            values = staged.counts(name, self.min_count)["value"].drop_nulls().sort()
            ids = pl.arange(1, len(values) + 1, dtype=pl.Int64, eager=True)
            vocabularies[name] = pl.DataFrame({"value": values, "id": ids})
            sparse.append(SparsePlan(name, name, len(values) + 1, vocabulary=name, has_missing=False, unknown=UNKNOWN))
        natural = divisions[0]
        size = len(natural.names) + (natural.others is None)  # one more for unknown domains, where there can be some
        sparse.append(SparsePlan("domain", natural.column, size, kind="domain", division=natural.name))
        kept = {division.vocabulary for division in divisions} | set(self.sparse)
        return FeaturePlan(
            dataset,
            LabelPlan(LABEL, LABEL),
            tuple(sparse),
            tuple(self._dense(staged)),
            tuple(divisions),
            vocabularies=Vocabularies({name: table for name, table in vocabularies.items() if name in kept}),
        )

    def _division(self, name: str, staged: StagedRows, vocabularies: dict[str, pl.DataFrame]) -> DivisionPlan:
        counts = staged.counts(name, 1).with_columns(pl.col("value").fill_null(MISSING))
        names = _domains(counts.group_by("value").agg(pl.col("count").sum()), self.min_rows)
        place = {domain: number for number, domain in enumerate(names)}
        known = [domain for domain in names if domain != RARE]
        others = place.get(RARE)
        division = DivisionPlan(name, name, tuple(names), missing=place.get(MISSING, others), others=others)
        ids = pl.Series([place[domain] for domain in known], dtype=pl.Int64)
        vocabularies[division.vocabulary] = pl.DataFrame({"value": pl.Series(known, dtype=pl.String), "id": ids})
        return division

    def _dense(self, staged: StagedRows) -> list[DensePlan]:
        free = math.inf  # numbers stay as they are, however large
        if self.scaling == "log1p":
            return [DensePlan(name, name, least=0.0, log1p=True, clip=free) for name in self.dense]
        if self.scaling == "none" or not self.dense:
            return [DensePlan(name, name, clip=free) for name in self.dense]
        plans = []
        for name, (low, high) in staged.ranges(self.dense).items():
            start = low or 0.0  # a column without any number stays 0
            plans.append(DensePlan(name, name, median=start, mean=start, std=((high or 0.0) - start) or 1.0, clip=free))
        return plans

    def _for_raw_rows(self, plan: FeaturePlan) -> FeaturePlan:
        """The same decisions about rows as their files have them."""

        def named(part: Any) -> Any:
            return replace(part, column=self.raw_names.get(part.column, part.column))

        return replace(
            plan,
            label=self.raw_label,
            sparse=tuple(named(feature) for feature in plan.sparse),
            dense=tuple(named(feature) for feature in plan.dense),
            divisions=tuple(named(division) for division in plan.divisions),
        )


def _activity(asked: Activity, staged: StagedRows, vocabularies: dict[str, pl.DataFrame]) -> list[DivisionPlan]:
    """The division by activity; none where all training rows would be in one domain."""
    active = staged.counts(asked.column, asked.more_than + 1).drop_nulls("value")
    if not 0 < active["count"].sum() < staged.rows["train"]:
        return []
    division = DivisionPlan("activity", asked.column, asked.names, missing=0, others=0)
    ids = pl.repeat(1, active.height, dtype=pl.Int64, eager=True)
    vocabularies[division.vocabulary] = pl.DataFrame({"value": active["value"].sort(), "id": ids})
    return [division]


def _complete(plan: FeaturePlan, vocabularies: Mapping[str, pl.DataFrame], staged: StagedRows) -> list[DivisionPlan]:
    """The divisions whose domains all have training rows."""
    divisions = replace(plan, vocabularies=Vocabularies(vocabularies))
    natural, lacking = plan.divisions[0].name, set()
    for split in SPLITS[1:]:  # of training rows all are known
        unknown = dict.fromkeys((division.name for division in plan.divisions), 0)
        for batch in staged.batches(split, f"domains of {split}", divisions.raw_columns()):
            found = divisions.encode(batch).unknown
            for name in unknown:
                unknown[name] += int(found[name].sum())
        if unknown[natural]:
            raise ValueError(
                f"{unknown[natural]} rows of split {split} are in domains of division '{natural}' that no training "
                "row is in; choose another division"
            )
        lacking |= {name for name, count in unknown.items() if count}
    return [division for division in plan.divisions if division.name not in lacking]


def _encoded(plan: FeaturePlan, staged: StagedRows, split: str) -> Iterator[dict[str, pa.Array]]:
    """A split's rows as its file has them."""
    for batch in staged.batches(split, f"writing {split}"):
        encoded = plan.encode(batch, need_label=True)
        wrong = encoded.errors.drop_nulls()
        if len(wrong):
            raise ValueError(f"a row of split {split} cannot be taken: {wrong[0]}; restore the original files")
        yield {values.name: values.to_arrow() for values in encoded.columns}


def lot(index: pl.Expr, seed: int) -> pl.Expr:
    """A number in [0, 1) for each row, by lot: a function of its index and the seed alone (SplitMix64).

    Args:
        index (pl.Expr): whole numbers, different ones for different rows.
        seed (int): another one gives other numbers.

    Example::

        >>> drawn = pl.DataFrame({"row": range(10_000)}).select(lot(pl.col("row"), 7) < 0.8)
        >>> round(drawn["row"].mean(), 1)
        0.8
    """
    bits = index.cast(pl.UInt64) * _u64(0x9E3779B97F4A7C15) + _u64(seed)
    bits = (bits ^ (bits // _u64(1 << 30))) * _u64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits // _u64(1 << 27))) * _u64(0x94D049BB133111EB)
    bits = bits ^ (bits // _u64(1 << 31))
    return (bits // _u64(1 << 11)).cast(pl.Float64) / float(1 << 53)


def _u64(value: int) -> pl.Expr:
    return pl.lit(value, dtype=pl.UInt64)


def _domains(counts: pl.DataFrame, min_rows: int) -> list[str]:
    """Names of domains by number where all are numbers, or else by alphabet; MISSING and RARE last."""
    names = counts.filter(pl.col("count") >= min_rows)["value"].to_list()
    present = [name for name in names if name != MISSING]
    number = all(name.removeprefix("-").isdecimal() for name in present)
    present.sort(key=lambda name: (int(name) if number else 0, name))
    return present + [MISSING] * (MISSING in names) + [RARE] * (len(names) < counts.height)
