"""Baselines in runs as a user makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.train import main

SMALL = [
    "--dataset_options.rows=4000",
    "--dataset_options.num_domains=3",
    "--batch_size=256",
    "--backbone_options.hidden=[8,4]",
    "--stages.pretrain.epochs=2",
    "--stages.adapt.epochs=2",
    "--stages.adapt.weight_decay=0.001",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(folder: Path, *options: str) -> dict[str, Any]:
    assert main([*SMALL, *options, f"--output_dir={folder}"]) == 0
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_new(str(folder), "", torch.device("cpu"))


def test_finetune_tunes_a_backbone_pretrained_elsewhere_and_keeps_it(tmp_path: Path) -> None:
    elsewhere = run(tmp_path / "mlora", "--method=mlora")
    pretrained = tmp_path / "mlora/checkpoints/pretrain"
    result = run(tmp_path / "tuned", "--method=finetune", f"--init_checkpoint={pretrained}")
    assert [stage["name"] for stage in result["stages"]] == ["adapt"]
    assert result["test_backbone"]["auc"] == pytest.approx(elsewhere["test_backbone"]["auc"], abs=1e-6)
    assert result["test"]["auc"] != result["test_backbone"]["auc"]
    before, after = tensors(pretrained), tensors(tmp_path / "tuned/checkpoints/adapt")
    tables = [name for name in before if ".t_" in name]
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)] if name in tables else after[name], tensor), name
    assert tables and all(len(after[name]) == 4 * len(before[name]) for name in tables)

    again = run(  # one domain anew, on what is there
        tmp_path / "again",
        "--method=finetune",
        "--stage=adapt",
        f"--init_checkpoint={tmp_path / 'tuned/checkpoints/adapt'}",
        "--domains=[1]",
        "--stages.adapt.learning_rate=0.01",
    )
    assert again["stages"][0]["trainable_parameters"] > 0
    anew = tensors(tmp_path / "again/checkpoints/adapt")
    for name, tensor in after.items():
        if torch.equal(tensor, anew[name]):
            continue
        rows = 4 if name in tables else 3
        moved = (tensor.view(rows, -1) != anew[name].view(rows, -1)).any(1)[-3:]
        assert moved.tolist() == [False, True, False], name
    assert not all(torch.equal(tensor, anew[name]) for name, tensor in after.items())


def test_single_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best states of domains, embeddings included, outlast an interruption."""
    from torchrec_mdr.training.stage_trainer import StageTrainer

    options = ["--method=single", "--stages.pretrain.learning_rate=0.05"]
    whole = run(tmp_path / "whole", *options)
    assert whole["test_backbone"] is None
    train, calls = StageTrainer._train, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("interrupted")
        train(*args)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "_train", interrupted)
        assert main([*SMALL, *options, f"--output_dir={tmp_path / 'two'}"]) == 2
    resumed = run(tmp_path / "two", *options, "--resume=true")
    assert resumed["test"] == whole["test"]
    ours, theirs = (tensors(tmp_path / folder / "checkpoints/train") for folder in ("whole", "two"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
