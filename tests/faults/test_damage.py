"""Damaged files end in one sentence that names them, whoever reads them: `make test-faults`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_train import SMALL, tensors
from torchrec_mdr.export import main as export
from torchrec_mdr.train import main
from torchrec_mdr.training.looks import Look, Looks
from torchrec_mdr.verify import main as verify

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
QUICK = [*SMALL, "--stages.pretrain.epochs=1", "--stages.adapt.epochs=1", "--keep_checkpoints=1"]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit": flip,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"x",
    "gone": lambda content: None,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A finished run, and one that was stopped in its second stage."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MDR_CACHE", str(folder / "cache"))
        assert main([*QUICK, f"--output_dir={folder / 'whole'}"]) == 0
        look = Looks.look
        looks: list[int] = []

        def stopping(self: Looks, losses: list[object]) -> Look:
            looks.append(1)
            if len(looks) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return look(self, losses)  # type: ignore[arg-type]

        patched.setattr(Looks, "look", stopping)
        patched.setattr(Looks, "due", lambda self, steps: steps >= 4)
        assert main([*QUICK, f"--output_dir={folder / 'stopped'}"]) == 75
        patched.setattr(Looks, "look", look)
        yield folder / "whole", folder / "stopped"


def sentence(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, (code, said[-2000:])
    return errors[0]


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (tensors(run / "checkpoints/adapt") for run in (one, other))
    return all(tensor.equal(second[name]) for name, tensor in first.items())


def damaged(run: Path, path: Path, change: Callable[[bytes], bytes | None], copy: Path) -> Path:
    """A copy of a run with one file changed or gone; which file."""
    shutil.copytree(run, copy)
    file = copy / path.relative_to(run)
    changed = change(file.read_bytes())
    file.unlink() if changed is None else file.write_bytes(changed)
    return file


def test_every_file_damaged_in_every_way(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = runs
    count = 0
    for name, change in DAMAGE.items():
        for path in sorted(p for p in stopped.rglob("*") if p.is_file() and "events" not in p.parts):
            if path.name == "run.lock" or (change(path.read_bytes()) is None and path.name == "digests.json"):
                continue  # without digests a folder is one of an older version
            broken = tmp_path / f"run{count}"
            file = damaged(stopped, path, change, broken)
            capsys.readouterr()
            if file.name == "config.yaml" and not file.exists():
                said = sentence(main([*QUICK, f"--output_dir={broken}", "--resume=auto"]), capsys)
                assert str(broken) in said
            elif "pretrain" in file.parts:  # what a stage starts from, taken by another run
                start = f"--init_checkpoint={broken / 'checkpoints/pretrain'}"
                said = sentence(main([*QUICK, f"--output_dir={tmp_path / f'new{count}'}", start]), capsys)
                assert file.name in said or str(file.parent) in said, (name, said)
            else:
                assert verify([str(broken)]) == 1 and str(file) in capsys.readouterr().out, (name, file)
                code = main([*QUICK, f"--output_dir={broken}", "--resume=auto"])
                if code == 0 and "adapt.progress" in file.parts:  # it went on from the checkpoint before
                    assert same_tensors(whole, broken), (name, file)
                else:
                    said = sentence(code, capsys)
                    assert file.name in said or str(file.parent) in said, (name, said)
            count += 1
            shutil.rmtree(broken)
        for path in sorted(p for p in (whole / "checkpoints/adapt").iterdir() if p.name != "digests.json"):
            broken = tmp_path / f"run{count}"
            file = damaged(whole, path, change, broken)
            capsys.readouterr()
            said = sentence(export([f"--run={broken}", f"--output={tmp_path / f'bundle{count}'}", "--eager"]), capsys)
            assert file.name in said, (name, said)
            assert not (tmp_path / f"bundle{count}").exists()
            count += 1
            shutil.rmtree(broken)
    print(f"\n{count} damaged files: each ended in one sentence, or the run went on from the checkpoint before")
    assert count >= 50


def test_what_is_not_damaged_goes_on(runs: tuple[Path, Path], tmp_path: Path) -> None:
    whole, stopped = runs
    shutil.copytree(stopped, tmp_path / "run")
    assert main([*QUICK, f"--output_dir={tmp_path / 'run'}", "--resume=auto"]) == 0
    assert same_tensors(whole, tmp_path / "run")
