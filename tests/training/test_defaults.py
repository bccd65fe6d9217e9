"""Default settings on tables that nobody has tuned anything on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.data import tables
from torchrec_mdr.train import main


def run(data: Path, *options: str) -> dict[str, Any]:
    """What a run on a folder leaves in metrics.json."""
    out = data.parent / f"{data.name}-run-{len(list(data.parent.iterdir()))}"
    assert main([f"--dataset={data}/", f"--output_dir={out}", *options]) == 0
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return result


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_rows_of_domains_that_differ_are_learned_as_with_the_papers_recipe(tmp_path: Path, seed: int) -> None:
    data = tables.differing_domains(tmp_path / "few", seed)
    ours, papers = run(data, f"--seed={seed}"), run(data, f"--seed={seed}", "--recipe=paper")
    assert ours["test"]["auc"] >= papers["test"]["auc"] - 0.005
    assert ours["test"]["auc"] > ours["test_backbone"]["auc"]
    assert all(stage["steps"] >= 100 and stage["note"] is None for stage in ours["stages"])


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("known", "seeds"), [(False, (0, 1, 2)), (True, (1,))])  # a run takes minutes
def test_a_gate_over_hundreds_of_domains_never_ends_below_its_experts(
    known: bool, seeds: tuple[int, ...], tmp_path: Path
) -> None:
    """In each run on validation rows; where the domain is no feature, above them on average."""
    gains = []
    for seed in seeds:
        data = tables.many_domains(tmp_path / f"many-{seed}", seed, known)
        result = run(data, "--method=moe_mlora", f"--seed={seed}")
        stages = {stage["name"]: stage for stage in result["stages"]}
        pretrain, adapt, gate = (stages[name]["validation"]["auc"] for name in ("pretrain", "adapt", "gate"))
        gains.append(gate - adapt)
        assert gains[-1] >= -1e-6
        assert stages["gate"]["note"] is None or gains[-1] < 1e-6  # where the start is kept, a note says so
        assert known or (adapt > pretrain + 0.01 and result["test"]["auc"] > result["test_backbone"]["auc"] + 0.01)
    assert known or sum(gains) / len(gains) > 0, gains


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interactions_are_learned_above_logistic_regression(tmp_path: Path, seed: int) -> None:
    data = tables.interactions(tmp_path / "table", seed)
    kinds, numbers = [f"c{i}" for i in range(8)], [f"x{i}" for i in range(6)]
    encode = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), kinds), (StandardScaler(), numbers))
    regression = make_pipeline(encode, LogisticRegression(max_iter=2000)).fit(*tables.table(data, "train"))
    features, labels = tables.table(data, "test")
    auc = roc_auc_score(labels, regression.predict_proba(features)[:, 1])
    assert run(data, "--method=mix")["test"]["auc"] > auc + 0.01


def test_a_few_steps_are_no_silent_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches as large as the data and an average over a thousand steps: what is kept is trained, or a note says no."""
    data = tables.differing_domains(tmp_path / "few", 0, rows=600)
    options = ["--batch_size=4096", "--stages.pretrain.epochs=2"]
    adapt = {"epochs": 2, "ema_rows": 0, "ema_decay": 0.999, "learning_rate": 1e-9, "validation_rows": 480}
    result = run(data, *options, *(f"--stages.adapt.{name}={value}" for name, value in adapt.items()))
    note = result["stages"][1]["note"]
    assert note is not None and "stage 'adapt' learned nothing: in 2 steps" in note and "--batch_size" in note
    assert f"note: {note}" in capsys.readouterr().out
