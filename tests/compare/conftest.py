"""A small comparison that is run once, and looked at by many tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrec_mdr.compare.__main__ import main

OPTIONS = {
    "dataset": "synthetic",
    "dataset_options": {"rows": 3000, "num_domains": 3},
    "batch_size": 256,
    "backbone_options.hidden": [8, 4],
    "stages": {name: {"epochs": 1} for name in ("pretrain", "adapt", "fuse")},
}
METHODS = [
    "mix",
    "single_lora",
    {"name": "fused", "method": "multilora", "options": {"auxiliary_division": ["segment"]}},
    {"name": "lonely", "method": "multilora", "options": {"auxiliary_division": None}},
    # a rate that no loss survives
    {"name": "wild", "method": "single_lora", "options": {"stages.adapt.learning_rate": 1.0e38}},
]


@dataclass(frozen=True)
class Finished:
    """A comparison after one call.

    Args:
        config (Path): the grid file.
        root (Path): the output folder.
        code (int): the exit code.
    """

    config: Path
    root: Path
    code: int


def write_grid(path: Path, **changes: Any) -> Path:
    grid = {"title": "A <b>small</b> one", "options": OPTIONS, "grids": [{"backbones": ["mlp"], "methods": METHODS}]}
    path.write_text(yaml.safe_dump(grid | changes))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("comparison")
    config = write_grid(folder / "grid.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return Finished(
            config, folder / "out", main([f"--config={config}", f"--output_dir={folder / 'out'}", "--parallel=2"])
        )


@pytest.fixture
def copied(once: Finished, tmp_path: Path) -> Callable[..., Finished]:
    """A copy of the finished comparison to spoil, with a grid of the named methods."""

    def copy(*names: str) -> Finished:
        methods = [one for one in METHODS if (one if isinstance(one, str) else one["name"]) in names]
        config = write_grid(tmp_path / "grid.yaml", grids=[{"backbones": ["mlp"], "methods": methods}])
        shutil.copytree(once.root, tmp_path / "out")
        return Finished(config, tmp_path / "out", once.code)

    return copy
