"""Comparisons as a user makes them: training processes, on small synthetic data."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.compare.conftest import OPTIONS, Finished, write_grid
from torchrec_mdr.compare.__main__ import main
from torchrec_mdr.distributed import checkpoint

PREFIX = "synthetic-scenario-mlp"


def folder(finished: Finished, variant: str) -> Path:
    return finished.root / "runs" / f"{PREFIX}-{variant}-seed0"


def metrics(finished: Finished, variant: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder(finished, variant) / "metrics.json").read_text())
    return content


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_new(str(path), "", torch.device("cpu"))


def lines(finished: Finished, name: str = "results.csv") -> dict[str, dict[str, str]]:
    with open(finished.root / name) as file:
        return {line["variant"]: line for line in csv.DictReader(file)}


def backbone(finished: Finished) -> Path:
    (found,) = (finished.root / "backbones").iterdir()
    return found


def call(finished: Finished, *more: str) -> int:
    return main([f"--config={finished.config}", f"--output_dir={finished.root}", *more])


def test_the_backbone_is_pretrained_once_and_taken_up_bitwise(once: Finished) -> None:
    shared = tensors(backbone(once) / "checkpoints/pretrain")
    for variant, stage in (("single_lora", "adapt"), ("fused", "fuse")):
        checkpoints = folder(once, variant) / "checkpoints"
        assert not (checkpoints / "pretrain").exists()
        mine = tensors(checkpoints / stage)
        assert all(torch.equal(mine[name], tensor) for name, tensor in shared.items())
    starts = [log.read_text().count("--stage=pretrain") for log in (once.root / "logs").iterdir()]
    assert sum(starts) == 1
    assert metrics(once, "single_lora")["test_backbone"] == metrics(once, "fused")["test_backbone"] is not None


def test_results_hold_the_whole_cost(once: Finished) -> None:
    entry = checkpoint.read_info(str(backbone(once) / "checkpoints/pretrain"))["entry"]
    own, line = metrics(once, "fused"), lines(once)["fused"]
    assert [stage["name"] for stage in own["stages"]] == ["adapt_scenario", "adapt_segment", "fuse"]
    seconds = [entry["seconds"], *(stage["seconds"] for stage in own["stages"])]
    assert float(line["seconds"]) == pytest.approx(sum(seconds))
    assert float(line["seconds_pretraining"]) == entry["seconds"]
    assert int(line["trained"]) == sum(stage["trainable_parameters"] for stage in own["stages"])
    assert int(line["trained_last_stage"]) == own["stages"][-1]["trainable_parameters"]
    assert float(line["auc"]) == own["test"]["auc"] and float(line["wauc"]) == own["test"]["wauc"]
    assert float(line["backbone_auc"]) == own["test_backbone"]["auc"]
    assert float(line["validation_auc"]) == own["stages"][-1]["validation"]["auc"]
    assert lines(once)["mix"]["backbone_auc"] == lines(once)["mix"]["shared_backbone"] == ""


def test_results_by_domain(once: Finished) -> None:
    with open(once.root / "domains.csv") as file:
        found = {(line["variant"], line["domain"]): line for line in csv.DictReader(file)}
    for name, domain in metrics(once, "single_lora")["test"]["domains"].items():
        line = found["single_lora", name]
        assert float(line["auc"]) == domain["auc"] and int(line["rows"]) == domain["rows"]
    assert len(found) == 3 * 3


def test_what_cannot_be_run_is_a_line_with_the_reason(once: Finished) -> None:
    line = lines(once)["lonely"]
    assert line["status"] == "refused" and line["reason"].startswith("MultiLoRA needs 2 divisions")
    assert not folder(once, "lonely").exists()
    assert "refused: MultiLoRA needs 2 divisions" in (once.root / "results.md").read_text()


def test_a_failed_run_is_named_and_the_others_go_on(
    copied: Callable[..., Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = copied("mix", "wild")
    assert spoilt.code == 1 and lines(spoilt)["mix"]["status"] == "finished"
    assert lines(spoilt)["wild"]["status"] == "failed" and "exit code 2" in lines(spoilt)["wild"]["reason"]
    assert call(spoilt, "--report_only") == 1
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{PREFIX}-wild-seed0" in sentence and str(spoilt.root / "logs") in sentence and "mix" not in sentence
    assert "failed: exit code 2" in (spoilt.root / "results.md").read_text()


def test_finished_runs_are_left_alone(copied: Callable[..., Finished]) -> None:
    spoilt = copied("mix", "single_lora", "fused")
    files = [folder(spoilt, name) / "metrics.json" for name in ("mix", "single_lora", "fused")]
    before = [file.stat().st_mtime_ns for file in files]
    logs = sorted(log.read_text() for log in (spoilt.root / "logs").iterdir())
    assert call(spoilt) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    assert sorted(log.read_text() for log in (spoilt.root / "logs").iterdir()) == logs


def test_an_interrupted_run_goes_on_where_it_stopped(copied: Callable[..., Finished]) -> None:
    spoilt = copied("fused")
    whole, place = metrics(spoilt, "fused"), folder(spoilt, "fused")
    (place / "metrics.json").unlink()
    for stage in ("adapt_segment", "fuse"):
        shutil.rmtree(place / "checkpoints" / stage)
    before = (place / "checkpoints/adapt_scenario/stage.json").stat().st_mtime_ns
    assert call(spoilt) == 0
    assert (place / "checkpoints/adapt_scenario/stage.json").stat().st_mtime_ns == before
    assert metrics(spoilt, "fused")["test"] == whole["test"]
    log = (spoilt.root / "logs" / f"{PREFIX}-fused-seed0.log").read_text()
    assert [line.endswith("--resume") for line in log.splitlines() if line.startswith("$ ")] == [False, True]


def test_results_of_other_options_are_not_taken_for_the_grids(
    copied: Callable[..., Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = copied("mix")
    write_grid(spoilt.config, options=OPTIONS | {"batch_size": 128}, grids=[{"backbones": ["mlp"], "methods": ["mix"]}])
    before = (folder(spoilt, "mix") / "metrics.json").read_text()
    assert call(spoilt) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "batch_size: 256 and 128" in error and str(folder(spoilt, "mix")) in error
    assert (folder(spoilt, "mix") / "metrics.json").read_text() == before


def test_the_report_is_one_file_and_escaped(once: Finished) -> None:
    page = (once.root / "report.html").read_text()
    assert "A &lt;b&gt;small&lt;/b&gt; one" in page and "<b>" not in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"<link|<script|@import|url\(|https?://", page)
    for text in ("single_lora", "How this was made", "stages:", "commit"):
        assert text in page


def test_bad_input_ends_with_one_sentence_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = write_grid(tmp_path / "grid.yaml", options=OPTIONS | {"method_options.rnk": 3})
    for arguments, named in (
        ([f"--config={config}"], "'mix' on 'mlp'"),
        ([f"--config={tmp_path / 'none.yaml'}"], "none.yaml"),
        ([f"--config={config}", "--parallel=0"], "--parallel"),
        ([f"--config={config}", "--paralel=2"], "paralel"),
    ):
        assert main([*arguments, f"--output_dir={out}"]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert named in error
    assert not out.exists()


def test_two_different_runs_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = [{"backbones": ["mlp"], "methods": ["mix"], "options": {"batch_size": size}} for size in (256, 128)]
    config = write_grid(tmp_path / "grid.yaml", grids=grids)
    assert main([f"--config={config}", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "batch_size: 256 and 128" in capsys.readouterr().err


def test_the_same_run_listed_twice_is_one(tmp_path: Path) -> None:
    from torchrec_mdr.compare.grid import read_grid
    from torchrec_mdr.compare.plan import plan

    grid = {"backbones": ["mlp"], "methods": ["mix", "finetune"]}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"options": OPTIONS, "grids": [grid, grid]}))
    assert [run.cell.variant for run in plan(read_grid(str(path)).cells)] == ["mix", "finetune"]
