from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from tests.data import own
from torchrec_mdr.data.record_batches import RecordBatches
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.train import train


def test_a_run_on_record_batches_is_bitwise_one_on_a_folder(tmp_path: Path) -> None:
    own.write(tmp_path / "mine")
    options = {"method": "mlora", "batch_size": 64, "backbone_options.hidden": [8, 4]}
    short = {"stages.pretrain.epochs": 1, "stages.adapt.epochs": 1}
    schema = replace(Schema.load(str(tmp_path / "mine")), rows={})
    files = {split: pq.ParquetFile(tmp_path / "mine" / f"{split}.parquet") for split in SPLITS}
    with RecordBatches(
        schema, {s: file.iter_batches(batch_size=77) for s, file in files.items()}, str(tmp_path)
    ) as data:
        mine = train(data, str(tmp_path / "batches"), **options, **short)
    other = train(str(tmp_path / "mine"), str(tmp_path / "folder"), **options, **short)
    assert mine is not None and other is not None and mine["test"] == other["test"]
    stored = [
        checkpoint.load_new(str(tmp_path / run / "checkpoints" / "adapt"), "", torch.device("cpu"))
        for run in ("batches", "folder")
    ]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
