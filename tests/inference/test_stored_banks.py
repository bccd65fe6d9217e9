"""Runs with sharded banks are scored, evaluated and exported without all of their adapters in memory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.training.test_sharded_banks import SHARDED
from torchrec_mdr.distributed.stored_rows import StoredTensor
from torchrec_mdr.evaluate import evaluate
from torchrec_mdr.inference import Run, blocks, export, load_run
from torchrec_mdr.inference.adapter_file import AdapterFile
from torchrec_mdr.inference.freeze import freeze
from torchrec_mdr.inference.scoring import features
from torchrec_mdr.merge import main as merge_main
from torchrec_mdr.predict import predict
from torchrec_mdr.train import main

METHODS = {
    "mlora": [],
    "multilora": ["--method=multilora"],
    "top_k": ["--method=moe_mlora", "--method_options.top_k=2", "--stages.gate.epochs=1", "--stages.gate.hooks=[]"],
}


@pytest.fixture(scope="module", params=[pytest.param(m, marks=[pytest.mark.full] * (m != "mlora")) for m in METHODS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run with sharded banks."""
    path = str(tmp_path_factory.mktemp("stored") / "run")
    further = ["--stages.adapt.epochs=1", "--bank_type=fp16", f"--output_dir={path}"]
    assert main([*SHARDED, *METHODS[request.param], *further]) == 0
    return path


def rows_of(run: Run, count: int = 300) -> pl.DataFrame:
    """Labelled rows of domains 1, 3 and 4, and of one that training did not know."""
    generator = np.random.default_rng(0)
    columns = {f.name: generator.integers(0, f.num_embeddings, count) for f in run.schema.sparse_features}
    columns |= {name: generator.normal(size=count) for name in run.schema.dense_features}
    columns |= {f"domain_{d.name}": generator.integers(0, d.num_domains, count) for d in run.schema.divisions}
    columns |= {f"domain_{run.divisions[0].name}": generator.choice([1, 3, 4, 99], count)}
    return pl.DataFrame(columns | {run.schema.label: generator.integers(0, 2, count)})


def test_scores_are_those_of_a_model_that_holds_all_adapters(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_run(folder)
    rows = rows_of(whole)
    expected, metrics = predict(whole, rows), evaluate(whole, rows)
    read: set[int] = set()
    at = StoredTensor.at
    monkeypatch.setattr(StoredTensor, "at", lambda self, ids: (read.update(ids.tolist()), at(self, ids))[1])
    monkeypatch.setattr(StoredTensor, "rows", lambda *_: pytest.fail("adapters were loaded"))
    found = predict(folder, rows)
    assert found is not None and expected is not None
    assert found.drop("score").equals(expected.drop("score")) and found["unknown_domain"].null_count() < 300
    np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=1e-5)
    if whole.config.method == "mlora":
        assert read == {1, 3, 4}
    again = evaluate(folder, rows)
    assert again["model"]["auc"] == pytest.approx(metrics["model"]["auc"], abs=1e-6)
    assert again["model"]["logloss"] != again["backbone"]["logloss"]
    assert again["model"]["domains"].keys() == metrics["model"]["domains"].keys()
    with pytest.raises(ValueError, match="with sharded banks cannot be served or merged as it is"):
        freeze(load_run(folder, on_demand=True).model)


def files_of(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_bundle_is_written_a_block_of_domains_at_a_time(
    folder: str, calibrate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"compiled": False, "adapter_dtype": "bfloat16", "int8": True, "calibrate": calibrate}
    export(load_run(folder), str(tmp_path / "whole"), **options)
    monkeypatch.setattr(blocks, "PART", 4)  # of six domains
    monkeypatch.setattr(StoredTensor, "rows", at_most(4))
    monkeypatch.setattr(StoredTensor, "at", at_most_of(4))
    export(folder, str(tmp_path / "blocks"), **options)
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "blocks")
    assert whole.keys() == parts.keys() and len([name for name in whole if name.startswith("adapters/")]) >= 6
    for name, content in whole.items():
        if name.startswith("adapters/"):
            one, other = (AdapterFile.from_bytes(files[name], name) for files in (whole, parts))
            assert one.info == other.info and one.tensors.keys() == other.tensors.keys()
            for table, row in one.tensors.items():
                torch.testing.assert_close(row, other.tensors[table], rtol=1e-2 * calibrate, atol=1e-3 * calibrate)
        elif name not in ("current.json", "golden.safetensors", "manifest.json"):
            assert content == parts[name], name
    said, also = (json.loads(files["manifest.json"]) for files in (whole, parts))
    assert said.pop("files").keys() == also.pop("files").keys() and said == also
    shown = [json.loads(files["current.json"])["serving"] for files in (whole, parts)]
    assert [list(domains) for domains in shown[0].values()] == [list(domains) for domains in shown[1].values()]


def at_most(count: int) -> Callable[[StoredTensor, int, int], torch.Tensor]:
    """`StoredTensor.rows`, of no more rows at a time."""
    read = StoredTensor.rows

    def rows(self: StoredTensor, first: int, last: int) -> torch.Tensor:
        assert last - first <= count or self.size[0] <= count
        return read(self, first, last)

    return rows


def at_most_of(count: int) -> Callable[[StoredTensor, torch.Tensor], torch.Tensor]:
    """`StoredTensor.at`, of no more rows at a time, but for a pass over rows of the data."""
    read = StoredTensor.at

    def at(self: StoredTensor, ids: torch.Tensor) -> torch.Tensor:
        in_pass = any(frame.function == "calibration_of" for frame in inspect.stack())
        assert in_pass or len(ids) <= count
        return read(self, ids)

    return at


def test_one_domain_is_merged_without_the_others(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(folder)
    if len(run.divisions) > 1:
        pytest.skip("fusion weighs by the row, so that nothing is merged")
    rows = rows_of(run)
    model_rows = features(rows, run.schema)
    ids = torch.full((len(rows), 1), 3)
    with torch.no_grad():
        expected = run.model(*model_rows, ids)
    monkeypatch.setattr(StoredTensor, "rows", at_most(2))
    monkeypatch.setattr(StoredTensor, "at", at_most_of(2))
    assert merge_main([f"--run={folder}", "--domain=3", f"--output={tmp_path / 'merged.pt'}"]) == 0
    plain = run.experiment.backbone.build(run.schema, run.config.embeddings.dim)
    for module in plain.modules():
        if isinstance(module, torch.nn.EmbeddingBag) and module.weight.is_meta:
            module.to_empty(device="cpu")
    plain.load_state_dict(torch.load(tmp_path / "merged.pt"))
    with torch.no_grad():
        found = plain.eval()(*model_rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_shards_by_rows_and_by_columns(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(6, 4)
    dcp.save({"t": table}, checkpoint_id=str(tmp_path), no_dist=True)
    stored = StoredTensor(str(tmp_path), "t")
    assert torch.equal(stored.at(torch.tensor([5, 0, 0])), table[[5, 0, 0]])
    stored._pieces = [((0, 0), table[:2]), ((2, 0), table[2:, :1]), ((2, 1), table[2:, 1:])]
    assert torch.equal(stored.at(torch.tensor([5, 0, 2])), table[[5, 0, 2]])
