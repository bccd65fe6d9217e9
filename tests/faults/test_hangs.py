"""Ranks that hang or are gone are named in time, and a disk that is full: `make test-faults`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.processes import Blow, Job
from tests.test_train import SMALL
from torchrec_mdr.train import main

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
LONG = [*SMALL, "--stages.pretrain.epochs=6", "--hang_seconds=6", "--resume=auto"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_in_time(rank: int, tmp_path: Path) -> None:
    job = Job([*LONG, f"--output_dir={tmp_path / 'run'}"], tmp_path, 2, {"MDR_CACHE": str(tmp_path / "cache")})
    assert job.run().codes == [0, 0]
    job = Job([*LONG, f"--output_dir={tmp_path / 'broken'}"], tmp_path, 2, {"MDR_CACHE": str(tmp_path / "cache")})
    ended = job.run(Blow(rank, event=job.events // 2 if rank == 0 else 12, signal=signal.SIGSTOP))
    assert ended.codes[1 - rank] == 75 and ended.codes[rank] is None, ended.said
    sentences = [line for line in ended.said[1 - rank].splitlines() if "error: " in line]
    assert (
        len(sentences) == 1
        and f"rank {rank} (" in sentences[0]
        and re.search(r"not (been heard of|answered) for 6 seconds", sentences[0])
    )
    assert "Traceback" not in ended.said[1 - rank] and ended.seconds < 60
    print(f"\nrank {rank} stopped: named by the other, which ended; {sentences[0].strip()[-200:]}")
    assert job.run().codes == [0, 0], "the same command goes on"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_named_and_room_mends_it(ranks: int, small_disk: Path, tmp_path: Path) -> None:
    environment = {"MDR_CACHE": str(tmp_path / "cache")}
    wide = ["--backbone_options.hidden=[64,64]", f"--output_dir={small_disk / 'run'}"]
    job = Job([*LONG, *wide, "--checkpoint_seconds=0.1"], tmp_path, ranks, environment)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(700_000))
    ended = job.run()
    assert set(ended.codes) <= {2, 75} and 2 in ended.codes, (ended.codes, ended.said)
    sentences = [line for line in "\n".join(ended.said).splitlines() if line.startswith("error: ")]
    assert any(str(small_disk) in line and "No space left" in line for line in sentences), sentences
    assert "Traceback" not in "".join(ended.said)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert job.run().codes == [0] * ranks
    print(f"\na full disk, {ranks} ranks: {sentences[0][:200]}")


def values_of(option: str, value: object) -> list[str]:
    """What such an option cannot be."""
    if isinstance(value, bool):
        return ["perhaps", "2"]
    if isinstance(value, int | float):
        return ["many", "-1", "[1"]
    return ["{broken"] if isinstance(value, list) else []


def test_bad_values_of_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from torchrec_mdr.training.options import parse
    from torchrec_mdr.training.resuming import _flat

    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    common = ["--method=moe_mlora", "--dataset_options.rows=900"]
    count, late = 0, []
    for name, default in _flat(yaml.safe_load(parse(common).resolved)):
        for value in values_of(name, default):
            code = main([*common, f"--{name}={value}", f"--output_dir={tmp_path / 'run'}"])
            said = capfd.readouterr().err
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(errors) == 1 and "Traceback" not in said, (name, value, code, said[-800:])
            assert name.rpartition(".")[2] in errors[0], (name, value, errors)
            if os.path.exists(tmp_path / "run"):
                late.append((name, value))
                shutil.rmtree(tmp_path / "run")
            count += 1
    print(f"\n{count} bad values of options: each ended in one sentence that names the option")
    assert count >= 100 and not late, late
