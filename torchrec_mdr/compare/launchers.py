"""Where a comparison's runs work: in processes of this machine, or as jobs of a scheduler that TorchX knows."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torchrec_mdr.storage import exists, read_json, write_json

logger = logging.getLogger(__name__)

COMPONENT = "mdr.train"  # torchrec_mdr.launch.mdr, by the name under which TorchX finds it
_GRACE_SECONDS = 10.0  # for a process that was asked to end
_MOST_SILENT_POLLS = 20  # in a row, before a job counts as lost
# progress bars in a log: a line now and then
_QUIET = {"TQDM_MININTERVAL": "30"}


class Process(Protocol):
    """A run at work."""

    def ending(self) -> str | None:
        """How it ended: "" where all is well, `exit code 2` or the like where not; None while it is at work."""

    def end(self) -> None:
        """Asks it to end; does nothing where it has ended."""


class Launcher(Protocol):
    """Starts runs."""

    poll_seconds: float  # between two looks at what is under way
    scheduler: str | None  # None: this machine
    threads: int | None  # of each run; None: the scheduler decides

    def take_up(self, key: str, log: str) -> Process | None:
        """A run that an earlier call started and that is still at work; None where there is none."""

    def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
        """Starts `torchrec_mdr.train`.

        Args:
            key (str): names the run.
            arguments (Sequence[str]): of `torchrec_mdr.train`.
            log (str): a local file, where its output goes; what is there stays.
        """

    def close(self, under_way: Sequence[Process]) -> None:
        """Ends what is under way, and waits for it."""


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command of a run in one process."""
    return [sys.executable, "-m", "torchrec_mdr.train", *arguments]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class LocalProcesses:
    """Processes of this machine, by the standard library.

    TorchX's `local_cwd` would be a scheduler for them, too; but it puts every run into a session of its own, where it
    outlives a comparison that is killed with its process group, and writes on in a folder that the next call takes up.

    Args:
        parallel (int): how many there will be at a time; cores are shared out.
    """

    poll_seconds: float = 0.2

    def __init__(self, parallel: int) -> None:
        # what the environment says stays
        self.threads: int | None = int(os.environ.get("OMP_NUM_THREADS") or max(cores() // parallel, 1))
        self.scheduler: str | None = None

    def take_up(self, key: str, log: str) -> Process | None:
        """None: a process ends with the call that started it."""
        return None

    def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
        """See `Launcher.start`."""
        environment = {**_QUIET, **os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(log, "ab") as file:
            return _LocalProcess(
                command_of(arguments), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    def close(self, under_way: Sequence[Process]) -> None:
        """See `Launcher.close`."""
        for process in under_way:
            process.end()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in under_way:
            assert isinstance(process, _LocalProcess)
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _LocalProcess(subprocess.Popen[bytes]):
    def ending(self) -> str | None:
        code = self.poll()
        return None if code is None else f"exit code {code}" if code else ""

    def end(self) -> None:
        self.terminate()


class SchedulerJobs:
    """Jobs of a scheduler that TorchX knows, such as slurm or kubernetes, each by the component `mdr.train`.

    Jobs outlive the comparison that started them. A file keeps their handles, and a later call takes up those that are
    still at work.

    Args:
        scheduler (str): its name.
        scheduler_args (str): its options, as `torchx run --scheduler_args` takes them: `partition=p,time=60`.
        component_args (str): options of the component: `-j 1x2 --gpu 2`.
        notes (str): the file of handles.

    Raises:
        ValueError: the scheduler or an option is unknown or missing, or the scheduler cannot be reached from here.
    """

    poll_seconds: float = 5.0

    def __init__(self, scheduler: str, scheduler_args: str, component_args: str, notes: str) -> None:
        # here, since local runs have no use for them
        from torchx.runner import config, get_runner
        from torchx.specs.finder import get_component

        self.scheduler: str | None = scheduler
        self.threads: int | None = None
        self._notes = notes
        self._component_args = shlex.split(component_args)
        self._handles: dict[str, str] = read_json(notes) if exists(notes) else {}
        self._runner = get_runner()
        if scheduler not in self._runner.scheduler_backends():
            known = ", ".join(self._runner.scheduler_backends())
            raise ValueError(f"--scheduler '{scheduler}' is unknown to TorchX; choose one of {known}")
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            options = self._runner.scheduler_run_opts(scheduler)
            self._config = options.cfg_from_str(scheduler_args)
            config.apply(scheduler, self._config)  # .torchxconfig, as `torchx run` reads it
            options.resolve(self._config)
            self._component = get_component(COMPONENT).fn
        except Exception as error:  # each scheduler has its own kinds
            raise ValueError(f"--scheduler {scheduler} cannot be used: {error}") from error
        finally:
            for number, handler in before.items():  # TorchX's local scheduler sets its own
                signal.signal(number, handler)
        self.app([])

    def app(self, arguments: Sequence[str]) -> Any:
        """The run as TorchX describes it.

        Raises:
            ValueError: the component has no such options.
        """
        from torchx.specs.builders import materialize_appdef

        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                app = materialize_appdef(self._component, [*self._component_args, "--", *arguments])
        except SystemExit as error:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise ValueError(
                f"--component_args '{shlex.join(self._component_args)}' do not suit the component {COMPONENT}: "
                f"{reason}; `torchx run {COMPONENT} --help` lists its options"
            ) from error
        for role in app.roles:
            role.env = {**_QUIET, **role.env}
        return app

    def take_up(self, key: str, log: str) -> Process | None:
        """See `Launcher.take_up`."""
        handle = self._handles.get(key)
        if handle is None:
            return None
        try:
            status = self._runner.status(handle)
        except Exception as error:  # it may be at work, so no other one is started
            return _Ended(f"{self.scheduler} does not say what became of {handle}: {error}")
        return None if status is None or status.is_terminal() else _Job(self, self._runner, key, handle, log)

    def start(self, key: str, arguments: Sequence[str], log: str) -> Process:
        """See `Launcher.start`."""
        try:
            handle = self._runner.run(self.app(arguments), self.scheduler, self._config)
        except Exception as error:  # the others go on
            return _Ended(f"{self.scheduler} does not take the job: {error}")
        self._note(key, handle)
        return _Job(self, self._runner, key, handle, log)

    def forget(self, key: str) -> None:
        """Strikes a job that has ended off the file of handles."""
        self._note(key, None)

    def close(self, under_way: Sequence[Process]) -> None:
        """See `Launcher.close`; a scheduler ends a job when it gets to it."""
        for process in under_way:
            process.end()
        self._runner.close()

    def _note(self, key: str, handle: str | None) -> None:
        self._handles.pop(key, None)
        if handle is not None:
            self._handles[key] = handle
        write_json(self._notes, self._handles)


class _Ended:
    """A run that could not even be started."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def ending(self) -> str | None:
        return self._reason

    def end(self) -> None:
        pass


class _Job:
    """A job of a scheduler."""

    def __init__(self, jobs: SchedulerJobs, runner: Any, key: str, handle: str, log: str) -> None:
        self._jobs = jobs
        self._runner = runner
        self._key = key
        self._handle = handle
        self._log = log
        self._silent_polls = 0

    def ending(self) -> str | None:
        status, reason = None, "no such job"
        try:
            status = self._runner.status(self._handle)
        except Exception as error:
            reason = str(error)
        if status is None:  # a scheduler that is out of reach, or slow to list a job, ends no run
            self._silent_polls += 1
            if self._silent_polls < _MOST_SILENT_POLLS:
                logger.warning("%s: the scheduler does not say how it is: %s", self._key, reason)
                return None
            return f"{self._handle} out of the scheduler's sight ({reason})"
        self._silent_polls = 0
        if not status.is_terminal():
            return None
        self._keep_log()
        self._jobs.forget(self._key)
        return "" if status.state.name == "SUCCEEDED" else f"{self._handle} {status.state.name}"

    def end(self) -> None:
        try:
            self._runner.cancel(self._handle)
        except Exception as error:
            logger.warning("%s: the job %s could not be cancelled: %s", self._key, self._handle, error)

    def _keep_log(self) -> None:
        """Appends what the job's first node printed, where the scheduler keeps it."""
        try:
            lines = list(self._runner.log_lines(self._handle, self._runner.describe(self._handle).roles[0].name))
        except Exception as error:
            lines = [f"the scheduler's log of {self._handle} cannot be read here: {error}\n"]
        with open(self._log, "a", encoding="utf-8") as file:
            file.writelines(lines)
