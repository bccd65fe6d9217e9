"""Runs in stores: nothing local but the cache, killed, gone on with, and the same bits as on a disk."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import RankPool
from tests.storage.proxy import Proxy
from tests.storage.runs import DATA, RUN, SLOW, Ranks, forget_stores, same_run, train_here
from torchrec_mdr.data.owners import this_process
from torchrec_mdr.distributed import environment
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.prepare import prepare
from torchrec_mdr.report.combination import draw_combination
from torchrec_mdr.storage import files_below, is_whole, ls, read_bytes, read_json, remove, write_bytes, write_json
from torchrec_mdr.storage.handlers import FsspecHandler
from torchrec_mdr.train import main
from torchrec_mdr.training import run_lock
from torchrec_mdr.training.combination import Combination
from torchrec_mdr.training.curves import Curves
from torchrec_mdr.training.looks import Look, Looks
from torchrec_mdr.training.run_folder import check_files, write_results
from torchrec_mdr.training.run_lock import RunLock
from torchrec_mdr.verify import main as verify

STAGES = {
    "mlora": ("pretrain", "adapt"),
    "multilora": ("pretrain", "adapt_scenario", "adapt_segment", "fuse"),
    "moe_mlora": ("pretrain", "adapt", "gate"),
}


def whole_steps(folder: str) -> list[str]:
    return [name for name in ls(folder) if is_whole(f"{folder}/{name}")]


def stopping(monkeypatch: pytest.MonkeyPatch, look_number: int, act: Callable[[], object]) -> None:
    """Does something before a look at a run's losses."""
    look, seen = Looks.look, []

    def patched(looks: Looks, losses: list[Any]) -> Look:
        seen.append(1)
        if len(seen) == look_number:
            act()
        return look(looks, losses)

    monkeypatch.setattr(Looks, "look", patched)
    monkeypatch.setattr(Looks, "due", lambda looks, steps: steps >= 5)


def test_two_ranks_killed_while_they_adapt_come_to_the_same_bits(
    store: str, settings: dict[str, str], two_ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", f"{store}/run"
    prepare("synthetic", output=f"{store}/data", **DATA)
    command = [*RUN, *SLOW, f"--dataset={store}/data/", f"--output_dir={run}", "--resume=auto"]
    first = Ranks(command, tmp_path / "nodes", settings, slow_seconds=0.1)
    data = prepare("synthetic", output=str(tmp_path / "data"), **DATA)
    two_ranks.run(train_here, [*RUN, f"--dataset={data}", f"--output_dir={whole}"])
    first.until(lambda: len(whole_steps(f"{run}/checkpoints/adapt.progress")) > 1)
    first.kill()
    second = Ranks(command, tmp_path / "nodes", settings)
    assert second.end() == [0, 0], second.said()
    assert "adapt step 0:" not in second.said(), "it has begun the stage anew"
    same_run(str(whole), run, STAGES["mlora"])
    assert {name.split("/")[0] for name in files_below(run)} == {path.name for path in whole.iterdir()}
    assert not list((tmp_path / "nodes").rglob("*.distcp")), "nothing lies on the nodes"
    assert not (tmp_path / "nodes" / "s3:").exists()
    capsys.readouterr()
    assert verify([run]) == 0, capsys.readouterr().out


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Prepared data on the disk."""
    return prepare("synthetic", output=str(tmp_path / "data"), **DATA)


def test_a_store_that_fails_in_the_middle_ends_the_run_in_one_sentence(
    store: str,
    between: Proxy,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*RUN, f"--dataset={data}", "--stages.adapt.epochs=2", "--resume=auto"]
    assert main([*command, f"--output_dir={tmp_path / 'whole'}"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        stopping(patched, 6, lambda: setattr(between, "mode", "denied"))
        assert main([*command, f"--output_dir={store}/run"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and f"{store}/run/" in said[0] and "Traceback" not in said[0], said
    assert "access denied" in said[0]
    between.mode = None
    assert main([*command, f"--output_dir={store}/run"]) == 0
    same_run(str(tmp_path / "whole"), f"{store}/run", STAGES["mlora"])


def test_a_half_written_checkpoint_does_not_count(
    data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*RUN, f"--dataset={data}", "--resume=auto", "--stages.adapt.epochs=3"]
    run, progress = f"memory://{tmp_path.name}/run", f"memory://{tmp_path.name}/run/checkpoints/adapt.progress"
    assert main([*command, f"--output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patched:
        stopping(patched, 14, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main([*command, f"--output_dir={run}"])
    *_, before, newest = whole_steps(progress)
    remove(f"{progress}/{newest}/digests.json")
    (tensors,) = [f"{progress}/{newest}/{name}" for name in ls(f"{progress}/{newest}") if name.endswith(".distcp")]
    write_bytes(tensors, read_bytes(tensors)[:-5000])
    write_bytes(f"{progress}/{newest}/__1_dead_0.distcp", b"of a rank that was killed")
    assert verify([run]) == 0
    assert f"{newest} has no digests.json: it is half-written, and does not count" in capsys.readouterr().err
    assert main([*command, f"--output_dir={run}"]) == 0
    assert f"adapt step {int(before[-9:])}:" not in capsys.readouterr().out
    same_run(str(tmp_path / "whole"), run, STAGES["mlora"])
    assert [name for name in files_below(run) if "progress" in name or "dead" in name] == []


@pytest.mark.parametrize("name", ["digests.json", "stage.json", ".distcp"])
def test_a_store_that_is_down_is_no_damage(
    name: str, data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Going on from the checkpoint before would lose work."""
    run, progress = f"memory://{tmp_path.name}/run", f"memory://{tmp_path.name}/run/checkpoints/pretrain.progress"
    command = [*RUN, f"--dataset={data}", "--resume=auto", "--stages.pretrain.epochs=4", "--stage=pretrain"]
    with monkeypatch.context() as patched:
        stopping(patched, 13, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main([*command, f"--output_dir={run}"])
    *_, before, newest = whole_steps(progress)
    opened, read = FsspecHandler._open, FsspecHandler.read

    def fails(path: str) -> None:
        if f"{newest}/" in path and path.endswith(name):
            raise OSError(5, "the store fails")

    with monkeypatch.context() as patched:
        patched.setattr(
            FsspecHandler,
            "_open",
            lambda self, path, *rest, **more: (fails(path), opened(self, path, *rest, **more))[1],
        )
        patched.setattr(FsspecHandler, "read", lambda self, path: (fails(path), read(self, path))[1])
        capsys.readouterr()
        assert main([*command, f"--output_dir={run}"]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and newest in errors[0] and "cannot be read: the store fails" in errors[0], said.err
    assert whole_steps(progress)[-2:] == [before, newest]
    assert main([*command, f"--output_dir={run}"]) == 0


def _overwrites(self: FsspecHandler, path: str, content: bytes) -> bool:
    self.fs.pipe_file(path, content)
    return True


@pytest.mark.parametrize("create", [FsspecHandler.create, _overwrites])
@pytest.mark.parametrize("left", [False, True])
def test_of_two_that_take_a_lock_at_the_same_moment_one_goes_on(
    create: Callable[..., bool], left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FsspecHandler, "create", create)
    folder = f"memory://{tmp_path.name}/run"
    if left:  # by a process of this machine that is no more
        write_json(f"{folder}/run.lock", {**this_process(), "started": "0", "token": "dead", "time": time.time()})
    locks, start = [RunLock() for _ in range(4)], Barrier(4)

    def take(lock: RunLock) -> bool:
        start.wait()
        try:
            lock.take(folder, waits=False)
        except ValueError as error:
            assert "is under way" in str(error) or "is not this run's any more" in str(error)
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        took = list(pool.map(take, locks))
    assert sum(took) == 1
    locks[took.index(True)].check()
    for lock in locks:
        lock.release()
    assert ls(folder) == []


def test_a_lock_outlives_a_store_that_fails_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    folder, lock, asked = f"memory://{tmp_path.name}/run", RunLock(), []

    def failing(self: FsspecHandler, path: str) -> bytes:
        asked.append(path)
        raise OSError(5, "the store fails")

    lock.take(folder, waits=False)
    with monkeypatch.context() as patched:
        patched.setattr(FsspecHandler, "read", failing)
        with pytest.raises(ValueError, match="run.lock cannot be read: the store fails"):
            lock.check()
        while len(asked) < 4:
            time.sleep(0.02)
    lock.check()
    beat = read_json(f"{folder}/run.lock")["beat"]
    while read_json(f"{folder}/run.lock")["beat"] == beat:
        time.sleep(0.02)
    lock.release()


def test_curves_in_a_store_are_those_on_a_disk(tmp_path: Path) -> None:
    folder = f"memory://{tmp_path.name}/events"
    for first, end, close in ((0, 8, False), (5, 10, True)):  # the first is killed
        curves = Curves(folder, first)
        for step in range(max(first, 1), end):
            curves.add_scalar("loss", step, step)
        curves.flush()
        if close:
            curves.close()
    for number, name in enumerate(ls(folder)):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(read_bytes(f"{folder}/{name}"))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def _see(path: str) -> str:
    place = Environment(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(environment, "SEEN_SECONDS", 0.1)
        try:
            environment.check_seen(path if place.rank == 0 else f"{path}-of-another-disk", "--output_dir", place)
        except ValueError as error:
            return str(error)
    return ""


def test_nodes_that_share_no_disk_are_told_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    said = two_ranks.run(_see, str(tmp_path / "config.yaml"))
    assert said[0] == said[1] and said[0].startswith("rank 1 (on ")
    assert said[0].endswith("name a folder on a disk that all nodes share, or in an object store, by --output_dir")


def test_trials_that_were_killed_leave_nothing(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"memory://{tmp_path.name}/run"
    command = [*RUN, f"--dataset={data}", "--stages.adapt.epochs=1", "--tune=2", f"--output_dir={run}", "--resume=auto"]
    with monkeypatch.context() as patched:
        stopping(patched, 6, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert any(name.startswith("trial/") for name in files_below(run))
    assert main(command) == 0
    assert not [name for name in files_below(run) if name.startswith("trial/")]
    assert len(read_json(f"{run}/tuning.json")["trials"]) == 2


def test_a_table_of_very_many_domains_and_a_picture(tmp_path: Path) -> None:
    folder = f"memory://{tmp_path.name}/run"
    table = pa.table({"domain": ["a", "b"], "rows": [1, 2]})
    write_results(folder, {"method": "mlora"}, None, table)
    assert pq.read_table(io.BytesIO(read_bytes(f"{folder}/domains.parquet"))).equals(table)
    means = {"layer": np.full((2, 3), 1 / 3)}
    draw_combination(Combination(means, ("a", "b"), ("x", "y", "z")), "title", f"{folder}/combination.png")
    assert read_bytes(f"{folder}/combination.png").startswith(b"\x89PNG")
    check_files(folder)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", list(STAGES))
def test_nothing_is_lost_where_the_store_fails_now_and_then(
    method: str,
    store: str,
    settings: dict[str, str],
    between: Proxy,
    two_ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All requests go by a proxy that drops, cuts, delays and answers 503; both ranks are killed in the last stage."""
    data, whole, run = f"{store}/data", tmp_path / "whole", f"{store}/run"
    prepare("synthetic", output=data, **DATA)
    same = prepare("synthetic", output=str(tmp_path / "data"), **DATA)
    common = [*RUN, f"--method={method}", f"--seed={len(method)}"]
    two_ranks.run(train_here, [*common, f"--dataset={same}", f"--output_dir={whole}"])
    command = [*common, *SLOW, f"--dataset={data}/", f"--output_dir={run}", "--resume=auto"]
    faulty = {**settings, "AWS_ENDPOINT_URL": between.address}
    monkeypatch.setenv("AWS_ENDPOINT_URL", settings["AWS_ENDPOINT_URL"])  # this process looks past the proxy
    forget_stores()
    between.share = 0.1
    ranks = Ranks(command, tmp_path / "nodes", faulty, slow_seconds=0.1)
    ranks.until(lambda: whole_steps(f"{run}/checkpoints/{STAGES[method][-1]}.progress"))
    ranks.kill()
    ranks = Ranks(command, tmp_path / "nodes", faulty)
    assert ranks.end() == [0, 0], ranks.said()
    assert all(between.happened[fault] for fault in between.faults), between.happened
    same_run(str(whole), run, STAGES[method])
    assert verify([run]) == 0


@pytest.mark.full
def test_all_ranks_end_with_one_sentence_where_the_store_is_lost(
    store: str, settings: dict[str, str], between: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{store}/run"
    prepare("synthetic", output=f"{store}/data", **DATA)
    command = [*RUN, *SLOW, f"--dataset={store}/data/", f"--output_dir={run}", "--resume=auto"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", settings["AWS_ENDPOINT_URL"])
    forget_stores()
    ranks = Ranks(command, tmp_path / "nodes", {**settings, "AWS_ENDPOINT_URL": between.address}, slow_seconds=0.1)
    ranks.until(lambda: len(whole_steps(f"{run}/checkpoints/adapt.progress")) > 1)
    between.mode = "gone"
    assert ranks.end() == [2, 2], ranks.said()
    said = [line for line in ranks.said().splitlines() if line.startswith("error:")]
    assert len(said) == 1 and run in said[0] and "Traceback" not in ranks.said(), ranks.said()
    between.mode = None
    assert len(whole_steps(f"{run}/checkpoints/adapt.progress")) > 1, "the last whole checkpoint stays good"
    ranks = Ranks(command, tmp_path / "nodes", {**settings, "AWS_ENDPOINT_URL": between.address})
    assert ranks.end() == [0, 0] and "adapt step 0:" not in ranks.said(), ranks.said()
