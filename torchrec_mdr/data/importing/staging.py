"""Cuts raw rows into splits, and lays each aside as a Parquet file of raw columns, checked as to label and weight."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from tqdm import tqdm

from torchrec_mdr.data.features import FeaturePlan, LabelPlan, keys
from torchrec_mdr.data.importing.options import Cut, Request
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.tables import RawTable

ROW = "__row"  # a staged row's place in its table
_FOLDS = {
    "train": ("train", "training", "tr", "0"),
    "validation": ("validation", "valid", "val", "dev", "va", "1"),
    "test": ("test", "testing", "te", "2"),
}


@dataclass(frozen=True)
class Staged:
    """Raw rows of the splits, each in the order of its table.

    Args:
        folder (Path): holds a Parquet file a split: the raw columns and `__row`.
        tables (Mapping[str, RawTable]): where each split's rows come from.
        rows (Mapping[str, int]): number of rows of each split.
        columns (tuple[str, ...]): the raw columns.
        label (LabelPlan): the label.
        from_text (bool): whether the table is of a kind that has no types, such as CSV.
    """

    folder: Path
    tables: Mapping[str, RawTable]
    rows: Mapping[str, int]
    columns: tuple[str, ...]
    label: LabelPlan
    from_text: bool

    def scan(self, split: str) -> pl.LazyFrame:
        """A split's rows, to be read by streaming."""
        return pl.scan_parquet(self.path(split), glob=False)

    def path(self, split: str) -> Path:
        """A split's file."""
        return self.folder / f"{split}.parquet"

    def batches(self, split: str, rows: int) -> Iterator[pl.DataFrame]:
        """A split's rows in their order, some at a time."""
        for batch in self.scan(split).collect_batches(chunk_size=rows, maintain_order=True):
            yield from batch.iter_slices(rows)

    def place(self, split: str, row: int) -> str:
        """Where a row of a table lies, for messages."""
        return self.tables[split].place(row)


def stage(tables: Mapping[str, RawTable], asked: Request, folder: Path, progress: bool) -> Staged:
    """Cuts the rows and lays them aside.

    Args:
        tables (Mapping[str, RawTable]): `train`, which is cut, and those splits that have tables of their own.
        asked (Request): what is asked for.
        folder (Path): a new folder.
        progress (bool): whether to show a bar.

    Raises:
        ValueError: a column is missing, a label or weight is none, or a split has no rows or one class.
    """
    folder.mkdir()
    ruled = _check_columns(tables, asked)
    used = [name for name in tables["train"].columns if name not in asked.exclude or name in ruled]
    for table in tables.values():
        table.require([name for name in used if name != asked.cut.column or table is tables["train"]])
    label = _label(tables, asked)
    rows = {split: 0 for split in SPLITS}
    positives = {split: 0 for split in SPLITS}
    counts = {split: table.count() for split, table in tables.items()}
    for split, count in counts.items():
        if not count:
            option = "--input" if split == "train" else f"--{split}_input"
            raise ValueError(f"{option}: {tables[split].parts[0].path} has columns and no rows; name other files")
    with row_bar("reading", sum(counts.values()), progress) as bar:
        for source, table in tables.items():
            splits = [split for split in SPLITS if split == source or split not in tables]
            cut = _cutter(table, source, splits, asked, counts)
            with ExitStack() as stack:
                writers: dict[str, pq.ParquetWriter] = {}
                start = 0
                for batch in table.batches(columns=used):
                    labels = _check_rows(batch, label, asked, table, start)
                    places = cut(batch, start)
                    numbers = pl.Series(ROW, np.arange(start, start + batch.height))
                    whole = batch.with_columns(numbers)
                    for number, split in enumerate(SPLITS):
                        mask = places == number
                        if mask.any():
                            part = whole.filter(pl.Series(mask)).to_arrow(compat_level=pl.CompatLevel.oldest())
                            if split not in writers:
                                path = folder / f"{split}.parquet"
                                writers[split] = stack.enter_context(pq.ParquetWriter(path, part.schema))
                            writers[split].write_table(part)
                            rows[split] += part.num_rows
                            positives[split] += int(labels[mask].sum())
                    start += batch.height
                    bar.update(batch.height)
    for split in SPLITS:
        _check_split(split, rows[split], positives[split], asked)
    origins = {split: tables.get(split, tables["train"]) for split in SPLITS}
    text = all(kind == pl.String for kind in tables["train"].types.values())
    return Staged(folder, origins, rows, tuple(used), label, text)


def row_bar(title: str, rows: int, progress: bool) -> tqdm:
    """A progress bar over rows, shown on a terminal only."""
    hidden = None if progress else True
    return tqdm(total=rows, desc=title, unit=" rows", unit_scale=True, leave=False, disable=hidden)


def _check_columns(tables: Mapping[str, RawTable], asked: Request) -> tuple[str, ...]:
    """Checks that named columns are there; gives those that the label's rule reads."""
    given = {
        "--exclude": asked.exclude,
        "--domain": asked.divisions[:1],
        "--auxiliary": asked.divisions[1:],
        "--label": () if asked.label_column is None else (asked.label_column,),
        "--weight": () if asked.weight is None else (asked.weight,),
        "--split": () if asked.cut.column is None else (asked.cut.column,),
        "--sparse, --dense, --lists, --timestamps or --hash": tuple(asked.kinds),
        "--share": tuple(name for group in asked.shared for name in group),
    }
    if asked.label_rule is not None:
        try:
            given["--label_rule"] = tuple(pl.sql_expr(asked.label_rule).meta.root_names())
        except PolarsError as error:
            raise ValueError(
                f"--label_rule '{asked.label_rule}' cannot be read: {error}; write a condition such as rating > 3"
            ) from error
    known = tables["train"].columns
    for option, columns in given.items():
        for name in columns:
            if name not in known:
                listed = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
                raise ValueError(f"{option}: {tables['train'].parts[0].path} has no column '{name}'; it has {listed}")
    return given.get("--label_rule", ())


def _label(tables: Mapping[str, RawTable], asked: Request) -> LabelPlan:
    if asked.label_rule is not None:
        return LabelPlan(asked.label, rule=asked.label_rule)
    column = asked.label_column
    assert column is not None
    found = set()
    for table in tables.values():
        value = keys.number(column, table.types[column])
        try:
            values = table.rows.select(value.alias("label")).unique().head(1000).collect(engine="streaming")["label"]
        except PolarsError as error:
            raise table.fault(error) from error
        found |= {value for value in values.to_list() if value is not None}
    if found <= {0.0, 1.0}:
        return LabelPlan(asked.label, column)
    if found <= {-1.0, 1.0}:
        return LabelPlan(asked.label, column, negative=-1)
    if found <= {1.0, 2.0} or len(found) == 2:
        shown = ", ".join(f"{value:g}" for value in sorted(found) if np.isfinite(value))
        if shown:
            raise ValueError(
                f"--label: column '{column}' holds {shown} and not 0 and 1; say which rows are positive, such as "
                + "--label_rule "
                + shlex.quote(
                    f"{column if column.isascii() and column.isidentifier() else _quoted(column)} = {max(found):g}"
                )
            )
    return LabelPlan(asked.label, column)


def _quoted(column: str) -> str:
    """A column's name in SQL, where it is no plain word."""
    name = column.replace('"', '""')
    return f'"{name}"'


def _check_rows(
    batch: pl.DataFrame, label: LabelPlan, asked: Request, table: RawTable, start: int
) -> NDArray[np.bool_]:
    """Raises ValueError for the first bad label or weight; gives the labels."""
    plan = FeaturePlan("rows", label, (), (), (), weight=asked.weight)
    encoded = plan.encode(batch, need_label=True)
    if encoded.errors.null_count() < len(encoded):
        row = int(encoded.errors.is_not_null().arg_true()[0])
        hint = "say which rows are positive with --label_rule, or correct it"
        mend = hint if asked.label_rule is None and "label" in encoded.errors[row] else "correct it"
        raise ValueError(f"{table.place(start + row)}: {encoded.errors[row]}; {mend}, or remove such rows")
    labels: NDArray[np.bool_] = encoded.columns[label.name].to_numpy() == 1
    return labels


def _check_split(split: str, rows: int, positives: int, asked: Request) -> None:
    if not rows:
        raise ValueError(f"--split leaves no row to split '{split}'; give it a larger share, or files of its own")
    if positives in (0, rows) and split != "test":
        kind = "positive" if positives else "negative"
        raise ValueError(
            f"all {rows:,} rows of split '{split}' are {kind}, and neither training nor AUC works with one class; "
            f"check {'--label_rule' if asked.label_rule else '--label'}, or cut the rows in another way with --split"
        )


Cutter = Callable[[pl.DataFrame, int], NDArray[np.int8]]


def _cutter(table: RawTable, source: str, splits: Sequence[str], asked: Request, counts: Mapping[str, int]) -> Cutter:
    """What gives each row of a batch, which starts at a row, its split's number.

    Args:
        table (RawTable): the rows.
        source (str): the split that the table is named for.
        splits (Sequence[str]): those without tables of their own, and this one.
        asked (Request): what is asked for.
        counts (Mapping[str, int]): rows of each table.
    """
    numbers = [SPLITS.index(split) for split in (splits if source == "train" else [source])]
    if len(numbers) == 1:
        return lambda batch, start: np.full(batch.height, numbers[0], dtype=np.int8)
    shares = np.array([*asked.cut.shares, 1 - sum(asked.cut.shares)])[numbers]
    ends = np.round(np.cumsum(shares / shares.sum()) * counts[source]).astype(int)
    if asked.cut.by == "random":
        order = np.random.default_rng(asked.seed).permutation(counts[source])
        places = np.empty(counts[source], dtype=np.int8)
        for number, start, stop in zip(numbers, [0, *ends[:-1]], ends, strict=True):
            places[order[start:stop]] = number
        return lambda batch, start: places[start : start + batch.height]
    assert asked.cut.column is not None
    if asked.cut.by == "time":
        return _by_time(table, asked.cut, numbers, ends)
    return _by_column(table, asked.cut)


def _by_time(table: RawTable, cut: Cut, numbers: Sequence[int], ends: NDArray[np.integer]) -> Cutter:
    column = cut.column
    assert column is not None
    kind = table.types[column]
    # numbers keep their order in any unit
    value = keys.number(column, kind) if kind.is_numeric() else keys.moment(column, kind, None)
    times = table.rows.select(value.alias("time")).collect(engine="streaming")["time"]
    if kind == pl.String and times.null_count() == len(times):
        value = keys.number(column, kind)
        times = table.rows.select(value.alias("time")).collect(engine="streaming")["time"]
    bad = times.is_null() if not times.dtype.is_float() else times.is_null() | ~times.is_finite()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise ValueError(f"{table.place(row)}: column '{column}' holds no time, which --split time needs; correct it")
    ordered = times.sort()
    # rows of one time are in one split
    bounds = [ordered[min(int(end), len(ordered) - 1)] for end in ends[:-1]]

    def place(batch: pl.DataFrame, start: int) -> NDArray[np.int8]:
        when = times.slice(start, batch.height)
        later = np.stack([(when >= bound).to_numpy() for bound in bounds])
        return np.asarray(numbers, dtype=np.int8)[later.sum(axis=0)]

    return place


def _by_column(table: RawTable, cut: Cut) -> Cutter:
    column = cut.column
    assert column is not None
    numbers = {word: number for number, split in enumerate(SPLITS) for word in _FOLDS[split]}

    def place(batch: pl.DataFrame, start: int) -> NDArray[np.int8]:
        words = batch.select(keys.key(column, batch.schema[column], "integer").str.to_lowercase()).to_series()
        found = words.replace_strict(numbers, default=None, return_dtype=pl.Int8)
        if found.null_count():
            row = int(found.is_null().arg_true()[0])
            raise ValueError(
                f"{table.place(start + row)}: column '{column}' is '{batch[column][row]}', which --split column does "
                "not know; it may be train, validation or test"
            )
        return found.to_numpy()

    return place
