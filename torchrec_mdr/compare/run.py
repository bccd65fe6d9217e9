"""Runs what a plan holds, some processes at a time, and picks up what an earlier call left."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType

from tqdm import tqdm

from torchrec_mdr.compare.launchers import Launcher, Process, command_of
from torchrec_mdr.compare.plan import PRETRAIN, Run, different_options, flat_options
from torchrec_mdr.storage import (
    exclusive,
    exists,
    is_store,
    is_whole,
    isfile,
    make_folder,
    put_file,
    read_bytes,
    read_json,
    read_text,
    remove_folder,
    scratch_folder,
    write_bytes,
    write_json,
)

CONFIG_FILE, METRICS_FILE, FAILURES_FILE = "config.yaml", "metrics.json", "failures.json"
STORE_POLL_SECONDS = 2.0  # between two looks at what is under way, where that asks a store


@dataclass(eq=False)
class Job:
    """One process.

    Args:
        key (str): names it on the terminal, and its log.
        arguments (list[str]): of `torchrec_mdr.train`, without `--resume`.
        folder (str): its output folder.
        done (str): the file or the checkpoint that is there once it has finished.
        needs (Job | None): the pretraining that has to finish first.
        run (Run | None): what it belongs to; None for the pretraining of a shared backbone.
    """

    key: str
    arguments: list[str]
    folder: str
    done: str
    needs: Job | None = None
    run: Run | None = None

    def finished(self) -> bool:
        """Whether it has left what it is for."""
        return isfile(self.done) or is_whole(self.done)


@dataclass
class Workplace:
    """The folder of a comparison.

    In a store, logs are written locally, and copied there when their process has ended.

    Args:
        root (str): holds `runs`, `backbones`, `logs` and the reports.
    """

    root: str
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._local_logs = self.path("logs")
        self.check: Callable[[], None] = lambda: None  # raises ValueError where the lock has become another's
        path = self.path(FAILURES_FILE)
        if exists(path):
            self.failures = read_json(path)

    def path(self, *names: str) -> str:
        """A file or folder in it."""
        return os.path.join(self.root, *names)

    def folder(self, run: Run) -> str:
        """Where a run's results go."""
        return self.path("runs", run.key)

    def log(self, key: str) -> str:
        """Where one finds what a process has printed."""
        return self.path("logs", f"{key}.log")

    def local_log(self, key: str) -> str:
        """Where a process writes it."""
        return os.path.join(self._local_logs, f"{key}.log")

    def begin_log(self, key: str) -> str:
        """Gets ready what :meth:`local_log` names, with what earlier tries have left."""
        make_folder(self._local_logs, "--output_dir")
        if is_store(self.root) and isfile(self.log(key)):
            put_file(self.log(key), self.local_log(key))
        return self.local_log(key)

    def keep_log(self, key: str) -> None:
        """Brings a log to where one finds it."""
        if is_store(self.root) and isfile(self.local_log(key)):
            put_file(self.local_log(key), self.log(key))

    def finished(self, run: Run) -> bool:
        """Whether a run has left its results."""
        return isfile(os.path.join(self.folder(run), METRICS_FILE))

    def note(self, key: str, failure: str | None) -> None:
        """Keeps why a process failed; None where it did not, or is tried again."""
        if failure is not None:
            self.failures[key] = failure
        elif self.failures.pop(key, None) is None:
            return
        write_json(self.path(FAILURES_FILE), self.failures)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other calls out of the folder.

        Raises:
            ValueError: another call is at work in it, or it cannot be written.
        """
        make_folder(self.root, "--output_dir")
        busy = f"another comparison is at work in {self.root}; wait for it, or end it"
        logs = scratch_folder() if is_store(self.root) else nullcontext(self._local_logs)
        with exclusive(self.path(".lock"), busy) as held, logs as self._local_logs:
            self.check = held.check
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
        jobs.append(Job(run.key, arguments, folder, os.path.join(folder, METRICS_FILE), needs, run))
    return [job for job in jobs if not job.finished()]


def _backbone_job(sharing: Sequence[Run], place: Workplace) -> Job:
    plain = [run for run in sharing if run.plain]
    run = (plain or sharing)[0]
    name = str(run.backbone_key)
    if not plain and not is_whole(_pretrained(place.path("backbones", name))):
        name += f"-{run.cell.method}"  # its tables may have parts that other methods' tables lack
    folder = place.path("backbones", name)
    arguments = [*run.cell.arguments(), f"--stage={PRETRAIN}", f"--output_dir={folder}"]
    return Job(f"backbone-{name}", arguments, folder, _pretrained(folder))


def _pretrained(folder: str) -> str:
    return os.path.join(folder, "checkpoints", PRETRAIN)


def _check_options(run: Run, folder: str) -> None:
    path = os.path.join(folder, CONFIG_FILE)
    if not exists(path):
        return
    differences = different_options(flat_options(read_text(path)), run.resolved)
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
    waiting, finished = list(jobs), 0
    under_way: dict[Job, Process] = {}
    for job in jobs:
        place.note(job.key, None)
    pause = STORE_POLL_SECONDS if is_store(place.root) else launcher.poll_seconds
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        # a log gets a line where something has happened, a terminal a bar
        on_terminal = sys.stderr.isatty()
        with tqdm(total=len(jobs), desc="runs", dynamic_ncols=True, disable=not on_terminal) as bar:
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
                needed = {job.needs for job in waiting if job.needs is not None}
                there = {job for job in needed if job.finished()}
                ready = [job for job in waiting if job.needs is None or job.needs in there]
                started = ready[: parallel - len(under_way)]
                for job in started:
                    waiting.remove(job)
                    under_way[job] = _start(job, place, launcher)
                finished += len(ended) + len(lost)
                if started or ended or lost:
                    at_work = ", ".join(job.key for job in under_way) or "none"
                    bar.set_postfix_str(at_work, refresh=False)
                    if not on_terminal:
                        print(f"runs: {finished} of {len(jobs)} have ended, under way: {at_work}", file=sys.stderr)
                bar.update(len(ended) + len(lost))
                if ended:
                    after_each()
                time.sleep(pause)
    finally:
        launcher.close(list(under_way.values()))
        for job in under_way:
            place.keep_log(job.key)
        signal.signal(signal.SIGTERM, before)


def _start(job: Job, place: Workplace, launcher: Launcher) -> Process:
    place.check()
    log = place.begin_log(job.key)
    arguments = list(job.arguments)
    at_work = launcher.take_up(job.key, log)
    if at_work is not None:
        return at_work
    if exists(os.path.join(job.folder, CONFIG_FILE)):
        arguments.append("--resume")
    elif exists(job.folder):
        remove_folder(job.folder)  # was ended before it began: the options are written first
    said = read_bytes(log) if exists(log) else b""
    start = "\n" if said else ""  # an earlier try may have ended in the middle of a line
    write_bytes(log, said + f"{start}$ {shlex.join(command_of(arguments))}\n".encode())
    place.keep_log(job.key)
    return launcher.start(job.key, arguments, log)


def _failure(job: Job, ending: str, place: Workplace) -> str | None:
    """Why a process that has ended failed; None where it did not."""
    place.keep_log(job.key)
    if job.finished() and not ending:
        return None
    text = read_bytes(place.local_log(job.key)).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    begun = max(number for number, line in enumerate(lines) if line.startswith("$ "))  # earlier tries lie before
    said = [line for line in lines[begun:] if line.startswith("error: ")] or lines[begun + 1 :] or ["it said nothing"]
    return f"{ending or f'it left no {job.done}'}: {said[-1].removeprefix('error: ')[:300]}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
