"""Runs as jobs of a scheduler: what it is asked for, and what becomes of jobs when a comparison ends or comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler
from torchx.specs import AppDef, AppDryRunInfo, AppState, runopts

from tests.compare.conftest import write_grid
from torchrec_mdr.compare import launchers
from torchrec_mdr.compare.__main__ import main
from torchrec_mdr.compare.launchers import Process, SchedulerJobs
from torchrec_mdr.compare.run import Job, Workplace, run_jobs


class Cluster(Scheduler[Any]):
    """A scheduler whose jobs are what the test says they are."""

    def __init__(self) -> None:
        super().__init__("cluster", "test")
        self.states: dict[str, AppState] = {}
        self.commands: list[str] = []
        self.is_down = False

    def set(self, state: AppState) -> None:
        self.states = dict.fromkeys(self.states, state)

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        if dryrun_info.request.endswith("--seed=refused"):
            raise RuntimeError("the queue is full")
        self.commands.append(dryrun_info.request)
        name = f"job{len(self.commands)}"
        self.states[name] = AppState.RUNNING
        return name

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[Any]:
        return AppDryRunInfo(f"{cfg['queue']}: {' '.join(app.roles[0].args)}", str)

    def _run_opts(self) -> runopts:
        options = runopts()
        options.add("queue", type_=str, help="its queue", required=True)
        return options

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        if self.is_down:
            raise ConnectionError("the cluster is down")
        if app_id not in self.states:
            return None
        return DescribeAppResponse(app_id, self.states[app_id])

    def list(self) -> list[ListAppResponse]:
        return []

    def log_iter(self, app_id: str, *args: Any, **kwargs: Any) -> Iterable[str]:
        return [f"{app_id} says:\n", "error: no luck\n"]

    def _cancel_existing(self, app_id: str) -> None:
        self.states[app_id] = AppState.CANCELLED


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    one = Cluster()
    for module in ("api", "config"):
        monkeypatch.setattr(f"torchx.runner.{module}.get_scheduler_factories", lambda: {"cluster": lambda *a, **k: one})
    return one


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    (tmp_path / "out").mkdir()
    return Workplace(str(tmp_path / "out"))


def jobs_of(place: Workplace, component_args: str = "") -> SchedulerJobs:
    launcher = SchedulerJobs("cluster", "queue=q", component_args, place.path("jobs.json"))
    launcher.poll_seconds = 0.01
    return launcher


def job(place: Workplace, key: str = "one") -> Job:
    return Job(key, [f"--seed={key}"], place.path(key), place.path(key, "done"))


def leave_result(one: Job) -> None:
    Path(one.folder).mkdir(exist_ok=True)
    Path(one.done).touch()


def test_a_job_is_the_component_with_the_runs_options(cluster: Cluster, place: Workplace) -> None:
    launcher = jobs_of(place, "-j 1x2 --gpu 2 --env A=1")
    app = launcher.app(["--seed=3", "--output_dir=a b"])
    (role,) = app.roles
    assert "--nproc_per_node 2" in role.args[-1] and role.args[-1].endswith(
        "-m torchrec_mdr.train --seed=3 '--output_dir=a b'"
    )
    assert role.resource.gpu == 2 and role.env["A"] == "1" and role.env["TQDM_MININTERVAL"] == "30"
    launcher.start("one", ["--seed=3"], place.log("one"))
    assert cluster.commands[0].startswith("q: ") and cluster.commands[0].endswith("--seed=3")


@pytest.mark.parametrize(("scheduler", "option", "value"), [("slurm", "partition", "p"), ("kubernetes", "queue", "q")])
def test_dry_run(scheduler: str, option: str, value: str, place: Workplace) -> None:
    launcher = SchedulerJobs(scheduler, f"{option}={value}", "-j 2x4 --gpu 4", place.path("jobs.json"))
    with get_runner() as runner:
        made = str(runner.dryrun(launcher.app(["--seed=3"]), scheduler, {option: value}))
    request = re.sub(r"['\"]\s*\n\s*['\"]", "", made)
    assert "--nnodes 2 --nproc_per_node 4" in request and "-m torchrec_mdr.train --seed=3" in request
    assert re.search(r"TQDM_MININTERVAL\W+(value\W+)?30\b", request)


def test_what_is_wrong_with_a_scheduler_is_one_sentence(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_grid(tmp_path / "grid.yaml", grids=[{"backbones": ["mlp"], "methods": ["mix"]}])
    for arguments, names in (
        (["--scheduler=slurmm"], ["'slurmm' is unknown", "cluster"]),
        (["--scheduler=cluster"], ["queue"]),
        (["--scheduler=cluster", "--scheduler_args=queue=q", "--component_args=-j 1x1 --gpus 2"], ["--gpus 2"]),
        (["--component_args=-j 1x2"], ["--component_args", "name it with --scheduler"]),
    ):
        assert main([f"--config={config}", f"--output_dir={tmp_path / 'out'}", *arguments]) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert all(name in sentence for name in names), sentence
    assert not cluster.commands


def test_jobs_end_as_processes_do(cluster: Cluster, place: Workplace) -> None:
    good, bad, lost, empty = jobs = [job(place, key) for key in ("good", "bad", "lost", "empty")]
    states = {"good": AppState.SUCCEEDED, "bad": AppState.FAILED, "empty": AppState.SUCCEEDED}

    class Quick(SchedulerJobs):
        poll_seconds = 0.01

        def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
            process = super().start(key, arguments, log)
            name = f"job{len(cluster.commands)}"
            if key == "good":
                leave_result(good)
            if key in states:
                cluster.states[name] = states[key]
            else:
                del cluster.states[name]
            return process

    run_jobs(jobs, place, Quick("cluster", "queue=q", "", place.path("jobs.json")), 1, lambda: None)
    assert set(place.failures) == {"bad", "lost", "empty"}
    assert place.failures["bad"] == "cluster://torchx/job2 FAILED: no luck"
    assert place.failures["lost"].startswith("cluster://torchx/job3 out of the scheduler's sight")
    assert place.failures["empty"].startswith(f"it left no {empty.done}")
    assert "job2 says:\nerror: no luck\n" in Path(place.log("bad")).read_text()
    assert list(json.loads(Path(place.path("jobs.json")).read_text())) == ["lost"]  # it may be there again later


def test_a_later_call_takes_up_what_is_at_work(cluster: Cluster, place: Workplace) -> None:
    one = job(place)
    jobs_of(place).start(one.key, one.arguments, place.log(one.key))
    Path(one.folder).mkdir()  # has begun, and has not written its options yet
    Path(one.folder, "begun").touch()
    Path(place.path("logs")).mkdir()
    Path(place.log(one.key)).write_text("$ of the call before\n")
    seen = []

    class Late(SchedulerJobs):
        poll_seconds = 0.01

        def take_up(self, key: str, log: str) -> Any:
            seen.append(super().take_up(key, log))
            leave_result(one)
            cluster.set(AppState.SUCCEEDED)
            return seen[-1]

    run_jobs([one], place, Late("cluster", "queue=q", "", place.path("jobs.json")), 1, lambda: None)
    assert seen[0] is not None and len(cluster.commands) == 1 and place.failures == {}
    assert Path(one.folder, "begun").exists()


def test_a_job_that_is_not_taken_is_noted_and_the_others_go_on(cluster: Cluster, place: Workplace) -> None:
    good = job(place, "good")

    class Quick(SchedulerJobs):
        poll_seconds = 0.01

        def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
            process = super().start(key, arguments, log)
            leave_result(good)
            cluster.set(AppState.SUCCEEDED)
            return process

    jobs = [job(place, "refused"), good]
    run_jobs(jobs, place, Quick("cluster", "queue=q", "", place.path("jobs.json")), 2, lambda: None)
    assert place.failures == {"refused": "cluster does not take the job: the queue is full: it said nothing"}


def test_what_may_be_at_work_is_not_started_again(cluster: Cluster, place: Workplace) -> None:
    jobs_of(place).start("one", [], place.log("one"))
    cluster.is_down = True
    process = jobs_of(place).take_up("one", place.log("one"))
    assert process is not None and "the cluster is down" in str(process.ending())


def test_a_job_that_ended_meanwhile_is_started_again(cluster: Cluster, place: Workplace) -> None:
    jobs_of(place).start("one", [], place.log("one"))
    cluster.set(AppState.FAILED)
    assert jobs_of(place).take_up("one", place.log("one")) is None
    assert jobs_of(place).take_up("two", place.log("two")) is None


def test_a_signal_cancels_the_jobs(cluster: Cluster, place: Workplace) -> None:
    class Quick(SchedulerJobs):
        poll_seconds = 0.01

        def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
            process = super().start(key, arguments, log)
            if key == "slow":
                cluster.states["job1"] = AppState.FAILED
            return process

    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [job(place, "quick"), job(place, "slow"), job(place, "never")],
            place,
            Quick("cluster", "queue=q", "", place.path("jobs.json")),
            2,
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert cluster.states["job2"] == AppState.CANCELLED
    assert "slow" not in place.failures


def test_a_scheduler_out_of_reach_ends_no_run(
    cluster: Cluster, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "_MOST_SILENT_POLLS", 3)
    Path(place.path("logs")).mkdir()
    process = jobs_of(place).start("one", [], place.log("one"))
    cluster.is_down = True
    assert process.ending() is process.ending() is None
    cluster.is_down = False
    assert process.ending() is None
    cluster.is_down = True
    assert [process.ending() is None for _ in range(3)] == [True, True, False]


def test_the_signal_handlers_stay(place: Workplace) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    SchedulerJobs("local_cwd", "", "", place.path("jobs.json"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.full
def test_a_comparison_by_torchx_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(SchedulerJobs, "poll_seconds", 0.2)
    config = write_grid(tmp_path / "grid.yaml", grids=[{"backbones": ["mlp"], "methods": ["mix"]}])
    arguments = [f"--config={config}", f"--output_dir={tmp_path / 'out'}", "--scheduler=local_cwd"]
    assert main([*arguments, "--component_args=-j 1x2"]) == 0
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["world_size"] == 2
    assert "results go to" in (tmp_path / "out" / "logs" / f"{folder.name}.log").read_text()
    assert "1 at a time on local_cwd" in (tmp_path / "out" / "results.md").read_text()
