"""A run's files are what was written, or are refused by their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.inference.run import load_run
from torchrec_mdr.train import main
from torchrec_mdr.verify import main as verify

SMALL = ["--dataset_options.rows=3000", "--dataset_options.num_domains=2", "--batch_size=256"]
SMALL += ["--backbone_options.hidden=[8]", "--stages.pretrain.epochs=1", "--stages.adapt.epochs=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("integrity") / "run"
    assert main([*SMALL, f"--output_dir={run}"]) == 0
    return run


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_bit_flipped_in_any_file_is_refused_by_its_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert verify([str(run)]) == 0 and capsys.readouterr().out == ""
    files = [run / "config.yaml", run / "schema.json", *(run / "checkpoints" / "adapt").iterdir()]
    assert len(files) == 6
    for path in files:
        before = path.read_bytes()
        flip(path)
        with pytest.raises(ValueError, match=path.name) as error:
            load_run(str(run))
        assert "\n" not in str(error.value)
        assert verify([str(run)]) == 1
        (said,) = capsys.readouterr().out.splitlines()
        assert str(path) in said
        path.write_bytes(before)
    (run / "checkpoints" / "adapt" / "stage.json").unlink()
    assert verify([str(run)]) == 1 and "stage.json cannot be read" in capsys.readouterr().out
    assert verify([str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "stage.json has no 'groups'"),
        ("[]", "stage.json holds a list"),
        ('{"groups": [], "divisions": {"scenario": 2}}', "start names no groups of tensors in its stage.json"),
        ('{"groups": ["wheels"], "divisions": {"scenario": 2}}', "its groups name 'wheels', not "),
    ],
)
def test_a_start_that_names_no_groups_is_refused(
    content: str, words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished / "checkpoints" / "pretrain", start)
    (start / "digests.json").unlink()
    (start / "stage.json").write_text(content)
    assert main([*SMALL, "--stage=adapt", f"--init_checkpoint={start}", f"--output_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_options_that_were_changed_are_not_gone_on_with(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "config.yaml")
    before = (run / "config.yaml").read_bytes()
    assert main([*SMALL, f"--output_dir={run}", "--resume"]) == 2
    assert "config.yaml is damaged: it is not what was written; restore it" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def save_and_flip(folder: str, name: str) -> str:
    """Saves a tensor, has rank 0 flip a bit of a file, and loads on all ranks."""
    checkpoint.save(folder, {"t": torch.arange(1000.0)}, {"value": 1})
    if torch.distributed.get_rank() == 0 and name:
        flip(next(Path(folder).glob(name)))
    torch.distributed.barrier()
    state = {"t": torch.zeros(1000)}
    try:
        checkpoint.load(folder, state)
    except ValueError as error:
        return str(error)
    return "loaded" if torch.equal(state["t"], torch.arange(1000.0)) else "other values"


def test_all_ranks_refuse_what_one_finds(tmp_path: Path, two_ranks: RankPool) -> None:
    assert two_ranks.run(save_and_flip, str(tmp_path / "whole"), "") == ["loaded", "loaded"]
    said = two_ranks.run(save_and_flip, str(tmp_path / "flipped"), "*.distcp")
    assert said[0] == said[1] and ".distcp is damaged: it is not what was written; use another" in said[0]


def save_where_nothing_can_be_written(folder: str) -> str:
    try:
        checkpoint.save(folder, {"t": torch.zeros(4)}, {})
    except ValueError as error:
        return str(error)
    return "no error"


def test_all_ranks_say_where_a_checkpoint_cannot_be_written(tmp_path: Path, two_ranks: RankPool) -> None:
    (tmp_path / "file").write_text("mine")
    folder = str(tmp_path / "file" / "stage")
    said = two_ranks.run(save_where_nothing_can_be_written, folder)
    assert said[0] == said[1] and said[0].startswith(f"checkpoint {folder} cannot be written (NotADirectoryError: ")
