"""The order in which processes are started, and what becomes of them; a shell script stands for the training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.compare.conftest import write_grid
from torchrec_mdr.compare import launchers
from torchrec_mdr.compare.grid import Cell, read_grid
from torchrec_mdr.compare.launchers import LocalProcesses, Process
from torchrec_mdr.compare.plan import Run, plan
from torchrec_mdr.compare.run import Job, Workplace, make_jobs, run_jobs


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    (tmp_path / "out").mkdir()
    return Workplace(str(tmp_path / "out"))


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Puts a script in the place of Python: it gets `-m torchrec_mdr.train` and the run's arguments."""
    script = tmp_path / "pretend.sh"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def job(place: Workplace, key: str, needs: Job | None = None) -> Job:
    return Job(key, [key], place.path(key), place.path(key, "done"), needs)


def planned(tmp_path: Path, *methods: Any, **options: Any) -> list[Run]:
    grids = [{"backbones": ["mlp"], "methods": list(methods), "options": options}]
    return plan(read_grid(str(write_grid(tmp_path / "grid.yaml", grids=grids))).cells)


FINISH = 'mkdir -p "{root}/$3" && touch "{root}/$3/done" && echo "threads $OMP_NUM_THREADS"'


def test_a_shared_backbone_comes_first_and_only_its_users_wait(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, FINISH.format(root=place.root) + f' && echo "$3" >> "{tmp_path}/order"')
    first = job(place, "first")
    jobs = [first, job(place, "user", first), job(place, "free")]
    seen: list[int] = []
    run_jobs(jobs, place, LocalProcesses(1), 1, lambda: seen.append(1))
    assert (tmp_path / "order").read_text().split() == ["first", "user", "free"]
    assert place.failures == {} and len(seen) == 3


def test_a_failed_pretraining_fails_its_users_and_no_others(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = '[ "$3" = first ] && { echo "error: no luck"; exit 2; }\n'
    pretend(monkeypatch, tmp_path, fail + FINISH.format(root=place.root))
    first = job(place, "first")
    run_jobs([first, job(place, "user", first), job(place, "free")], place, LocalProcesses(2), 2, lambda: None)
    assert place.failures["first"] == "exit code 2: no luck"
    assert (place.log("first")) in place.failures["user"]
    assert set(place.failures) == {"first", "user"} and Path(place.path("free/done")).exists()
    assert Workplace(place.root).failures == place.failures
    # a later call tries again
    pretend(monkeypatch, tmp_path, FINISH.format(root=place.root))
    run_jobs([first, job(place, "user", first)], place, LocalProcesses(1), 1, lambda: None)
    assert Workplace(place.root).failures == {}


def test_a_failure_is_that_of_the_last_try(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, failure in (
        ("printf 'error: of the first try'; exit 2", "of the first try"),
        ("exit 3", "it said nothing"),
    ):
        pretend(monkeypatch, tmp_path, body)
        run_jobs([job(place, "one")], place, LocalProcesses(1), 1, lambda: None)
        assert place.failures["one"].endswith(f": {failure}")


@pytest.mark.parametrize(
    ("set_by_user", "parallel", "threads"), [(None, 1, 8), (None, 3, 2), (None, 16, 1), ("5", 2, 5)]
)
def test_the_cores_are_shared_out(
    place: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_by_user: str | None,
    parallel: int,
    threads: int,
) -> None:
    monkeypatch.setattr(launchers, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    pretend(monkeypatch, tmp_path, FINISH.format(root=place.root))
    run_jobs([job(place, "one")], place, LocalProcesses(parallel), parallel, lambda: None)
    assert f"threads {threads}\n" in Path(place.log("one")).read_text()


def test_a_signal_ends_the_processes_under_way(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, '[ "$3" = quick ] && exit 1\nexec sleep 600')
    started: list[subprocess.Popen[bytes]] = []

    class Kept(LocalProcesses):
        def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
            process = super().start(key, arguments, log)
            assert isinstance(process, subprocess.Popen)
            started.append(process)
            return process

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [job(place, "quick"), job(place, "slow"), job(place, "never")],
            place,
            Kept(2),
            2,
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
    codes = [process.returncode for process in started]
    assert codes[:2] == [1, -signal.SIGTERM] and None not in codes
    assert signal.getsignal(signal.SIGTERM) is before
    assert "slow" not in place.failures


def test_a_folder_that_was_never_begun_is_begun_anew(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = f'if [ -e "{place.root}/one/checkpoints" ]; then exit 1; fi\n'
    pretend(monkeypatch, tmp_path, refuse + FINISH.format(root=place.root))
    Path(place.path("one/checkpoints")).mkdir(parents=True)
    run_jobs([job(place, "one")], place, LocalProcesses(1), 1, lambda: None)
    assert place.failures == {}


def test_two_calls_in_one_folder_are_refused(place: Workplace) -> None:
    with place.locked(), pytest.raises(ValueError, match="another comparison is at work"), place.locked():
        pass


def test_who_shares_a_backbone(tmp_path: Path, place: Workplace) -> None:
    rank = {"name": "ranked", "method": "mlora", "options": {"method_options.rank": 2, "stages.adapt.epochs": 3}}
    longer = {"name": "longer", "method": "mlora", "options": {"stages.pretrain.epochs": 3}}
    fused = {"name": "fused", "method": "multilora", "options": {"auxiliary_division": ["segment"]}}
    joint = {"name": "joint", "method": "single_lora", "options": {"method_options.schedule": "joint"}}
    methods = ["finetune", "mix", "mlora", rank, longer, fused, joint]
    runs = planned(tmp_path, *methods)
    keys = {run.cell.variant: run.backbone_key for run in runs}
    assert keys["mix"] is keys["joint"] is None
    assert keys["mlora"] == keys["ranked"] == keys["fused"] == keys["finetune"] != keys["longer"]
    jobs = make_jobs(runs, place)
    pretraining = [one for one in jobs if "--stage=pretrain" in one.arguments]
    # finetune's own tables are not what the others could take up
    assert [one.arguments[0] for one in pretraining] == ["--method=mlora", "--method=mlora"]
    given = {one.key.split("-")[-2]: one.arguments[-1] for one in jobs if one not in pretraining}
    assert given["finetune"] == given["mlora"] == f"--init_checkpoint={pretraining[0].done}"
    assert not given["mix"].startswith("--init_checkpoint") and not given["joint"].startswith("--init_checkpoint")
    (alone,) = [one for one in make_jobs(runs[:1], place) if "--stage=pretrain" in one.arguments]
    assert alone.arguments[0] == "--method=finetune" and alone.folder.endswith("-finetune")


def test_an_auxiliary_division_that_is_the_natural_one_is_refused_there_alone(tmp_path: Path) -> None:
    fused = {"name": "fused", "method": "multilora", "options": {"auxiliary_division": ["segment"]}}
    grids = [{"backbones": ["mlp"], "methods": ["mlora", fused], "divisions": ["scenario", "segment"]}]
    runs = plan(read_grid(str(write_grid(tmp_path / "grid.yaml", grids=grids))).cells)
    refusals = {run.key: run.refusal for run in runs if run.refusal is not None}
    assert refusals == {
        "synthetic-segment-mlp-fused-seed0": "the divisions segment, segment must differ from each other"
    }
    # one that does not exist is an error at once
    grids = [{"backbones": ["mlp"], "methods": ["mlora"], "divisions": ["scenarios"]}]
    with pytest.raises(ValueError, match="scenarios"):
        plan(read_grid(str(write_grid(tmp_path / "grid.yaml", grids=grids))).cells)


def test_a_divisions_name_is_no_path(tmp_path: Path) -> None:
    cell = Cell("mix", "mix", "mlp", {"dataset": "./some/data/"}, 3, "here")
    run = Run(cell, "user/age", {}, None, True, None)
    assert run.key == "data-user%2Fage-mlp-mix-seed3"


def test_seeds_and_divisions_share_no_backbone(tmp_path: Path) -> None:
    grids = [{"backbones": ["mlp"], "methods": ["mlora"], "divisions": ["scenario", "segment"], "seeds": [0, 1]}]
    runs = plan(read_grid(str(write_grid(tmp_path / "grid.yaml", grids=grids))).cells)
    assert len({run.backbone_key for run in runs}) == 4
