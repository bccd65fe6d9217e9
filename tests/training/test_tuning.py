"""`--tune`: trials on validation rows before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.data import own
from torchrec_mdr.train import main
from torchrec_mdr.training.options import parse
from torchrec_mdr.training.tuning import candidates


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own.write(Path("mine"))


def test_the_first_trial_is_the_run_as_it_is_and_the_others_differ() -> None:
    given = ["--dataset=./mine/", "--tune=5"]
    trials = candidates(parse(given))
    assert trials[0] == [] and len(trials) == 5
    rates = [parse([*given, *trial]).run.stages.pretrain.learning_rate for trial in trials]
    assert len(set(rates)) == 5 and all(2e-4 < rate < 6e-3 for rate in rates)
    dropout = [parse([*given, *trial]).backbone.dropout for trial in trials[1:]]
    assert all(0 <= share <= 0.4 for share in dropout) and len(set(dropout)) == 4


def test_the_best_on_validation_rows_is_run_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset=./mine/", "--method=mix", "--stages.pretrain.epochs=2", "--output_dir=out", "--tune=3"]
    assert main(options) == 0
    found = json.loads(Path("out/tuning.json").read_text())
    assert len(found["trials"]) == 3 and "tuning: trial 3 of 3" in capsys.readouterr().out
    chosen = found["trials"][found["chosen"]]
    lowest = min(trial["logloss"] for trial in found["trials"])
    close = [trial["auc"] for trial in found["trials"] if trial["logloss"] <= 1.01 * lowest]
    assert chosen["auc"] == max(close)
    result = json.loads(Path("out/metrics.json").read_text())
    assert result["stages"][-1]["validation"]["auc"] == chosen["auc"]
    stored = yaml.safe_load(Path("out/config.yaml").read_text())
    assert stored["tune"] == 0  # run again with --config, it is this one run


def test_a_stage_by_itself_is_not_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset=./mine/", "--stage=pretrain", "--tune=3"]) == 2
    assert "--tune tries whole runs; leave out --stage" in capsys.readouterr().err
