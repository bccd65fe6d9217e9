"""A comparison whose folder lies in an object store."""

from __future__ import annotations

import contextlib
import csv
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrec_mdr import train
from torchrec_mdr.compare import __main__ as command
from torchrec_mdr.compare.launchers import LocalProcesses, Process
from torchrec_mdr.storage import ls, mutex, read_json, read_text, remove, write_text

GRID = {
    "title": "small",
    "options": {
        "dataset": "synthetic",
        "dataset_options": {"rows": 2000, "num_domains": 3},
        "batch_size": 256,
        "backbone_options.hidden": [8, 4],
        "stages": {name: {"epochs": 1} for name in ("pretrain", "adapt")},
    },
    "grids": [
        {
            "backbones": ["mlp"],
            # a rate that no loss survives
            "methods": [
                "mlora",
                {"method": "mlora", "name": "wild", "options": {"stages.adapt.learning_rate": 1.0e38}},
            ],
        }
    ],
}
OF_TIME = {"samples_per_second", "samples_per_second_stages", "seconds", "seconds_pretraining", "seconds_stages"}


class Ended:
    """A process that has come to its end."""

    def __init__(self, code: int) -> None:
        self._code = code

    def ending(self) -> str | None:
        return f"exit code {self._code}" if self._code else ""

    def end(self) -> None:
        pass


class Here(LocalProcesses):
    """Runs in this process, whose memory is the store."""

    def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = train.main(arguments)
        return Ended(code)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MDR_STORE_CACHE", str(tmp_path / "node"))
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "LocalProcesses", Here)
    monkeypatch.setattr("torchrec_mdr.compare.run.STORE_POLL_SECONDS", 0.05)
    grid = f"memory://{tmp_path.name}/grid.yaml"
    write_text(grid, yaml.safe_dump(GRID))
    return grid


def lines(root: str) -> list[dict[str, Any]]:
    found = list(csv.DictReader(io.StringIO(read_text(f"{root}/results.csv"))))
    return [{name: value for name, value in line.items() if name not in OF_TIME | {"reason"}} for line in found]


@pytest.mark.full
def test_a_comparison_in_a_store_is_that_on_a_disk(
    grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, local = f"memory://{tmp_path.name}/compared", str(tmp_path / "compared")
    for folder in (root, local):
        assert command.main([f"--config={grid}", f"--output_dir={folder}"]) == 1
    assert lines(root) == lines(local) and [line["status"] for line in lines(root)] == ["finished", "failed"]
    for name in ("results.md", "report.html"):
        assert len(read_text(f"{root}/{name}")) > 1000
    assert ls(root) == sorted(path.name for path in Path(local).iterdir() if path.name != ".lock")
    assert ls(f"{root}/logs") == ls(f"{local}/logs")
    (wild,) = [name for name in ls(f"{root}/logs") if "wild" in name]
    assert f"their logs are in {root}/logs" in capsys.readouterr().err
    assert "error: " in read_text(f"{root}/logs/{wild}")
    # what is finished stays, what failed is tried again, below what it said before
    (own,) = [name for name in ls(f"{root}/runs") if "mlora" in name]
    before = read_json(f"{root}/runs/{own}/metrics.json")
    assert command.main([f"--config={grid}", f"--output_dir={root}"]) == 1
    assert read_json(f"{root}/runs/{own}/metrics.json") == before
    assert read_text(f"{root}/logs/{wild}").count("error: ") == 2
    # a backbone that is half there is made anew, and a run whose results are lost comes to the same
    (backbone,) = ls(f"{root}/backbones")
    remove(f"{root}/backbones/{backbone}/checkpoints/pretrain/digests.json")
    remove(f"{root}/runs/{own}/metrics.json")
    assert command.main([f"--config={grid}", f"--output_dir={root}"]) == 1
    assert lines(root) == lines(local)


def test_another_call_is_kept_out(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, ended = f"memory://{tmp_path.name}/compared", threading.Event()

    def another() -> None:
        beat = 0
        while not ended.wait(0.05):
            write_text(f"{root}/.lock", f"beat {(beat := beat + 1)}")

    write_text(f"{root}/.lock", "beat 0")
    thread = threading.Thread(target=another)
    thread.start()
    try:
        assert command.main([f"--config={grid}", f"--output_dir={root}"]) == 2
    finally:
        ended.set()
        thread.join()
    assert f"error: another comparison is at work in {root}" in capsys.readouterr().err
    # one that was killed is not waited for longer than its lease
    monkeypatch.setattr(mutex, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(mutex, "SETTLE_SECONDS", 0.1)
    assert command.main([f"--config={grid}", f"--output_dir={root}", "--report_only"]) == 0
    assert [line["status"] for line in lines(root)] == ["waiting", "waiting"]
