"""Runs that a launcher starts, and what kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# small steps, many of them: half a minute on two ranks, with a checkpoint each second
RUN = [
    *("--method=mlora", "--dataset_options.rows=20000", "--dataset_options.num_domains=4", "--batch_size=256"),
    *("--backbone_options.hidden=[16,8]", "--backbone_options.dropout=0.2", "--checkpoint_seconds=1"),
    *("--stages.pretrain.epochs=20", "--stages.pretrain.patience=100", "--stages.pretrain.ema_decay=0.9"),
    *("--stages.adapt.epochs=20", "--stages.adapt.patience=100", "--stages.adapt.ema_decay=0.9"),
]
STAGES = ("pretrain", "adapt")
SLOW = [f"--stages.{stage}.hooks=[slow]" for stage in STAGES]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# slows training steps down, so that a run is long whatever the machine does beside: `--stages.adapt.hooks=[slow]`
HOOK = """
import os, time, torch
from torchrec_mdr.training.hooks import StageHook

class Slow(StageHook):
    def before(self, batch):
        if torch.is_grad_enabled():
            time.sleep(float(os.environ["SLOW_SECONDS"]))
"""
_LAUNCHERS = ("TORCHELASTIC_", "TORCHX_", "SLURM_", "SBATCH_", "PET_", "MDR_RESUME")


class Launched:
    """A command under way, from the project's root, with the environment's programs on PATH; its output in a file."""

    def __init__(self, command: Sequence[str], log: Path, cache: Path, slow_seconds: float = 0.0) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=clean_environment(cache, slow_seconds), stdout=output, stderr=output
            )

    def ends(self, seconds: float = 600.0) -> int:
        """Waits for its end; its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {seconds} s: {self.said()[-4000:]}") from None

    def until(self, true: Callable[[], object], seconds: float = 300.0) -> None:
        """Waits until something is true while the command runs."""
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, f"it has ended: {self.said()[-4000:]}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited {seconds} s in vain: {self.said()[-4000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it, and what it has started."""
        below = children(self.process.pid)
        for pid in (self.process.pid, *below):
            kill(pid)
        self.process.wait()

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


def clean_environment(cache: Path, slow_seconds: float = 0.0) -> dict[str, str]:
    """This process's, with the environment's programs on PATH, nothing of a launcher, and the hook `slow`."""
    package = slow_hook(cache.with_name(f"{cache.name}-hook"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "SLOW_SECONDS": str(slow_seconds)}
    return env | {"MDR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def slow_hook(package: Path) -> Path:
    """A folder for PYTHONPATH whose hook `slow` waits for $SLOW_SECONDS in each training step."""
    about = package / "slow_hook-1.dist-info"
    if not about.is_dir():
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: slow_hook\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[torchrec_mdr.hooks]\nslow = slow_hook:Slow\n")
        (package / "slow_hook.py").write_text(HOOK)
    return package


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Sends a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def children(pid: int) -> list[int]:
    """All processes below one."""
    found, new = [], [pid]
    parents = {int(path.name): parent_of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def parent_of(pid: int) -> int:
    """The process that started one; 0 where that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def ranks_of(folder: Path) -> dict[int, int]:
    """The training processes of a run, by rank."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            command = _words(path / "cmdline") if path.name.isdecimal() else []
            if f"--output_dir={folder}" in command and command[2:4] == ["-m", "torchrec_mdr.train"]:
                rank = [word for word in _words(path / "environ") if word.startswith("RANK=")]
                found[int(rank[0].removeprefix("RANK="))] = int(path.name)
        except (OSError, IndexError):  # it has ended, or has not begun
            continue
    return found


def _words(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split("\0")


def kill_a_rank(launched: Launched, folder: Path, stage: str, rank: int, newer_than: int = 0) -> int:
    """Waits until a stage under way has a checkpoint, and kills a rank with signal 9; the step it was at, about."""
    launched.until(lambda: (newest_step(folder, stage) or 0) > newer_than and rank in ranks_of(folder))
    step = newest_step(folder, stage)
    kill(ranks_of(folder)[rank])
    assert step is not None and not (folder / "metrics.json").exists(), "killed too late to test anything"
    return step


def newest_step(folder: Path, stage: str) -> int | None:
    """The step of the newest checkpoint of a stage under way."""
    names = [path.name for path in (folder / "checkpoints" / f"{stage}.progress").glob("step-*")]
    return max((int(name.split("-")[2]) for name in names if "." not in name), default=None)
