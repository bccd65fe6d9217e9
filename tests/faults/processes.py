"""Runs of the command in processes of their own that start at once, and end at a chosen moment."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ports import held_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torchrec_mdr.train", "torchrec_mdr.training.looks"])
LIMIT_SECONDS = 180.0


@dataclass
class Ended:
    """How a run's processes ended.

    Args:
        codes (list[int | None]): exit codes by rank, negative for signals; None where one had to be killed at the end.
        said (list[str]): what each printed.
        seconds (float): until the last of them had ended.
    """

    codes: list[int | None]
    said: list[str]
    seconds: float


@dataclass(frozen=True)
class Blow:
    """What happens to a rank at one of its events: a look at the steps, or an operation on files.

    Args:
        rank (int): whose.
        event (int): from 1; 0 never comes.
        signal (int): what it sends itself.
        all_ranks (bool): whether the others are killed, too.
    """

    rank: int = 0
    event: int = 0
    signal: int = signal.SIGKILL
    all_ranks: bool = False


@dataclass
class Job:
    """A training of so many ranks.

    Args:
        arguments (Sequence[str]): of the command.
        folder (Path): for logs and the count of events.
        ranks (int): number of processes.
        environment (dict): further variables.
    """

    arguments: Sequence[str]
    folder: Path
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, blow: Blow | None = None) -> Ended:
        """Starts the processes and waits for all of them."""
        blow = blow or Blow()
        self.folder.mkdir(parents=True, exist_ok=True)
        with held_port() as port:
            return self._run(blow, port)

    def _run(self, blow: Blow, port: int) -> Ended:
        began = time.monotonic()
        processes = []
        for rank in range(self.ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **self.environment}
            own = blow if blow.rank == rank else Blow()
            log = self.folder / f"rank{rank}.log"
            given = ({name: str(value) for name, value in variables.items()}, list(self.arguments), own, str(log))
            processes.append(_CONTEXT.Process(target=_child, args=given))
        for process in processes:
            process.start()
        codes = _wait(processes, blow, began + LIMIT_SECONDS)
        logs = [(self.folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(self.ranks)]
        return Ended(codes, logs, time.monotonic() - began)

    @property
    def events(self) -> int:
        """Events of the first rank in the last run."""
        return int((self.folder / "rank0.log.events").read_text())


def _wait(processes: list[BaseProcess], blow: Blow, deadline: float) -> list[int | None]:
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        stopped = blow.event and blow.signal == signal.SIGSTOP
        if blow.event and blow.all_ranks and not processes[blow.rank].is_alive():
            break
        if stopped and all(not p.is_alive() for rank, p in enumerate(processes) if rank != blow.rank):
            break
    codes: list[int | None] = []
    for process in processes:
        codes.append(process.exitcode)
        if process.is_alive():
            process.kill()
        process.join()
    return codes


def _child(variables: dict[str, str], arguments: list[str], blow: Blow, log: str) -> None:
    os.environ.update(variables)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    from torchrec_mdr.train import main

    events = _count_events(blow)
    code = main(arguments)
    with open(f"{log}.events", "w") as counted:
        counted.write(str(events[0]))
    sys.stdout.flush()
    sys.exit(code)


def _count_events(blow: Blow) -> list[int]:
    """Has the blow come at its event."""
    from torchrec_mdr.training.looks import Looks

    events = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events[0] += 1
            if events[0] == blow.event:
                os.kill(os.getpid(), blow.signal)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (os, "makedirs"), (os, "fsync"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))
    Looks.look = counted(Looks.look)  # type: ignore[method-assign]
    return events


def some_events(number: int, most: int, seed: int) -> list[int]:
    """Events to be hit, drawn evenly."""
    return [random.Random(seed * 1000 + i).randint(1, max(most, 1)) for i in range(number)]
