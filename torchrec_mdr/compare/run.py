"""Runs what a plan holds, some processes at a time, and picks up what an earlier call left."""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from torchrec_mdr.compare.launchers import Launcher, Process, command_of
from torchrec_mdr.compare.plan import PRETRAIN, Run, different_options, flat_options
from torchrec_mdr.storage import make_folder, write_json

CONFIG_FILE, METRICS_FILE, FAILURES_FILE = "config.yaml", "metrics.json", "failures.json"


@dataclass(eq=False)
class Job:
    """One process.

    Args:
        key (str): names it on the terminal, and its log.
        arguments (list[str]): of `torchrec_mdr.train`, without `--resume`.
        folder (Path): its output folder.
        done (Path): what is there once it has finished.
        needs (Job | None): the pretraining that has to finish first.
        run (Run | None): what it belongs to; None for the pretraining of a shared backbone.
    """

    key: str
    arguments: list[str]
    folder: Path
    done: Path
    needs: Job | None = None
    run: Run | None = None


@dataclass
class Workplace:
    """The folder of a comparison.

    Args:
        root (Path): holds `runs`, `backbones`, `logs` and the reports.
    """

    root: Path
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.root / FAILURES_FILE
        if path.exists():
            self.failures = json.loads(path.read_text())

    def folder(self, run: Run) -> Path:
        """Where a run's results go."""
        return self.root / "runs" / run.key

    def log(self, key: str) -> Path:
        """Where a process writes what it prints."""
        return self.root / "logs" / f"{key}.log"

    def finished(self, run: Run) -> bool:
        """Whether a run has left its results."""
        return (self.folder(run) / METRICS_FILE).exists()

    def note(self, key: str, failure: str | None) -> None:
        """Keeps why a process failed; None where it did not, or is tried again."""
        if failure is not None:
            self.failures[key] = failure
        elif self.failures.pop(key, None) is None:
            return
        write_json(str(self.root / FAILURES_FILE), self.failures)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other calls out of the folder.

        Raises:
            ValueError: another call is at work in it, or it cannot be written.
        """
        make_folder(str(self.root), "--output_dir")
        with open(self.root / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"another comparison is at work in {self.root}; wait for it, or end it") from error
            yield


def make_jobs(runs: Sequence[Run], place: Workplace) -> list[Job]:
    """The processes to start, in order: each shared backbone just before the first run that needs it.

    Raises:
        ValueError: a run is there already, with other options.
    """
    for run in runs:
        _check_options(run, place.folder(run))
    pending = [run for run in runs if run.refusal is None and not place.finished(run)]
    jobs: list[Job] = []
    backbones: dict[str, Job] = {}
    for run in pending:
        folder = place.folder(run)
        arguments = [*run.cell.arguments(), f"--output_dir={folder}"]
        needs = None
        if run.backbone_key is not None:
            if run.backbone_key not in backbones:
                sharing = [one for one in runs if one.backbone_key == run.backbone_key]
                backbones[run.backbone_key] = _backbone_job(sharing, place)
                jobs.append(backbones[run.backbone_key])
            needs = backbones[run.backbone_key]
            arguments.append(f"--init_checkpoint={needs.done}")
        jobs.append(Job(run.key, arguments, folder, folder / METRICS_FILE, needs, run))
    return [job for job in jobs if not job.done.exists()]


def _backbone_job(sharing: Sequence[Run], place: Workplace) -> Job:
    plain = [run for run in sharing if run.plain]
    run = (plain or sharing)[0]
    name = str(run.backbone_key)
    if not plain and not _pretrained(place.root / "backbones" / name).exists():
        name += f"-{run.cell.method}"  # its tables may have parts that other methods' tables lack
    folder = place.root / "backbones" / name
    arguments = [*run.cell.arguments(), f"--stage={PRETRAIN}", f"--output_dir={folder}"]
    return Job(f"backbone-{name}", arguments, folder, _pretrained(folder))


def _pretrained(folder: Path) -> Path:
    return folder / "checkpoints" / PRETRAIN


def _check_options(run: Run, folder: Path) -> None:
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    differences = different_options(flat_options(path.read_text()), run.resolved)
    if differences:
        raise ValueError(
            f"{folder} is of a run with other options ({differences}, there and in the grid); choose another "
            "--output_dir, undo the change of the grid, or delete that folder"
        )


def run_jobs(
    jobs: Sequence[Job], place: Workplace, launcher: Launcher, parallel: int, after_each: Callable[[], None]
) -> None:
    """Runs processes until none is left; a failure is noted, and the others go on.

    Args:
        jobs (Sequence[Job]): in order.
        place (Workplace): where they leave their results.
        launcher (Launcher): where they work.
        parallel (int): how many at a time.
        after_each (Callable): called whenever a process has ended.

    Raises:
        KeyboardInterrupt: by SIGINT or SIGTERM; the processes have been ended.
    """
    waiting = list(jobs)
    under_way: dict[Job, Process] = {}
    for job in jobs:
        place.note(job.key, None)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tqdm(total=len(jobs), desc="runs", dynamic_ncols=True) as bar:
            while waiting or under_way:
                endings = {job: process.ending() for job, process in under_way.items()}
                ended = {job: ending for job, ending in endings.items() if ending is not None}
                for job, ending in ended.items():
                    del under_way[job]
                    place.note(job.key, _failure(job, ending, place))
                lost = [job for job in waiting if job.needs is not None and job.needs.key in place.failures]
                for job in lost:
                    waiting.remove(job)
                    assert job.needs is not None
                    place.note(job.key, f"the pretraining of its backbone failed; see {place.log(job.needs.key)}")
                ready = [job for job in waiting if job.needs is None or job.needs.done.exists()]
                for job in ready[: parallel - len(under_way)]:
                    waiting.remove(job)
                    under_way[job] = _start(job, place, launcher)
                bar.set_postfix_str(", ".join(job.key for job in under_way), refresh=False)
                bar.update(len(ended) + len(lost))
                if ended:
                    after_each()
                time.sleep(launcher.poll_seconds)
    finally:
        launcher.close(list(under_way.values()))
        signal.signal(signal.SIGTERM, before)


def _start(job: Job, place: Workplace, launcher: Launcher) -> Process:
    log = place.log(job.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = list(job.arguments)
    at_work = launcher.take_up(job.key, log)
    if at_work is not None:
        return at_work
    if (job.folder / CONFIG_FILE).exists():
        arguments.append("--resume")
    elif job.folder.exists():
        shutil.rmtree(job.folder)  # was ended before it began: the options are written first
    with open(log, "a", encoding="utf-8") as file:
        start = "\n" if file.tell() else ""  # an earlier try may have ended in the middle of a line
        file.write(f"{start}$ {shlex.join(command_of(arguments))}\n")
    return launcher.start(job.key, arguments, log)


def _failure(job: Job, ending: str, place: Workplace) -> str | None:
    """Why a process that has ended failed; None where it did not."""
    if job.done.exists() and not ending:
        return None
    text = place.log(job.key).read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    begun = max(number for number, line in enumerate(lines) if line.startswith("$ "))  # earlier tries lie before
    said = [line for line in lines[begun:] if line.startswith("error: ")] or lines[begun + 1 :] or ["it said nothing"]
    return f"{ending or f'it left no {job.done}'}: {said[-1].removeprefix('error: ')[:300]}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
