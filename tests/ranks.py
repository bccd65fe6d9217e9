"""Worker processes, joined by gloo, that stay up for the whole test session: a distributed test costs no start."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from tests.ports import held_port

# how long the others may take once one rank has failed: they may be waiting for it in a collective
GRACE_SECONDS = 5.0


class RemoteTraceback(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RankPool:
    """Runs a function on every rank of a gloo process group.

    The processes start with the first `run`, and anew after a run that left them in an unknown state.

    Args:
        world_size (int): number of processes.
        timeout (float): seconds that one run may take, and that a collective waits.
    """

    def __init__(self, world_size: int, timeout: float = 600.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._held = ExitStack()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Calls function(*args, **kwargs) on every rank, inside the process group and after torch.manual_seed(0).

        Args:
            function (Callable): module-level, since it goes to the workers by name.
            *args: picklable.
            **kwargs: picklable.

        Returns:
            list: what each rank returned.

        Raises:
            Exception: the error of the lowest rank that failed, with its traceback as the cause.
            TimeoutError: a rank did not answer in time.
        """
        if not self._workers:
            self._start()
        job = pickle.dumps((function, args, kwargs))
        for _, pipe in self._workers:
            pipe.send_bytes(job)
        answers = self._collect()
        for answer in answers:
            if answer.error is not None:
                raise answer.error from RemoteTraceback(answer.trace)
        return [answer.value for answer in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        self._held.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="gloo_")
        port = self._held.enter_context(held_port())
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, store, port, self.timeout), daemon=False
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self) -> list[_Answer]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank, (process, pipe) in enumerate(self._workers):
                if rank not in answers and pipe.poll(0.01):
                    answers[rank] = _receive(rank, process, pipe)
                    if answers[rank].error is not None:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failed = [rank for rank, answer in answers.items() if answer.error is not None]
        silent = sorted(set(range(self.world_size)) - set(answers))
        if silent or 0 < len(failed) < self.world_size or not all(process.is_alive() for process, _ in self._workers):
            # collectives may be pending: this group is of no further use
            self.close()
        if silent and not failed:
            raise TimeoutError(f"no answer from rank {silent} within {self.timeout} s")
        return [answers[rank] for rank in sorted(answers)]


@dataclass
class _Answer:
    value: Any = None
    error: Exception | None = None
    trace: str = ""


def _receive(rank: int, process: BaseProcess, pipe: Connection) -> _Answer:
    try:
        answer: _Answer = pickle.loads(pipe.recv_bytes())
        return answer
    except (EOFError, ConnectionError):
        process.join()
        return _Answer(error=RuntimeError(f"rank {rank} died with exit code {process.exitcode}"))


def _serve(pipe: Connection, rank: int, world_size: int, store: str, port: int, timeout: float) -> None:
    # what torchrun would set; the group itself meets in a file
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            function, args, kwargs = pickle.loads(job)
            answer = pickle.dumps(_Answer(function(*args, **kwargs)))
        except Exception as error:
            answer = _pickled_error(error)
        pipe.send_bytes(answer)


def _pickled_error(error: Exception) -> bytes:
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps(_Answer(error=error, trace=trace))
        pickle.loads(answer)  # some errors pickle but cannot be rebuilt
    except Exception:
        answer = pickle.dumps(_Answer(error=RuntimeError(f"{type(error).__name__}: {error}"), trace=trace))
    return answer
