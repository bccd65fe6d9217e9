"""Runs as a user makes them, on small synthetic data."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.experiments.leave_one_out.hook import LeaveOneOut
from torchrec_mdr.train import main

SMALL = [
    "--dataset_options.rows=6000",
    "--dataset_options.num_domains=4",
    "--batch_size=256",
    "--backbone_options.hidden=[16,8]",
    "--stages.pretrain.epochs=2",
    "--stages.adapt.epochs=2",
    "--stages.fuse.epochs=1",
    "--stages.gate.epochs=1",
    "--stages.joint.epochs=1",
]
# a backbone that knows its rows by heart, and adapters that are kept from relying on it
LEAVE_ONE_OUT = [
    "--stages.pretrain.embedding_learning_rate=0.05",
    "--stages.pretrain.epochs=4",
    "--stages.adapt.hooks=[leave_one_out]",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_new(str(folder), "", torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("mlora", ["pretrain", "adapt"]),
        ("single_lora", ["pretrain", "adapt"]),
        ("moe_mlora", ["pretrain", "adapt", "gate"]),
        ("multilora", ["pretrain", "adapt_scenario", "adapt_segment", "fuse"]),
    ],
)
def test_metrics_file_has_the_agreed_form(method: str, stages: list[str], tmp_path: Path) -> None:
    assert main([*SMALL, f"--method={method}", f"--output_dir={tmp_path / 'run'}"]) == 0
    result = metrics(tmp_path / "run")
    assert result["method"] == method and result["backbone"] == "mlp" and result["dataset"] == "synthetic"
    assert result["divisions"] == (["scenario", "segment"] if method == "multilora" else ["scenario"])
    assert [stage["name"] for stage in result["stages"]] == stages
    for stage in result["stages"]:
        assert stage["trainable_parameters"] > 0 and stage["validation"]["auc"] > 0.4
    for part in (result["test"], result["test_backbone"]):
        assert part["rows"] == 600 == sum(domain["rows"] for domain in part["domains"].values())
        assert len(part["domains"]) == 4
    assert set(result["parameters"]) == {"embeddings", "backbone", "adapters", "gate"}
    assert (tmp_path / "run" / "config.yaml").exists()
    assert list((tmp_path / "run" / "events").iterdir())
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == sorted(stages)


def test_the_adapt_stage_leaves_the_backbone_bitwise_alone(tmp_path: Path) -> None:
    assert main([*SMALL, f"--output_dir={tmp_path}"]) == 0
    before, after = tensors(tmp_path / "checkpoints/pretrain"), tensors(tmp_path / "checkpoints/adapt")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(".lora_B" in name and tensor.abs().sum() > 0 for name, tensor in after.items())


def test_a_run_is_repeatable_and_a_stage_alone_gives_the_same(tmp_path: Path) -> None:
    assert main([*SMALL, f"--output_dir={tmp_path / 'a'}"]) == 0
    for stage in ("pretrain", "adapt"):
        assert main([*SMALL, f"--output_dir={tmp_path / 'b'}", f"--stage={stage}"]) == 0
    assert metrics(tmp_path / "a")["test"] == metrics(tmp_path / "b")["test"]


def test_stages_of_one_run_share_what_rows_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    prepare = LeaveOneOut.prepare
    monkeypatch.setattr(LeaveOneOut, "prepare", lambda *args: (measured.append(1), prepare(*args))[1])
    arguments = [*SMALL, *LEAVE_ONE_OUT, "--method=moe_mlora", "--stages.gate.hooks=[leave_one_out]"]
    assert main([*arguments, f"--output_dir={tmp_path / 'a'}"]) == 0
    assert len(measured) == 1
    for stage in ("pretrain", "adapt", "gate"):
        assert main([*arguments, f"--output_dir={tmp_path / 'b'}", f"--stage={stage}"]) == 0
    assert len(measured) == 3
    assert metrics(tmp_path / "a")["test"] == metrics(tmp_path / "b")["test"]


# a training that kills itself at the first look after a checkpoint: whoever watched it from outside might come too late
KILLED = """
import os, signal, sys
from torchrec_mdr.train import main
from torchrec_mdr.training.looks import Looks

progress, look = sys.argv[1], Looks.look

def killed(*given):
    if os.path.isdir(progress) and any("." not in name for name in os.listdir(progress)):
        os.kill(os.getpid(), signal.SIGKILL)
    return look(*given)

Looks.look, Looks.due = killed, lambda looks, steps: steps >= 3
sys.exit(main(sys.argv[2:]))
"""


def kill_at(moment: str, folder: Path, arguments: list[str]) -> None:
    """Runs a training until a stage's checkpoint under way is there, and kills it."""
    command = [sys.executable, "-c", KILLED, str(folder / "checkpoints" / moment), *arguments]
    done = subprocess.run([*command, f"--output_dir={folder}"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, f"it ended by itself: {done.stderr}"


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    slow = [*SMALL, "--stages.pretrain.validations_per_epoch=3", "--stages.adapt.validations_per_epoch=3"]
    slow += ["--backbone_options.dropout=0.2", "--backbone_options.batch_norm=true"]
    slow += ["--stages.pretrain.ema_decay=0.9", "--stages.adapt.ema_decay=0.9", *LEAVE_ONE_OUT]
    assert main([*slow, f"--output_dir={tmp_path / 'whole'}"]) == 0
    broken = tmp_path / "broken"
    kill_at("pretrain.progress", broken, slow)
    kill_at("adapt.progress", broken, [*slow, "--resume"])
    for info in (broken / "checkpoints" / "adapt.progress").glob("*/stage.json"):
        info.write_text(re.sub(r'"stage_seconds": [^,}]*', '"stage_seconds": 1000.0', info.read_text()))
        (info.parent / "digests.json").unlink()  # as one of an older version: it loads
    assert main([*slow, f"--output_dir={broken}", "--resume"]) == 0
    assert metrics(broken)["stages"][1]["seconds"] > 1000, "the time before the kill counts, too"
    same_result(tmp_path / "whole", broken, ("pretrain", "adapt"))


def same_result(one: Path, other: Path, stages: Sequence[str]) -> None:
    """Asserts that two runs come to the same metrics and, bitwise, to the same tensors."""
    assert metrics(one)["test"] == metrics(other)["test"]
    assert metrics(one)["test_backbone"] == metrics(other)["test_backbone"]
    for stage in stages:
        first, second = tensors(one / "checkpoints" / stage), tensors(other / "checkpoints" / stage)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # without batch norm: a bias before one has no gradient but rounding, which Adam blows up to full steps
    assert main([*SMALL, *LEAVE_ONE_OUT, f"--output_dir={tmp_path / 'one'}"]) == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "torchrec_mdr.train"]
    said = subprocess.run(
        [sys.executable, *command, *SMALL, *LEAVE_ONE_OUT, f"--output_dir={tmp_path / 'two'}"],
        check=True,
        capture_output=True,
        text=True,
    )
    scale = re.search(r"rows left out of the embeddings with scale (\S+)", said.stdout + said.stderr)
    assert scale is not None and float(scale[1]) > 0.01
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["test"]["auc"] == pytest.approx(two["test"]["auc"], abs=2e-4)
    assert one["test_backbone"]["logloss"] == pytest.approx(two["test_backbone"]["logloss"], abs=2e-4)


def test_adapters_start_from_a_backbone_trained_elsewhere(tmp_path: Path) -> None:
    assert main([*SMALL, f"--output_dir={tmp_path / 'a'}"]) == 0
    stage = tmp_path / "a/checkpoints/pretrain"
    assert main([*SMALL, f"--output_dir={tmp_path / 'b'}", f"--init_checkpoint={stage}"]) == 0
    assert metrics(tmp_path / "b")["test"] == metrics(tmp_path / "a")["test"]
    plain = {name.removeprefix("backbone."): tensor for name, tensor in tensors(stage).items()}
    torch.save(plain, tmp_path / "backbone.pt")
    init = f"--init_checkpoint={tmp_path / 'backbone.pt'}"
    assert main([*SMALL, f"--output_dir={tmp_path / 'c'}", "--stage=adapt", init]) == 0
    assert metrics(tmp_path / "c")["test"] == metrics(tmp_path / "a")["test"]


def test_an_output_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*SMALL, f"--output_dir={tmp_path}"]) == 2
    assert "is in use" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("resume", [[], ["--resume=auto"]])
def test_a_run_that_comes_to_no_training_leaves_its_folder_free(resume: list[str], tmp_path: Path) -> None:
    arguments, out = [*SMALL, f"--output_dir={tmp_path / 'run'}", *resume], tmp_path / "run"
    (tmp_path / "table.csv").write_text("a,b")
    for start in ("nowhere", "table.csv"):
        assert main([*arguments, f"--init_checkpoint={tmp_path / start}"]) == 2
        assert not list(out.iterdir())
    assert main([*arguments, "--stages.pretrain.epochs=1", "--stage=pretrain"]) == 0
    before = tensors(out / "checkpoints/pretrain")
    assert main([*arguments, "--stages.pretrain.epochs=1", "--stage=adapt", f"--init_adapters={tmp_path}/no"]) == 2
    assert before.keys() == tensors(out / "checkpoints/pretrain").keys() and (out / "config.yaml").is_file()


def test_a_finished_stage_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, f"--output_dir={tmp_path}", "--stage=pretrain"]
    assert main(arguments) == 0
    before = tensors(tmp_path / "checkpoints/pretrain")
    assert main([*arguments, "--seed=1"]) == 2
    assert "stage 'pretrain' is finished" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    after = tensors(tmp_path / "checkpoints/pretrain")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--stages.pretrain.learning_rate=1e30", f"--output_dir={tmp_path}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "not finite" in error or "NaN" in error


def test_a_checkpoint_of_another_division_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, f"--output_dir={tmp_path / 'a'}"]) == 0
    init = f"--init_checkpoint={tmp_path / 'a/checkpoints/adapt'}"
    assert main([*SMALL, f"--output_dir={tmp_path / 'b'}", "--division=segment", "--stage=adapt", init]) == 2
    assert "has adapters of the divisions scenario" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mlora", "single_lora", "moe_mlora"])
def test_a_new_domain_leaves_all_others_bitwise_alone(method: str, tmp_path: Path) -> None:
    arguments = [a for a in SMALL if "num_domains" not in a] + [f"--method={method}"]
    arguments += ["--backbone_options.batch_norm=true"]
    if method == "moe_mlora":
        arguments += ["--method_options.experts_per_domain=2"]
    old = [*arguments, "--dataset_options.num_domains=4", f"--output_dir={tmp_path / 'old'}"]
    new = [*arguments, "--dataset_options.num_domains=5", f"--output_dir={tmp_path / 'new'}"]
    assert main(old) == 0
    init = ["--stage=adapt", f"--init_checkpoint={tmp_path / 'old/checkpoints/adapt'}"]
    assert main([*new, *init]) == 2  # the new domain has to be named
    assert main([*new, *init, "--domains=[4]"]) == 0
    before, after = tensors(tmp_path / "old/checkpoints/adapt"), tensors(tmp_path / "new/checkpoints/adapt")
    slots = 2 if method == "moe_mlora" else 1
    grown = trained = 0
    for name, tensor in before.items():
        if tensor.shape == after[name].shape:
            assert torch.equal(tensor, after[name]), name
            continue
        grown += 1
        if name.endswith("t_scenario.weight"):
            assert torch.equal(after[name][:4], tensor) and torch.allclose(after[name][4], tensor.mean(0))
            continue
        rows = after[name].view(slots, 5, *tensor.shape[1:])
        assert torch.equal(rows[:, :4], tensor.view(slots, 4, *tensor.shape[1:])), name
        if name.endswith(".lora_B"):
            trained += 1
            assert rows[:, 4].abs().sum() > 0, "the new domain's adapter did not train"
    assert grown > 4 and trained > 1


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(folder).items() if ".adapter." in name}


def test_adapters_start_from_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On their own backbone they are what they were; on a newer one a domain trains on, and all others stay."""
    assert main([*SMALL, f"--output_dir={tmp_path / 'old'}"]) == 0
    assert main([*SMALL, f"--output_dir={tmp_path / 'new'}", "--seed=1", "--stage=pretrain"]) == 0
    old = [f"--init_adapters={tmp_path / 'old/checkpoints/adapt'}", "--stage=adapt"]
    same = [*SMALL, *old, f"--init_checkpoint={tmp_path / 'old/checkpoints/pretrain'}", "--stages.adapt.epochs=0"]
    assert main([*same, f"--output_dir={tmp_path / 'same'}"]) == 0
    assert metrics(tmp_path / "same")["test"] == metrics(tmp_path / "old")["test"]
    newer = [*SMALL, *old, f"--init_checkpoint={tmp_path / 'new/checkpoints/pretrain'}", "--domains=[1]"]
    assert main([*newer, f"--output_dir={tmp_path / 'newer'}"]) == 0
    said = capsys.readouterr().out
    (entry,) = (stage for stage in metrics(tmp_path / "newer")["stages"] if stage["name"] == "adapt")
    worth = entry["init_adapters"]
    (backbone,) = (stage for stage in metrics(tmp_path / "old")["stages"] if stage["name"] == "pretrain")
    assert worth["auc"] != worth["auc_without_adapters"] != backbone["validation"]["auc"]
    assert f"validation AUC {worth['auc']:.4f} with the adapters of" in said
    before, after = (adapters(tmp_path / f"{run}/checkpoints/adapt") for run in ("old", "newer"))
    moved = {
        domain for name, t in after.items() for domain in range(4) if not torch.equal(t[domain], before[name][domain])
    }
    assert moved <= {1}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--init_adapters=/nowhere"], "--init_adapters /nowhere does not exist"),
        (["--init_adapters={}/checkpoints/pretrain"], "holds no adapters; name the checkpoint of a stage that trains"),
        (["--init_adapters={}/checkpoints/adapt", "--division=segment"], "has adapters of division 'scenario'"),
        (
            ["--init_adapters={}/checkpoints/adapt", "--method_options.rank=3"],
            "is of another model or division: 'backbone.over_arch.hidden.0.linear.adapter.lora_A' is [4, 1, ",
        ),
        (["--backbone_options.hidden=[12,8]"], "'backbone.over_arch.hidden.0.linear.bias' is [16] there and [12] "),
    ],
    ids=["missing", "of a backbone", "other division", "other rank", "other backbone"],
)
def test_adapters_that_do_not_fit_are_refused(
    options: list[str], sentence: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--stage=adapt", f"--init_checkpoint={finished / 'checkpoints/pretrain'}"]
    given = [option.format(finished) for option in options]
    assert main([*SMALL, *start, *given, f"--output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of MLoRA."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main([*SMALL, f"--output_dir={folder}"]) == 0
    return folder
