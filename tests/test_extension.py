"""A package with entry points adds a method, a backbone, data, a metric and a store, and nothing here knows of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the example package is installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("extension")
    shutil.copytree(ROOT / "examples" / "extension", folder / "source")  # a build leaves files beside the source
    target = str(folder / "installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, str(folder / "source")]
    patient = {**os.environ, "PIP_RETRIES": "10", "PIP_DEFAULT_TIMEOUT": "60"}  # with the index that builds ask
    subprocess.run(command, env=patient, check=True, timeout=600)
    path = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "MDR_CACHE": str(folder / "cache")}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchrec_mdr.train", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_it_trains_and_is_labelled_by_its_names(environment: dict[str, str], tmp_path: Path) -> None:
    names = ["--method=film", "--backbone=dot_mlp", "--dataset=coins", "--metrics=[accuracy]"]
    done = run(environment, *names, f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [metrics[name] for name in ("method", "backbone", "dataset", "divisions")] == [
        *("film", "dot_mlp", "coins"),
        ["mint"],
    ]
    assert list(metrics["test"]["domains"]) == ["London", "Paris", "Wien"]
    assert metrics["parameters"]["adapters"] == 3 * 2 * (256 + 128)
    assert metrics["test"]["auc"] > metrics["test_backbone"]["auc"] + 0.02, "each mint bends coins in its own way"
    assert 0.5 < metrics["test"]["accuracy"] < 1 and 0.5 < metrics["test"]["domains"]["Wien"]["accuracy"] < 1


def test_ours_go_with_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    """A paper's method on its backbone and data, and its method on ours."""
    short = ["--stages.pretrain.epochs=1", "--stages.adapt.epochs=1"]
    theirs = ["--method=mlora", "--backbone=dot_mlp", "--dataset=coins"]
    done = run(environment, *theirs, *short, f"--output_dir={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    done = run(environment, "--method=film", "--dataset_options.rows=3000", *short, f"--output_dir={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_lists_its_names_too(environment: dict[str, str]) -> None:
    done = run(environment, "--method=filmm")
    assert done.returncode == 2 and "plate, film" in done.stderr


def test_its_store_takes_a_run(environment: dict[str, str], tmp_path: Path) -> None:
    """Without a file outside of the store but the caches."""
    settings = {**environment, "DRIVE_ROOT": str(tmp_path / "drive"), "MDR_STORE_CACHE": str(tmp_path / "copies")}
    (tmp_path / "drive").mkdir()
    short = ["--dataset_options.rows=3000", "--stages.pretrain.epochs=1", "--stages.adapt.epochs=1"]
    done = run(settings, *short, "--output_dir=drive://runs/a")
    assert done.returncode == 0, done.stderr
    local = run(settings, *short, f"--output_dir={tmp_path / 'local'}")
    assert local.returncode == 0, local.stderr
    one, other = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "drive/runs/a", tmp_path / "local")
    )
    assert one["test"] == other["test"]
