"""Prepares a table of raw rows: reads, decides, encodes, writes, and says what it did."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from torchrec_mdr.data.cache import new_folder
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.importing.decide import Decision, decide
from torchrec_mdr.data.importing.options import ImportOptions, request, settings
from torchrec_mdr.data.importing.staging import ROW, Staged, row_bar, stage
from torchrec_mdr.data.importing.summary import Table, summarise
from torchrec_mdr.data.importing.warnings import find_warnings
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.data.tables import BATCH_ROWS, RawTable, open_table
from torchrec_mdr.data.upload import new_in_store
from torchrec_mdr.data.writer import write_split
from torchrec_mdr.storage import is_store, isdir, ls, make_folder, remove_folder


@dataclass(frozen=True)
class Imported:
    """What a preparation gave.

    Args:
        folder (str): the prepared data set.
        schema (Schema): its schema.
        decision (Decision): what was decided about each column.
        warnings (tuple[str, ...]): what looks wrong, a sentence each.
        summary (tuple[Table, ...]): the tables of the report, where one is asked for.
    """

    folder: str
    schema: Schema
    decision: Decision
    warnings: tuple[str, ...]
    summary: tuple[Table, ...]


def import_rows(options: ImportOptions, output: str, frame: Any = None, progress: bool = True) -> Imported:
    """Prepares a table.

    The folder appears when it is whole. What a killed preparation of the same folder left is removed.

    Args:
        options (ImportOptions): where the rows are, and what is asked for.
        output (str): a new folder, or an empty one.
        frame (Any): a polars or pandas frame, in place of `options.input`.
        progress (bool): whether to show bars, where there is a terminal.

    Raises:
        ValueError: an option, a file, a column or a row is wrong; nothing is written then.
    """
    asked = request(options)
    folder = new_folder(output)
    tables = _tables(options, frame)
    with new_in_store(folder, output) if is_store(folder) else _new_on_disk(folder) as made:
        staged = stage(tables, asked, Path(made).parent / "raw", progress)
        decision = decide(staged, asked, os.path.basename(folder), progress)
        rows, dropped = _write(made, staged, decision.plan, progress)
        schema = decision.plan.schema(rows, _source(options, tables))
        decision.plan.save(made)
        schema.save(made)
        warnings = find_warnings(made, staged, decision, asked)
        warnings += [
            f"{count:,} rows of split '{split}' are left out, as no training row has their domain"
            for split, count in dropped.items()
            if count
        ]
        summary = summarise(made, staged, decision) if options.report else []
    return Imported(folder, schema, decision, tuple(warnings), tuple(summary))


def _tables(options: ImportOptions, frame: Any) -> dict[str, RawTable]:
    if frame is not None and options.input:
        raise ValueError("rows are given as a frame and by --input; give one of them")
    train = open_table(options.input) if frame is None else RawTable.from_frame(frame)
    tables = {"train": train}
    for split, inputs in (("validation", options.validation_input), ("test", options.test_input)):
        if inputs:
            tables[split] = open_table(inputs, f"--{split}_input")
    return tables


def _source(options: ImportOptions, tables: Mapping[str, RawTable]) -> dict[str, Any]:
    files = {split: [part.path for part in table.parts[:20]] for split, table in tables.items()}
    return {"made_by": "python -m torchrec_mdr.prepare", "files": files, "options": settings(options)}


def _write(folder: str, staged: Staged, plan: FeaturePlan, progress: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Encodes and writes the splits; gives rows written and rows left out."""
    rows, dropped = {}, {}
    with row_bar("writing", sum(staged.rows.values()), progress) as bar:
        for split in SPLITS:
            lost = [0]

            def chunks(split: str = split, lost: list[int] = lost) -> Iterator[dict[str, pa.Array]]:
                for batch in staged.batches(split, BATCH_ROWS):
                    columns = _encoded(batch, split, staged, plan)
                    lost[0] += batch.height - columns.height
                    bar.update(batch.height)
                    yield {name: _arrow(columns[name]) for name in columns.columns}

            rows[split] = write_split(folder, split, chunks())
            dropped[split] = lost[0]
            if not rows[split]:
                raise ValueError(
                    f"split '{split}' has no row of a domain that training rows have; cut the rows in another way"
                )
    return rows, dropped


def _encoded(batch: pl.DataFrame, split: str, staged: Staged, plan: FeaturePlan) -> pl.DataFrame:
    encoded = plan.encode(batch, need_label=True)
    bad = encoded.errors.is_not_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        place = staged.place(split, batch[ROW][row])
        raise ValueError(f"{place}: {encoded.errors[row]}; correct it, or --exclude the column")
    known = ~encoded.unknown.select(pl.any_horizontal(pl.all())).to_series()
    return encoded.columns if known.all() else encoded.columns.filter(known)


def _arrow(values: pl.Series) -> pa.Array:
    array = values.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    return array.cast(pa.list_(array.type.value_type)) if pa.types.is_large_list(array.type) else array


@contextmanager
def _new_on_disk(folder: str) -> Iterator[str]:
    """A hidden folder that becomes the new one after the block; what killed preparations left of it is removed."""
    parent, name = os.path.split(folder)
    for leftover in ls(parent):
        if leftover.startswith(f".{name}.") and leftover.endswith(".preparing") and not _is_alive(leftover):
            remove_folder(os.path.join(parent, leftover))
    hidden = os.path.join(parent, f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.preparing")
    made = os.path.join(hidden, "data")
    make_folder(made, "the folder")
    try:
        yield made
        if isdir(folder):
            os.rmdir(folder)
        os.rename(made, folder)
    finally:
        remove_folder(hidden)


def _is_alive(leftover: str) -> bool:
    """Whether the process that a hidden folder names still runs."""
    number = leftover.rsplit(".", 2)[1].split("-")[0]
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
