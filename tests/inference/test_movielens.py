"""A run on MovieLens-1M, scored by its bundle."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_mdr import export, train
from torchrec_mdr.data.writer import split_path
from torchrec_mdr.inference import load_run
from torchrec_mdr.inference.run_data import data_of
from torchrec_mdr.predict import main


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_predict_by_the_bundle_gives_the_runs_test_auc(
    movielens_1m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    given = ["--dataset=movielens-1m", f"--data_dir={movielens_1m}", "--method=mlora", "--batch_size=2048"]
    short = ["--division=occupation", "--stages.pretrain.epochs=2", "--stages.adapt.epochs=2"]
    assert train.main([*given, *short, f"--output_dir={tmp_path / 'run'}"]) == 0
    run = load_run(str(tmp_path / "run"))
    source = split_path(data_of(run).folder, "test")
    rows, found = pl.read_parquet(source), []
    for name, options in (("plain", []), ("calibrated", ["--calibrate", "--eager"])):
        bundle, target = tmp_path / name, tmp_path / f"{name}.parquet"
        assert export.main([f"--run={run.folder}", f"--output={bundle}", *options]) == 0
        assert main([f"--bundle={bundle}", "--input", source, f"--output={target}"]) == 0
        found.append(pl.read_parquet(target))
        assert found[-1]["reason"].null_count() == len(rows)
    plain, scores = found
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    wanted = results["test"]
    assert wanted["auc"] != results["test_backbone"]["auc"], "adapters that learned nothing would show nothing"
    labels, domains = rows[run.schema.label], rows[f"domain_{run.divisions[0].name}"]
    assert roc_auc_score(labels, plain["score"]) == pytest.approx(wanted["auc"], abs=1e-6)
    for domain, name in enumerate(run.divisions[0].domain_names):  # a scale and a bias a domain leave its order alone
        own = (domains == domain).to_numpy()
        auc = roc_auc_score(labels.to_numpy()[own], scores["score"].to_numpy()[own])
        assert auc == pytest.approx(wanted["domains"][name]["auc"], abs=1e-6)
    before, after = (log_loss(labels, one["score"]) for one in (plain, scores))
    print(f"AUC {roc_auc_score(labels, plain['score']):.7f}, the run's {wanted['auc']:.7f}, {len(labels)} rows")
    print(f"log loss {before:.5f}, calibrated {after:.5f}; seed {run.config.seed}, PyTorch {torch.__version__}")
    assert before == pytest.approx(wanted["logloss"], abs=1e-6) and after < before + 1e-3
