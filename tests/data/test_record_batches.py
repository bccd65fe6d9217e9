from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.data import tiny
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.record_batches import RecordBatches
from torchrec_mdr.data.schema import SPLITS, Schema

ROWS = 1003


def stream(table: dict[str, Any], sizes: list[int]) -> Iterator[pa.RecordBatch]:
    """Batches of these sizes in turn, made while they are read."""
    arrow, start, turn = pa.table(table), 0, 0
    while start < arrow.num_rows:
        part = arrow.slice(start, sizes[turn % len(sizes)]).combine_chunks()
        yield part.to_batches()[0]
        start, turn = start + part.num_rows, turn + 1


def source(table: dict[str, Any], schema: Schema, folder: Path) -> RecordBatches:
    batches = {split: stream(table, [1, 7, 300]) for split in SPLITS}
    return RecordBatches(replace(schema, rows={}), batches, str(folder))


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 200, "memory_bytes": 0}, {"world_size": 2, "rank": 1}])
def test_batches_are_bitwise_those_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("torchrec_mdr.data.writer.ROW_GROUP_ROWS", 128)  # so that there are several groups
    table = tiny.columns(ROWS, multi_hot=True)
    folder, schema = tiny.write(tmp_path / "folder", table, multi_hot=True)
    with source(table, schema, tmp_path) as data:
        assert data.schema.rows == dict.fromkeys(SPLITS, ROWS)
        given = {"divisions": ["scenario", "segment"], "batch_size": 64, "shuffle": True, **options}
        mine = DomainLoader(data.folder, data.schema, "train", **given)
        other = DomainLoader(folder, schema, "train", **given)
        assert mine.domain_counts("segment").tolist() == other.domain_counts("segment").tolist()
        for one, two in zip(mine.batches(1), other.batches(1), strict=True):
            assert torch.equal(one.sparse_features.values(), two.sparse_features.values())
            assert torch.equal(one.sparse_features.lengths(), two.sparse_features.lengths())
            assert torch.equal(one.dense_features, two.dense_features) and torch.equal(one.labels, two.labels)
            assert torch.equal(one.domains.ids, two.domains.ids) and one.global_rows == two.global_rows
    assert not Path(data.folder).exists()


def test_one_batch_at_a_time_is_in_memory(tmp_path: Path) -> None:
    table = tiny.columns(ROWS)
    batch = next(stream(table, [ROWS]))
    before, most = pa.total_allocated_bytes(), 0

    def many() -> Iterator[pa.RecordBatch]:
        nonlocal most
        for _ in range(1000):  # 40 MB
            most = max(most, pa.total_allocated_bytes() - before)
            yield pa.RecordBatch.from_arrays([pa.array(np.array(c)) for c in batch.columns], schema=batch.schema)

    schema = replace(tiny.schema(ROWS), rows={})
    with RecordBatches(schema, {"train": many(), "validation": iter([batch]), "test": iter([batch])}, str(tmp_path)):
        assert most < 200 * batch.nbytes


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (None, "there are no record batches for split 'train'; give some for train, validation, test"),
        ([], "split train has no record batch"),
        ([{"label": [1.0]}, {"label": ["a"]}], "the record batch with row 1 has the columns label: string"),
        ([{"label": [1.0]}], "has no column 'price'"),
    ],
)
def test_bad_sources_are_named_and_leave_nothing(
    tmp_path: Path, train: list[dict[str, Any]] | None, words: str
) -> None:
    good = next(stream(tiny.columns(5), [5]))
    batches = {"validation": [good], "test": [good]}
    if train is not None:
        batches["train"] = [pa.RecordBatch.from_pydict(columns) for columns in train]
    with pytest.raises(ValueError, match=words), RecordBatches(tiny.schema(5), batches, str(tmp_path)) as data:
        DomainLoader(data.folder, data.schema, "train", ["scenario"], 4)
    assert list(tmp_path.iterdir()) == []


def test_a_domain_that_is_unknown_is_no_training_row(tmp_path: Path) -> None:
    table = tiny.columns(9)
    table["domain_scenario"][4] = -1
    folder, schema = tiny.write(tmp_path / "data", table)
    with pytest.raises(ValueError, match=r"column 'domain_scenario', row 4 .*: -1 is outside its division, \[0, 4\)"):
        DomainLoader(folder, schema, "train", ["scenario"], 4)


def test_rows_carry_their_weights_and_cost_no_more_than_their_values_need(tmp_path: Path) -> None:
    table = tiny.columns(ROWS) | {"weight": np.linspace(0, 2, ROWS, dtype=np.float32)}
    folder, schema = tiny.write(tmp_path / "data", table)
    schema = replace(schema, weight="weight")
    for batch in DomainLoader(folder, schema, "train", ["scenario"], 64, shuffle=True).batches(0):
        assert batch.weights is not None
        assert batch.weights.tolist() == table["weight"][batch.sparse_features["row"].values()].tolist()
    loader = DomainLoader(folder, schema, "train", ["scenario"], 64)
    assert loader.resident_bytes == ROWS * (1 + 4 + 2 * 4 + 1 + 2 + 1)  # label, weight, dense, key, row and item
