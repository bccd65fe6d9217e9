"""Runs that are stopped and go on: by the same command line, to the same bits, and never with other options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_train import LEAVE_ONE_OUT, SMALL, metrics, same_result
from torchrec_mdr.distributed import checkpoint, checkpoint_writer
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.train import main
from torchrec_mdr.training import run_lock
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.looks import Look, Looks
from torchrec_mdr.training.preemption import stop_signals
from torchrec_mdr.training.random_states import take_up_random_states
from torchrec_mdr.training.resuming import resume_mode, run_path
from torchrec_mdr.training.run_lock import LOCK_FILE, RunLock
from torchrec_mdr.training.trainer import Trainer

NOISY = [*SMALL, "--backbone_options.dropout=0.2", "--backbone_options.batch_norm=true"]
NOISY += ["--stages.pretrain.ema_decay=0.9", "--stages.adapt.ema_decay=0.9", *LEAVE_ONE_OUT]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class StopsAt:
    """Has a signal come before every so many looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
        self.every, self.seen = every, 0
        self.look, self.due = Looks.look, Looks.due
        monkeypatch.setattr(Looks, "look", lambda looks, losses: self(looks, losses))
        monkeypatch.setattr(Looks, "due", lambda looks, steps: steps >= 3 or self.due(looks, steps))

    def __call__(self, looks: Looks, losses: list[Any]) -> Look:
        self.seen += 1
        if self.seen % self.every == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.look(looks, losses)


@pytest.mark.parametrize("method", ["mlora", pytest.param("moe_mlora", marks=pytest.mark.full)])
def test_stopped_again_and_again_it_comes_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*NOISY, f"--method={method}", *(["--method_options.experts_per_domain=2"] if method == "moe_mlora" else [])]
    assert main([*run, f"--output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patched:
        StopsAt(patched, every=9)
        codes, command = [75], [*run, f"--output_dir={tmp_path / 'broken'}", "--resume=auto"]
        while codes[-1] == 75 and len(codes) < 60:
            codes.append(main(command))
    assert codes[-1] == 0 and len(codes) > 5, codes
    said = capsys.readouterr().err
    assert "stopped by SIGUSR1 after step" in said and "of stage 'pretrain', which is saved" in said
    same_result(tmp_path / "whole", tmp_path / "broken", ("pretrain", "adapt"))
    assert main(command) == 0, "a finished run says so"
    assert f"the run in {tmp_path / 'broken'} is finished" in capsys.readouterr().out


def test_a_signal_during_a_stages_last_evaluation_ends_with_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        finish = Trainer._finish_stage

        def signalled(*arguments: Any) -> None:
            with stop_signals.saving():
                os.kill(os.getpid(), signal.SIGTERM)
            finish(*arguments)

        patched.setattr(Trainer, "_finish_stage", signalled)
        assert main([*SMALL, f"--output_dir={tmp_path}", "--resume=auto"]) == 75
    assert "stopped by SIGTERM after stage 'pretrain', which is finished" in capsys.readouterr().err
    assert main([*SMALL, f"--output_dir={tmp_path}", "--resume=auto"]) == 0


def test_checkpoints_by_time_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*NOISY, f"--output_dir={tmp_path / 'whole'}"]) == 0
    command = [*NOISY, f"--output_dir={tmp_path / 'broken'}", "--resume=auto", "--checkpoint_seconds=0.001"]
    look, seen = Looks.look, []

    def interrupted(looks: Looks, losses: list[Any]) -> Look:
        if len(seen) == 5:
            raise KeyboardInterrupt  # with a checkpoint under way
        seen.append(1)
        return look(looks, losses)

    with monkeypatch.context() as patched:
        patched.setattr(Looks, "look", interrupted)
        patched.setattr(Looks, "due", lambda looks, steps: steps >= 3)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    saved = sorted(path.name for path in (tmp_path / "broken/checkpoints/pretrain.progress").iterdir())
    assert [name for name in saved if "writing" not in name][-1] in ("step-0-000000012", "step-0-000000015"), saved
    assert main(command) == 0
    same_result(tmp_path / "whole", tmp_path / "broken", ("pretrain", "adapt"))


def test_from_a_damaged_checkpoint_it_goes_on_with_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = [*SMALL, f"--output_dir={tmp_path / 'broken'}", "--resume=auto"]
    with monkeypatch.context() as patched:
        StopsAt(patched, every=12)
        assert main(command) == 75
    *_, newest = sorted((tmp_path / "broken/checkpoints/pretrain.progress").iterdir())
    (data,) = newest.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert main(command) == 0
    assert f"{data} is damaged" in caplog.text and "going on from the one before" in caplog.text
    assert main([*SMALL, f"--output_dir={tmp_path / 'whole'}"]) == 0
    same_result(tmp_path / "whole", tmp_path / "broken", ("pretrain", "adapt"))


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("seed", 0, 1),
        ("batch_size", 256, 512),
        ("stages.adapt.learning_rate", 0.001, 0.01),
        ("stages.pretrain.ema_decay", 0.0, 0.5),
        ("method", "mlora", "mix"),
        ("embeddings.optimizer", "auto", "sgd"),
        ("dataset_options.seed", 0, 3),
    ],
)
def test_other_options_are_refused_by_name(
    option: str, before: object, after: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*SMALL, f"--output_dir={folder}", "--stage=pretrain"]) == 0
    assert main([*SMALL, f"--output_dir={folder}", f"--{option}={after}", "--resume=auto"]) == 2
    said = capsys.readouterr().err
    if option != "dataset_options.seed" or "--dataset_options.seed" in said:
        assert f"was begun with --{option} {before}" in said and f"go on with {after}" in said


def test_more_epochs_may_be_asked_for(tmp_path: Path) -> None:
    assert main([*SMALL, f"--output_dir={tmp_path}", "--stage=pretrain"]) == 0
    more = ["--stages.adapt.epochs=1", "--stages.adapt.patience=7", "--hang_seconds=50", "--resume=auto"]
    assert main([*SMALL, f"--output_dir={tmp_path}", *more]) == 0
    assert metrics(tmp_path)["stages"][1]["epochs"] == 1


def test_auto_begins_in_an_empty_folder_and_refuses_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*SMALL, f"--output_dir={tmp_path}", "--resume", "auto"]) == 2
    assert "holds something, but no run to go on with" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_run_that_has_hardly_begun_begins_again(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, replace, seen = [*SMALL, "--stage=pretrain", f"--output_dir={tmp_path}", "--resume=auto"], os.replace, []

    def interrupted(source: str, target: str) -> None:
        seen.append(target)
        if len(seen) == moment:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        patched.setattr(Trainer, "run", lambda trainer: None)
        try:
            main(command)
        except KeyboardInterrupt:
            assert len(seen) == moment
    monkeypatch.setattr(Trainer, "run", lambda trainer: None)
    assert main(command) == 0 and (tmp_path / "digests.json").exists()


def test_restarting_launchers_make_auto_the_default_and_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCHELASTIC_MAX_RESTARTS", "MDR_RESUME", "SLURM_RESTART_COUNT", "SLURM_JOB_ID")
    for name in (*names, "TORCHELASTIC_RUN_ID", "TORCHX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert resume_mode(RunConfig()) is False
    assert run_path(RunConfig()) != run_path(RunConfig()).replace(str(os.getpid()), "")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert resume_mode(RunConfig()) == "auto" and resume_mode(RunConfig(resume=False)) is False
    assert run_path(RunConfig()) == run_path(RunConfig()) == f"runs/mlora-mlp-synthetic-agent-{os.getppid()}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert run_path(RunConfig()).endswith("-job-7")
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://torchx/train-abc")
    assert run_path(RunConfig()).endswith("-train-abc")
    assert run_path(RunConfig(output_dir="a")) == "a"


def held_by_another(folder: Path, age: float = 0.0, **other: object) -> None:
    content = {"host": "elsewhere", "space": "other", "pid": 7, "token": "t", "beat": "t/1", "time": time.time() - age}
    (folder / LOCK_FILE).write_text(json.dumps({**content, **other}))


def test_a_lock_that_is_renewed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_by_another(tmp_path)
    with pytest.raises(ValueError, match="is under way: process 7 on elsewhere holds its lock"):
        RunLock().take(str(tmp_path), waits=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: held_by_another(tmp_path, beat="t/2"))
    with pytest.raises(ValueError, match="is under way"):
        RunLock().take(str(tmp_path), waits=True)


def test_a_lock_that_has_run_out_is_taken_and_its_holder_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)
    first, second = RunLock(), RunLock()
    first.take(str(tmp_path), waits=False)
    first.check()
    held = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps({**held, "time": held["time"] - 100}))
    second.take(str(tmp_path), waits=False)
    second.check()
    with pytest.raises(ValueError, match="is not this run's any more: process"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_auto_waits_for_a_lock_to_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.5)
    held_by_another(tmp_path, age=-3600.0)  # by a clock that is ahead: what counts is that nobody renews it
    lock, began = RunLock(), time.monotonic()
    lock.take(str(tmp_path), waits=True)
    assert time.monotonic() - began > 1.0
    lock.release()


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom torchrec_mdr.training.run_lock import RunLock\n"
        f"RunLock().take({str(tmp_path)!r}, waits=False)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    lock = RunLock()
    lock.take(str(tmp_path), waits=False)
    lock.release()


def test_who_lost_the_lock_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = Looks.look

    def taken(looks: Looks, losses: list[Any]) -> Look:
        held_by_another(tmp_path)
        return look(looks, losses)

    monkeypatch.setattr(Looks, "look", taken)
    assert main([*SMALL, f"--output_dir={tmp_path}"]) == 2
    assert "is not this run's any more: process 7 on elsewhere has taken it" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("*/step*")) and not (tmp_path / "metrics.json").exists()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 7


def test_a_signal_outside_of_training_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchrec_mdr.training.experiment import Experiment

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Experiment, "from_options", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*SMALL, f"--output_dir={tmp_path / 'run'}"]) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert stop_signals.received is None and signal.getsignal(signal.SIGTERM) == before


def test_each_rank_takes_up_its_own_random_states() -> None:
    first, second = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    with torch.random.fork_rng():
        take_up_random_states({"cpu": torch.stack([first, second])}, Environment(1, 2, torch.device("cpu")))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(2)))


def test_what_does_not_fit_into_memory_twice_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "free_memory", lambda: 100)
    monkeypatch.setattr(checkpoint, "save_async", None)
    assert main([*SMALL, f"--output_dir={tmp_path}"]) == 0
