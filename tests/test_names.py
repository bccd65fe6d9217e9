"""Names of features, divisions and domains that stand in keys, files, tables and pictures, whatever is in them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data import own
from tests.test_train import kill_at
from torchrec_mdr.backbones.tables import table_name
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.train import main

ODD = ("user/id", "user.id", "user%2Eid", "user%", "größe", "a b")
DIVISIONS = {"kind/of": ["$1_to_$5", "$9", "a.b/c"], "age.group": ["jünger", "älter"]}


def arguments(folder: Path, *given: str) -> list[str]:
    sizes = ["--batch_size=64", "--backbone_options.hidden=[8,4]"]
    return [f"--dataset={folder}/", *sizes, *given]


def epochs(number: int) -> list[str]:
    return [f"--stages.{stage}.epochs={number}" for stage in ("pretrain", "adapt", "fuse")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_new(str(folder), "", torch.device("cpu"))


def test_no_two_features_share_a_table() -> None:
    names = [table_name(name, linear) for name in (*ODD, "user", "linear_user") for linear in (False, True)]
    assert len(set(names)) == len(names)
    assert not any(character in name for name in names for character in "./")
    assert table_name("user") == "t_user" and table_name("user", linear=True) == "linear_user"


# tables of Adam's, in the dense optimizer, and fused ones; DeepFM has two tables a feature
DEEPFM = ["--backbone=deepfm", "--embeddings.optimizer=rowwise_adagrad"]


@pytest.mark.parametrize("given", [["--backbone=mlp"], pytest.param(DEEPFM, marks=pytest.mark.full)])
def test_a_killed_run_resumes_whatever_its_features_are_called(tmp_path: Path, given: list[str]) -> None:
    own.write(tmp_path / "mine", ODD, DIVISIONS, dense="price/per.unit")
    run = arguments(tmp_path / "mine", "--method=multilora", *given, *epochs(12))
    run += ["--stages.pretrain.patience=12", "--stages.pretrain.ema_decay=0.9"]
    assert main([*run, f"--output_dir={tmp_path / 'whole'}"]) == 0
    broken = tmp_path / "broken"
    kill_at("pretrain.progress", broken, run)
    assert main([*run, f"--output_dir={broken}", "--resume"]) == 0
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "whole", broken))
    assert one["test"] == two["test"] and one["test_backbone"] == two["test_backbone"]
    assert list(one["test"]["domains"]) == DIVISIONS["kind/of"] and one["divisions"] == list(DIVISIONS)
    whole, resumed = (tensors(folder / "checkpoints" / "fuse") for folder in (tmp_path / "whole", broken))
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    tables = [name for name in whole if f".{table_name('user/id')}." in name or f".{table_name('user.id')}." in name]
    assert len(tables) == 2 and not torch.equal(whole[tables[0]], whole[tables[1]])


@pytest.mark.parametrize("method", ["plate", "finetune"])
def test_baselines_take_such_names_too(tmp_path: Path, method: str) -> None:
    own.write(tmp_path / "mine", ODD, DIVISIONS)
    run = arguments(tmp_path / "mine", f"--method={method}", *epochs(1), f"--output_dir={tmp_path / 'run'}")
    assert main(run) == 0
    assert main([*run, "--resume"]) == 0


def test_domains_may_be_called_what_matplotlib_takes_for_a_formula(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own.write(tmp_path / "mine", divisions={"price": ["$1_to_$5", "$5_^to_$", "{\\x}"], "device": ["$a$", "b"]})
    run = arguments(tmp_path / "mine", "--method=multilora", *epochs(1), f"--output_dir={tmp_path / 'run'}")
    with caplog.at_level(logging.WARNING):
        assert main(run) == 0
    assert "combination.png" not in caplog.text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["test"]["domains"]) == ["$1_to_$5", "$5_^to_$", "{\\x}"]
    assert (tmp_path / "run" / "combination.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("torchrec_mdr.report.combination.draw_combination", broken)
    own.write(tmp_path / "mine")
    run = arguments(tmp_path / "mine", "--method=multilora", *epochs(1), f"--output_dir={tmp_path / 'run'}")
    assert main(run) == 0
    assert "combination.png could not be drawn: no ink" in caplog.text
    assert (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / "combination.png").exists()


def test_output_that_cannot_show_a_name_replaces_its_letters(tmp_path: Path) -> None:
    own.write(tmp_path / "mine", divisions={"größe": ["größer", "small", "日本"]})
    run = arguments(tmp_path / "mine", *epochs(1), f"--output_dir={tmp_path / 'run'}")
    done = subprocess.run(
        [sys.executable, "-m", "torchrec_mdr.train", *run],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "gr??er" in done.stdout.decode("ascii") and "??  " in done.stdout.decode("ascii")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["test"]["domains"]) == ["größer", "small", "日本"]


@pytest.mark.parametrize("good", [True, False])
def test_the_callers_logging_and_output_stay_as_they_are(
    tmp_path: Path, good: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write(tmp_path / "mine")
    root = logging.getLogger()
    handler = logging.StreamHandler()
    handler.setLevel(logging.CRITICAL)
    root.addHandler(handler)
    try:
        before = [(h, h.level, h.formatter) for h in root.handlers], root.level, sys.stdout.errors
        run = arguments(tmp_path / "mine", *epochs(1), f"--output_dir={tmp_path / 'run'}")
        assert main(run if good else [*run, "--seed=-1"]) == (0 if good else 2)
        assert ([(h, h.level, h.formatter) for h in root.handlers], root.level, sys.stdout.errors) == before
    finally:
        root.removeHandler(handler)
