"""A real Slurm, two nodes on this machine: what TorchX submits goes on by itself, to the bits of a run left alone.

`$MDR_SHARED/slurm/start.sh` starts one where none runs. A job that is queued again waits two minutes there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.launching import ROOT, SLOW, STAGES, clean_environment, kill, newest_step, parent_of, ranks_of
from tests.faults.launching import RUN as RUN_OF_20
from tests.test_train import metrics, same_result

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

RUN = [option.replace("epochs=20", "epochs=10") for option in RUN_OF_20]
RUN += SLOW


class Slurm:
    """The Slurm of this machine, and where its jobs keep prepared data."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def submit(self, folder: Path, slow_seconds: float, time_limit: str = "60") -> Job:
        """Submits a run on two nodes, with one process each, that may be started again nine times."""
        folder.mkdir()
        env = clean_environment(self.cache, slow_seconds)
        command = ["torchx", "run", "-s", "slurm", "-cfg", f"partition=main,time={time_limit}"]
        command += [
            f"{ROOT}/torchx_components/mdr.py:train",
            "-j",
            "2x1",
            "--memMB",
            "3000",
            "--max_retries",
            "9",
            "--",
        ]
        # TorchX ends in a traceback where Slurm keeps no accounts; the job is under way all the same
        told = subprocess.run(
            [*command, *RUN, f"--output_dir={folder / 'run'}"], cwd=folder, env=env, capture_output=True, text=True
        )
        found = re.search(r"slurm://torchx/(\d+)", told.stdout)
        assert found is not None, told.stdout + told.stderr
        return Job(found[1], folder)


class Job:
    """A job of Slurm.

    Args:
        number (str): Slurm's.
        folder (Path): where it was submitted, and runs.
    """

    def __init__(self, number: str, folder: Path) -> None:
        self.number = number
        self.folder = folder
        self.run = folder / "run"

    def asked(self, field: str) -> str:
        """A field of what Slurm says about it."""
        said = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True).stdout
        found = re.search(rf"\b{field}=(\S+)", said)
        return found[1] if found else ""

    def until(self, true: Callable[[], object], seconds: float = 300.0) -> None:
        """Waits until something is true."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline or self.asked("JobState") in ("CANCELLED", "TIMEOUT", ""):
                state = self.asked("JobState")
                subprocess.run(["scancel", self.number])
                raise AssertionError(f"job {self.number}, {state}: {self.said()[-6000:]}")
            time.sleep(0.2)

    def ends(self, seconds: float = 2400.0) -> int:
        """Waits for its end; how often it was started again."""
        self.until(lambda: self.asked("JobState") == "COMPLETED", seconds)
        return int(self.asked("Restarts"))

    def said(self) -> str:
        """What it has printed so far."""
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in self.folder.glob("slurm-*"))

    def at(self, stage: str, step: int) -> bool:
        """Whether both processes run, and a stage has come so far."""
        return len(ranks_of(self.run)) == 2 and (newest_step(self.run, stage) or 0) >= step


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm with two nodes: the one that runs here, or one that is started."""
    folder = tmp_path_factory.mktemp("slurm")
    if _answers():
        yield Slurm(folder / "cache")
        return
    script = Path(os.environ.get("MDR_SHARED", ROOT.parent / "shared")) / "slurm" / "start.sh"
    if not script.is_file() or os.getuid() != 0:
        pytest.skip(
            f"no Slurm runs here, and none can be started: needs root, and {script}; name its folder in $MDR_SHARED"
        )
    told = subprocess.run(["bash", str(script), str(folder / "state")], capture_output=True, text=True)
    if told.returncode or not _answers():
        pytest.skip(f"Slurm could not be started: {(told.stderr or told.stdout).strip()[-300:]}")
    yield Slurm(folder / "cache")
    subprocess.run(["bash", str(script.with_name("stop.sh")), str(folder / "state")])


def _answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo", "-h", "-o", "%D"], capture_output=True, text=True).stdout.strip() == "2"


@pytest.fixture(scope="module")
def whole(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on both nodes that nothing interrupts."""
    job = slurm.submit(tmp_path_factory.mktemp("whole") / "job", slow_seconds=0.0)
    assert job.ends() == 0 and metrics(job.run)["world_size"] == 2
    return job.run


def test_a_worker_is_killed(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """torchrun starts it again, in the same job."""
    job = slurm.submit(tmp_path / "job", slow_seconds=0.03)
    for stage, rank in (("pretrain", 1), ("adapt", 0)):
        job.until(lambda stage=stage: job.at(stage, 150))
        kill(ranks_of(job.run)[rank])
    assert job.ends() == 0
    same_result(whole, job.run, STAGES)


def test_a_node_is_lost(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Its torchrun and its worker end at once; Slurm starts the job again."""
    job = slurm.submit(tmp_path / "job", slow_seconds=0.03)
    job.until(lambda: job.at("pretrain", 150))
    worker = ranks_of(job.run)[1]
    agent = parent_of(worker)
    kill(agent)
    kill(worker)
    assert job.ends() == 1
    same_result(whole, job.run, STAGES)


def test_a_job_is_requeued(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path / "job", slow_seconds=0.03)
    job.until(lambda: job.at("adapt", 150))
    subprocess.run(["scontrol", "requeue", job.number], check=True)
    assert job.ends() == 1
    same_result(whole, job.run, STAGES)


def test_a_job_is_warned_before_its_time_is_over(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Three minutes a start, and SIGUSR1 one minute before their end: it saves, and starts as often as it needs."""
    job = slurm.submit(tmp_path / "job", slow_seconds=0.1, time_limit="3")
    restarts = job.ends()
    stops = [int(step) for step in re.findall(r"stopped by SIGUSR1 after step (\d+)", job.said())]
    print(f"{restarts} restarts, stopped after steps {stops}", file=sys.stderr)
    assert 1 <= len(stops) <= restarts <= 9
    same_result(whole, job.run, STAGES)
