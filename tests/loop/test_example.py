"""The example scripts run, alone and on two ranks, and adapters are worth something there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]


@pytest.mark.parametrize("launch", [ONE, pytest.param(TWO, marks=pytest.mark.full)], ids=["1", "2"])
def test_adapters_learn_what_the_backbone_cannot(launch: list[str], tmp_path: Path) -> None:
    command = [*launch, str(ROOT / "examples" / "own_loop.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.split(": log loss ") for line in done.stdout.splitlines() if ": log loss " in line]
    losses = {name.removeprefix(f"{tmp_path}/"): float(loss) for name, loss in lines}
    assert list(losses) == ["pretrain", "mlora", "by_scenario", "by_weekday", "fused", "further"]
    assert max(losses["mlora"], losses["fused"]) < losses["pretrain"]
