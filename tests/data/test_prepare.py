from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from torchrec_mdr.data.datasets.base import Dataset
from torchrec_mdr.data.datasets.synthetic import Synthetic
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.prepare import main, prepare
from torchrec_mdr.registry import DATASETS
from torchrec_mdr.training.datasets import open_dataset


def synthetic(cache: Path, **options: object) -> str:
    return prepare("synthetic", cache_dir=str(cache), **{"rows": 1000, **options})


def test_prepared_data_are_made_once_for_each_set_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = synthetic(tmp_path), synthetic(tmp_path, seed=1)
    assert first != other
    monkeypatch.setattr(Synthetic, "write", lambda self, folder: pytest.fail("prepared again"))
    assert synthetic(tmp_path) == first
    assert synthetic(tmp_path, seed=1) == other
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(folder) for folder in (first, other))


def test_the_cache_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    assert prepare("synthetic", rows=10).startswith(str(tmp_path / "cache" / "synthetic-scenario-"))


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Schema, folder: str) -> None:
        assert os.path.exists(f"{folder}/train.parquet")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Schema, "save", fail)
        with pytest.raises(OSError, match="no space"):
            synthetic(tmp_path)
    assert os.listdir(tmp_path) == []
    assert Schema.load(synthetic(tmp_path)).rows["train"] == 800


def test_a_killed_run_leaves_nothing_that_is_taken_as_good(tmp_path: Path) -> None:
    code = f"from torchrec_mdr.prepare import prepare; prepare('synthetic', cache_dir={str(tmp_path)!r}, rows=10**8)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not any(path.stat().st_size for path in tmp_path.glob(".*/train.parquet*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("synthetic-*")) == [] and list(tmp_path.glob(".synthetic-*"))
    assert os.path.basename(synthetic(tmp_path)).startswith("synthetic-")
    assert not list(tmp_path.glob(".synthetic-*")), "what the killed one left is removed"


def test_processes_that_prepare_the_same_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = {future.result() for future in [pool.submit(synthetic, tmp_path) for _ in range(4)]}
    assert len(folders) == 1
    assert len(os.listdir(tmp_path)) == 1
    assert Schema.load(folders.pop()).rows["train"] == 800


def test_a_damaged_cache_folder_is_named(tmp_path: Path) -> None:
    folder = synthetic(tmp_path)
    os.remove(f"{folder}/schema.json")
    with pytest.raises(ValueError, match=f"{folder} exists but holds no prepared data; delete it and try again"):
        synthetic(tmp_path)
    assert os.listdir(tmp_path) == [os.path.basename(folder)]


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare("synthetic", output=str(tmp_path / "empty"), rows=10) == str(tmp_path / "empty")
    with pytest.raises(ValueError, match="the output folder .*empty is in use; name a new or empty one"):
        prepare("synthetic", output=str(tmp_path / "empty"), rows=10)


def test_changed_source_files_are_prepared_anew(tmp_path: Path) -> None:
    from tests.data.test_movielens import write_1m

    source = write_1m(tmp_path / "raw")

    def made() -> str:
        return prepare("movielens-1m", data_dir=str(source), protocol="mlora", cache_dir=str(tmp_path / "cache"))

    first = made()
    assert made() == first
    os.utime(source / "ratings.dat", ns=(1, 1))
    assert made() != first


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("netflix", {}, "--dataset 'netflix' is unknown; choose one of synthetic, movielens-1m, movielens-100k"),
        ("synthetic", {"row": 5}, "data set 'synthetic' has no option 'row'; it has auxiliary_scale, "),
        ("movielens-1m", {"data_dir": "x", "rows": 5}, "'movielens-1m' has no option 'rows'; it has none"),
        ("synthetic", {"data_dir": "x"}, "data set 'synthetic' is made here and reads no files; leave out --data_dir"),
        ("movielens-1m", {}, "is read from its original files; name their folder with --data_dir"),
        ("movielens-1m", {"data_dir": "nowhere"}, "the file nowhere/ratings.dat is missing; point --data_dir"),
        ("movielens-1m", {"data_dir": "x", "protocol": "z"}, "has no protocol 'z'; choose multilora or mlora"),
        ("movielens-1m", {"data_dir": "x", "division": "z"}, "no natural division 'z'; choose one of gender, age, "),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, dataset: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataset, cache_dir=str(tmp_path), **options)
    assert os.listdir(tmp_path) == []


def test_the_command_writes_a_folder_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "made")
    arguments = ["--dataset", "synthetic", "--synthetic.rows", "500", "--division", "segment", "--output", output]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == output
    schema = Schema.load(output)
    assert schema.rows["train"] == 400 and schema.divisions[0].name == "segment"


def test_the_command_fails_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "movielens-100k", "--data_dir", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: the file {tmp_path}/u.data is missing; point --data_dir at the folder of the original files\n"
    )


def test_every_data_set_can_be_named() -> None:
    assert list(DATASETS)[:3] == ["synthetic", "movielens-1m", "movielens-100k"]
    assert all(issubclass(DATASETS[name], Dataset) for name in DATASETS)


def test_a_cached_folder_that_has_lost_a_split_is_made_anew(tmp_path: Path) -> None:
    folder = synthetic(tmp_path)
    os.remove(f"{folder}/test.parquet")
    assert synthetic(tmp_path) == folder and os.path.exists(f"{folder}/test.parquet")


def test_a_raw_table_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"rows.csv is a file.*python -m torchrec_mdr.prepare --input .*rows.csv"):
        open_dataset(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"has no schema.json; python -m torchrec_mdr.prepare --input makes one"):
        Schema.load(str(tmp_path))
