"""A gate that starts with each row's own experts: its stage never ends below the adapt stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.training.test_sharded_banks import SHARDED, SMALL, killed, trained

GATE = ["--method=moe_mlora", "--method_options.gate_start=own", "--stages.gate.hooks=[]", "--stages.gate.epochs=3"]
WILD = [*GATE, "--stages.gate.learning_rate=1000"]


def validations(metrics: dict[str, Any], figure: str = "auc") -> tuple[float, float]:
    """Of the adapt stage and the gate stage."""
    found = {stage["name"]: stage["validation"][figure] for stage in metrics["stages"]}
    return found["adapt"], found["gate"]


@pytest.mark.parametrize(
    ("options", "figure"),
    [
        ([], "auc"),
        pytest.param(["--method_options.gate_input=domain_and_input"], "auc", marks=pytest.mark.full),
        pytest.param(["--method_options.per_layer=true", "--stages.gate.ema_rows=1000"], "auc", marks=pytest.mark.full),
        pytest.param(["--method_options.top_k=3", "--stages.gate.monitor=logloss"], "logloss", marks=pytest.mark.full),
        pytest.param(["--stages.gate.logloss_tolerance=0.01"], "auc", marks=pytest.mark.full),
    ],
)
def test_steps_of_a_gate_that_make_it_worse_are_taken_back(
    options: list[str], figure: str, tmp_path: Path, one_rank: RankPool
) -> None:
    metrics = one_rank.run(trained, [*SMALL, *WILD, *options], str(tmp_path))[0]
    adapt, gate = validations(metrics, figure)
    better = gate > adapt + 1e-6 if figure == "auc" else gate < adapt - 1e-6  # which a wild step may be by chance
    said = "no validation was better than its start, which is kept" in (metrics["stages"][2]["note"] or "")
    assert said != better and (better or gate == pytest.approx(adapt, abs=1e-6))
    assert said or options


def test_several_experts_of_a_domain_start_with_the_same_weight(tmp_path: Path, one_rank: RankPool) -> None:
    options = ["--method_options.experts_per_domain=2", "--stages.gate.epochs=0"]
    one_rank.run(trained, [*SMALL, *GATE, *options], str(tmp_path))
    layers = json.loads((tmp_path / "combination.json").read_text())["layers"]
    for rows in layers.values():
        for place, row in enumerate(rows.values()):
            assert row == [0.5 * (expert % len(rows) == place) for expert in range(2 * len(rows))]


def test_patience_does_not_look_at_the_start(tmp_path: Path, one_rank: RankPool) -> None:
    """Which slow steps from random values stay below, while they get better."""
    slow = ["--stages.gate.learning_rate=0.001", "--stages.gate.epochs=4", "--stages.gate.patience=1"]
    metrics = one_rank.run(trained, [*SMALL, *GATE, *slow], str(tmp_path))[0]
    gate = metrics["stages"][2]
    assert gate["epochs"] == 4 and gate["note"] is not None


@pytest.mark.parametrize("arguments", [[*SMALL], [*SHARDED, "--method_options.top_k=3"]], ids=["all", "top_k_sharded"])
def test_what_it_learns_takes_the_starts_place_on_two_ranks_and_after_a_kill(
    arguments: list[str], tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    arguments = [*arguments, *GATE, "--stages.gate.learning_rate=0.05"]
    whole = two_ranks.run(trained, arguments, str(tmp_path / "whole"))[0]
    adapt, gate = validations(whole)
    assert gate > adapt and whole["stages"][2]["note"] is None
    two_ranks.run(killed, arguments, str(tmp_path / "broken"), "gate")
    resumed = two_ranks.run(trained, [*arguments, "--resume"], str(tmp_path / "broken"))[0]
    assert resumed["test"] == whole["test"] and resumed["stages"][2]["steps"] == whole["stages"][2]["steps"]
    one = one_rank.run(trained, arguments, str(tmp_path / "one"))[0]
    assert abs(one["test"]["logloss"] - whole["test"]["logloss"]) < 2e-3


@pytest.mark.full
def test_it_starts_from_a_gate_of_an_earlier_run_whether_that_could_fall_back_or_not(
    tmp_path: Path, one_rank: RankPool
) -> None:
    run = [*SMALL, *GATE, "--stages.gate.learning_rate=0.05"]
    for start in ("random", "own"):
        old, new = str(tmp_path / start), str(tmp_path / f"after-{start}")
        first = one_rank.run(trained, [*run, f"--method_options.gate_start={start}"], old)[0]
        given = [*run, f"--init_adapters={old}/checkpoints/gate", f"--init_checkpoint={old}/checkpoints/adapt"]
        later = one_rank.run(trained, [*given, "--stage=gate", "--stages.gate.epochs=0"], new)[0]
        assert validations(first)[1] == pytest.approx(later["stages"][-1]["validation"]["auc"], abs=1e-6)
