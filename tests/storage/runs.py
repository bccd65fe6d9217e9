"""Runs of several ranks whose nodes share nothing but a store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from tests.faults.launching import slow_hook
from tests.ports import held_port
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.storage import path_manager, paths, read_json
from torchrec_mdr.train import run
from torchrec_mdr.training.command import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]
DATA = {"rows": 6000, "num_domains": 4}  # of the synthetic data set
EPOCHS = {"pretrain": 1, "adapt": 5, "fuse": 2, "gate": 2}
# a validation and a checkpoint an epoch
RUN = [
    *("--batch_size=256", "--embeddings.dim=8", "--backbone_options.hidden=[16,8]", "--backbone_options.dropout=0.2"),
    *(f"--stages.{stage}.{option}=0" for stage in EPOCHS for option in ("patience_rows", "validation_rows")),
    *(f"--stages.{stage}.epochs={epochs}" for stage, epochs in EPOCHS.items()),
    *("--stages.adapt.ema_rows=0", "--stages.adapt.ema_decay=0.9", "--stages.adapt.patience=100"),
]
# of a run that is to be stopped, by :class:`Ranks` that are slow: it is long whatever the machine does beside
SLOW = [f"--stages.{stage}.hooks=[slow]" for stage in EPOCHS if stage != "pretrain"]


class Ranks:
    """The processes of one run, each with a node's cache of its own.

    Args:
        arguments (Sequence[str]): of the command.
        folder (Path): for caches and logs.
        settings (Mapping[str, str]): for the environment, where the store is.
        count (int): ranks.
        slow_seconds (float): what a step of a stage with the hook `slow` takes longer.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        settings: Mapping[str, str],
        count: int = 2,
        slow_seconds: float = 0.0,
    ) -> None:
        self._held = ExitStack()
        port = self._held.enter_context(held_port())
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
            caches = {name: str(folder / f"node{rank}" / name) for name in ("MDR_STORE_CACHE", "MDR_CACHE", "HOME")}
            env = {**os.environ, **{name: str(value) for name, value in place.items()}, **caches, **settings}
            env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "SLOW_SECONDS": str(slow_seconds)}
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(slow_hook(folder / "hook"))])
            (folder / f"node{rank}" / "HOME").mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                command = [sys.executable, "-m", "torchrec_mdr.train", *arguments]
                self.processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output))

    def end(self, seconds: float = 600.0) -> list[int]:
        """Waits for their ends; their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {seconds} s: {self.said()[-4000:]}") from None
        finally:
            self.kill()

    def until(self, true: Callable[[], object], seconds: float = 600.0) -> None:
        """Waits until something is true while they run."""
        deadline = time.monotonic() + seconds
        try:
            while not true():
                running = all(process.poll() is None for process in self.processes)
                assert running and time.monotonic() < deadline, f"in vain: {self.said()[-4000:]}"
                time.sleep(0.05)
        except BaseException:  # the limit on a test's time, too
            self.kill()
            raise

    def kill(self) -> None:
        """Ends them at once."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._held.close()

    def said(self) -> str:
        """What they have printed so far, rank 0 last."""
        return "\n".join(log.read_text(errors="replace") for log in reversed(self.logs))


def forget_stores() -> None:
    """Lets the next use of a store look into the environment again."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    for handler in paths._handlers.values():
        path_manager._path_handlers.pop(f"{handler.scheme}://", None)
    paths._handlers.clear()


def same_run(one: str, other: str, stages: Sequence[str]) -> None:
    """Asserts that two runs come to the same figures and, bitwise, to the same tensors."""
    first, second = (read_json(f"{run}/metrics.json") for run in (one, other))
    assert first["test"] == second["test"] and first["test_backbone"] == second["test_backbone"]
    assert [entry["validation"] for entry in first["stages"]] == [entry["validation"] for entry in second["stages"]]
    for stage in stages:
        tensors, others = (
            checkpoint.load_new(f"{run}/checkpoints/{stage}", "", torch.device("cpu")) for run in (one, other)
        )
        assert tensors.keys() == others.keys() and len(tensors) > 5
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def train_here(arguments: Sequence[str]) -> None:
    """A run by the processes of a :class:`tests.ranks.RankPool`, which are up already."""
    place = Environment(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with quiet_libraries():
        run(arguments, place)
