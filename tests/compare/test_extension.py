"""A grid of a method, a backbone and a data set of another package, which has nothing of ours but entry points."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from torchrec_mdr.compare.__main__ import main
from torchrec_mdr.compare.grid import read_grid
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "extension"
ENTRY_POINTS = """
[torchrec_mdr.methods]
film = mdr_extension.film:Film
[torchrec_mdr.backbones]
dot_mlp = mdr_extension.dot_mlp:DotMLPConfig
[torchrec_mdr.datasets]
coins = mdr_extension.coins:Coins
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package, as if installed: here and in the processes that are started."""
    folder = tmp_path / "site" / "mdr_extension-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mdr-extension\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = [str(folder.parent), str(SOURCE)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
    for path in paths:
        monkeypatch.syspath_prepend(path)
    registries = METHODS, BACKBONES, DATASETS
    for registry in registries:
        vars(registry).pop("_known", None)
    yield
    for registry in registries:
        vars(registry).pop("_known", None)


def test_it_runs_and_is_no_baseline(installed: None, tmp_path: Path) -> None:
    grid = {
        "options": {"dataset": "coins", "stages.pretrain.epochs": 1, "stages.adapt.epochs": 1},
        "grids": [{"backbones": ["dot_mlp"], "methods": ["film", "mix"]}],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    assert read_grid(str(path)).baselines == ("mix",)
    assert main([f"--config={path}", f"--output_dir={tmp_path / 'out'}", "--parallel=2"]) == 0
    with open(tmp_path / "out" / "results.csv") as file:
        lines = {line["variant"]: line for line in csv.DictReader(file)}
    assert {name: line["status"] for name, line in lines.items()} == {"film": "finished", "mix": "finished"}
    assert (lines["film"]["dataset"], lines["film"]["division"]) == ("coins", "mint")
    assert lines["film"]["shared_backbone"].startswith("coins-mint-dot_mlp-seed0-")
