"""The same command line, started again by torchrun or TorchX, goes on to the uninterrupted run's bits."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.launching import (
    RUN,
    SLOW,
    STAGES,
    TORCHRUN,
    Launched,
    kill,
    kill_a_rank,
    newest_step,
    ranks_of,
)
from tests.ports import held_port
from tests.test_train import metrics, same_result, tensors
from torchrec_mdr.train import main

pytestmark = pytest.mark.timeout(1800)
SHORT = [option.replace("epochs=20", "epochs=3").replace("seconds=1", "seconds=0.2") for option in RUN]

PLAIN = [
    *(option for option in RUN if "dropout" not in option),
    *SLOW,
]  # dropout's masks are other ones on another number of ranks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of all these runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Launched(train(2, folder / "run"), folder / "log", cache)
    assert run.ends() == 0, run.said()
    return folder / "run"


def train(ranks: int, folder: Path, *launcher: str, run: Sequence[str] = RUN) -> list[str]:
    """The command line of a run on one machine."""
    options = ["--standalone", f"--nproc-per-node={ranks}", *launcher]
    return [*TORCHRUN, *options, "-m", "torchrec_mdr.train", *run, f"--output_dir={folder}"]


def test_torchrun_starts_a_killed_run_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form, which make test runs; its steps are slow, so that it is killed in time."""
    command = [*TORCHRUN, "--standalone", "--max-restarts=1", "-m", "torchrec_mdr.train", *SHORT, *SLOW]
    run = Launched([*command, f"--output_dir={tmp_path / 'killed'}"], tmp_path / "log", cache, slow_seconds=0.02)
    kill_a_rank(run, tmp_path / "killed", "pretrain", 0)
    monkeypatch.setenv("MDR_CACHE", str(cache))
    assert main([*SHORT, f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert run.ends() == 0, run.said()
    same_result(tmp_path / "whole", tmp_path / "killed", STAGES)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["torchrun", "torchx"])
def test_a_worker_is_killed_twice(launcher: str, whole: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "run"
    command = train(2, folder, "--max-restarts=3")
    if launcher == "torchx":
        command = ["torchx", "run", "-s", "local_cwd", "torchx_components/mdr.py:train", "-j", "1x2"]
        command += ["--max_retries", "2", "--", *RUN, f"--output_dir={folder}"]
    run = Launched(command, tmp_path / "log", cache)
    kill_a_rank(run, folder, "pretrain", 1, newer_than=200)
    kill_a_rank(run, folder, "adapt", 0, newer_than=200)
    assert run.ends() == 0, run.said()
    same_result(whole, folder, STAGES)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_that_is_told_to_stop_has_its_run_saved(
    number: signal.Signals, whole: Path, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "run"
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command = [*train(2, folder, "--max-restarts=3", signals), "--checkpoint_seconds=1000"]
    run = Launched(command, tmp_path / "log", cache)
    run.until(lambda: newest_step(folder, "adapt"))
    before = newest_step(folder, "adapt")
    kill(run.process.pid, number)
    assert run.ends(60) != 0
    after = newest_step(folder, "adapt")
    assert f"stopped by {number.name}" in run.said() and f"after step {after}" in run.said()
    assert before is not None and after is not None and after >= before and not ranks_of(folder)
    run = Launched(command, tmp_path / "log", cache)
    assert run.ends() == 0, run.said()
    same_result(whole, folder, STAGES)


def agent(nodes: str, port: int, folder: Path, ranks: int, run: Sequence[str] = RUN) -> list[str]:
    """One torchrun of several that meet at a port; the first of them holds the meeting."""
    options = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", "--max-restarts=3", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=here", "--rdzv-conf=last_call_timeout=5"]
    elastic = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if ":" in nodes else []
    return [*elastic, *TORCHRUN, *options, "-m", "torchrec_mdr.train", *run, f"--output_dir={folder}"]


@pytest.fixture
def port() -> Iterator[int]:
    """Where agents meet."""
    with held_port() as held:
        yield held


def nearly_the_same(one: Path, other: Path) -> None:
    """Asserts that two runs differ by rounding."""
    first, second = metrics(one), metrics(other)
    assert first["test"]["auc"] == pytest.approx(second["test"]["auc"], abs=2e-4)
    assert first["test"]["logloss"] == pytest.approx(second["test"]["logloss"], abs=2e-4)
    for stage in STAGES:
        ours, theirs = tensors(one / "checkpoints" / stage), tensors(other / "checkpoints" / stage)
        assert ours.keys() == theirs.keys()
        worst = max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items() if tensor.numel())
        print(f"{stage}: largest difference {worst:.2g}")
        assert worst < 1e-3


@pytest.mark.faults
def test_two_agents_with_two_ranks_are_one_with_four(tmp_path: Path, cache: Path, port: int) -> None:
    one = Launched(train(4, tmp_path / "one", run=SHORT), tmp_path / "log", cache)
    assert one.ends() == 0, one.said()
    agents = [Launched(agent("2", port, tmp_path / "two", 2, SHORT), tmp_path / name, cache) for name in ("a", "b")]
    assert [started.ends() for started in agents] == [0, 0], agents[0].said() + agents[1].said()
    assert metrics(tmp_path / "one")["world_size"] == metrics(tmp_path / "two")["world_size"] == 4
    same_result(tmp_path / "one", tmp_path / "two", STAGES)


@pytest.mark.faults
def test_an_agent_is_lost_and_the_other_goes_on_until_a_new_one_comes(tmp_path: Path, cache: Path, port: int) -> None:
    whole = Launched(train(2, tmp_path / "whole", run=PLAIN), tmp_path / "log", cache)
    assert whole.ends() == 0, whole.said()
    folder = tmp_path / "run"
    stays = Launched(agent("1:2", port, folder, 1, PLAIN), tmp_path / "stays", cache, slow_seconds=0.05)
    stays.until(lambda: _listens(port))
    goes = Launched(agent("1:2", port, folder, 1, PLAIN), tmp_path / "goes", cache, slow_seconds=0.05)
    goes.until(lambda: len(ranks_of(folder)) == 2 and (newest_step(folder, "pretrain") or 0) > 200)
    goes.kill()
    at = newest_step(folder, "pretrain") or 0
    stays.until(lambda: len(ranks_of(folder)) == 1 and (newest_step(folder, "pretrain") or 10**9) > at + 100)
    comes = Launched(agent("1:2", port, folder, 1, PLAIN), tmp_path / "comes", cache, slow_seconds=0.05)
    comes.until(lambda: len(ranks_of(folder)) == 2 and newest_step(folder, "adapt"))
    assert (stays.ends(), comes.ends()) == (0, 0), stays.said() + comes.said()
    assert metrics(folder)["world_size"] == 2
    nearly_the_same(tmp_path / "whole", folder)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
