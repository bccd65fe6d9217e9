"""A row's weight reaches loss and metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import own, tiny
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.distributed.pipeline import LossArch
from torchrec_mdr.train import main


def weighted_batch(folder: Path, memory_bytes: int = 1 << 30) -> DomainBatch:
    table = tiny.columns(64)
    path, schema = tiny.write(folder / "tiny", {**table, "w": (table["row"] % 3).astype(np.float32)})
    schema = replace(schema, weight="w")
    loader = DomainLoader(path, schema, "train", ["scenario"], 32, shuffle=True, memory_bytes=memory_bytes)
    return next(iter(loader.batches(0)))


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_weights_stay_with_their_rows(tmp_path: Path, memory_bytes: int) -> None:
    batch = weighted_batch(tmp_path, memory_bytes)
    assert batch.weights is not None
    assert torch.equal(batch.weights, (batch.sparse_features["row"].values() % 3).float())
    assert torch.equal(batch.to(torch.device("cpu")).weights, batch.weights)


def test_a_weight_multiplies_the_rows_loss(tmp_path: Path) -> None:
    batch = weighted_batch(tmp_path)
    logits = torch.linspace(-2, 2, len(batch.labels), requires_grad=True)
    loss, output = LossArch()(logits, batch)
    by_hand = 0.0
    for logit, label, weight in zip(logits.tolist(), batch.labels.tolist(), batch.weights.tolist(), strict=True):
        probability = 1 / (1 + np.exp(-logit))
        by_hand -= weight * np.log(probability if label else 1 - probability) / len(batch.labels)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5) and torch.equal(output.weights, batch.weights)
    loss.backward()
    assert bool((logits.grad[batch.weights == 0] == 0).all()) and bool((logits.grad[batch.weights > 0] != 0).all())


def test_a_negative_weight_is_named(tmp_path: Path) -> None:
    path, schema = tiny.write(tmp_path / "tiny", {**tiny.columns(64), "w": np.full(64, -1, dtype=np.float32)})
    with pytest.raises(ValueError, match="column 'w', row 0 .*-1.0 is no weight, which is not negative"):
        DomainLoader(path, replace(schema, weight="w"), "train", ["scenario"], 32)


@pytest.mark.full
def test_a_runs_test_metrics_are_those_of_repeated_rows(tmp_path: Path) -> None:
    """Both runs start from the same weights and learn nothing, as no training row counts."""
    results = []
    for form in ("weighted", "repeated"):
        content = own.write(tmp_path / form)
        for split in ("train", "validation", "test"):
            table = pq.read_table(tmp_path / form / f"{split}.parquet")
            weights = np.arange(table.num_rows) % 3
            if form == "repeated" and split != "train":
                table = table.take(np.repeat(np.arange(table.num_rows), weights))
                weights = np.ones(table.num_rows)
            table = table.append_column("w", pa.array((weights * (split != "train")).astype(np.float32)))
            pq.write_table(table, tmp_path / form / f"{split}.parquet")
            content["rows"][split] = table.num_rows
        (tmp_path / form / "schema.json").write_text(json.dumps({**content, "weight": "w"}))
        assert Schema.load(str(tmp_path / form)).weight == "w"
        sizes = ["--batch_size=64", "--backbone_options.hidden=[8,4]", "--method=mix", "--stages.pretrain.epochs=1"]
        assert main([f"--dataset={tmp_path / form}/", f"--output_dir={tmp_path / 'run' / form}", *sizes]) == 0
        results.append(json.loads((tmp_path / "run" / form / "metrics.json").read_text())["test"])
    assert results[0]["auc"] == pytest.approx(results[1]["auc"], abs=1e-9)
    assert results[0]["logloss"] == pytest.approx(results[1]["logloss"], abs=1e-9)
    assert results[0]["rows"] == 200
