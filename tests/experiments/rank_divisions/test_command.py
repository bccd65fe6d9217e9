"""The command, and what it says to mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.rank_divisions.made import user_data, write
from torchrec_mdr.experiments.rank_divisions import __main__
from torchrec_mdr.experiments.rank_divisions.__main__ import main
from torchrec_mdr.experiments.rank_divisions.ranking import rank_divisions


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = user_data(tmp_path / "d")
    output = tmp_path / "ranking.json"
    assert main(["--dataset", folder, "--candidates", "cut, gender", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["gender", "cut"]
    assert "domains of 'age'" in " ".join(lines)
    written = json.loads(output.read_text())
    assert (written["natural"], written["unit"]) == ("age", "nats per row")
    assert [entry["division"] for entry in written["ranking"]] == ["gender", "cut"]
    assert set(written["ranking"][0]["domains"]) == {"0", "1"}
    assert f"{1e4 * written['ranking'][0]['score']:+.2f}" in lines[2]
    assert sorted(os.listdir(tmp_path)) == ["d", "ranking.json"]


def test_a_data_set_by_name_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = user_data(tmp_path / "d")
    asked = []
    monkeypatch.setattr(__main__, "open_dataset", lambda name, **options: asked.append((name, options)) or folder)
    arguments = ["--dataset", "movielens-1m", "--data_dir", "x", "--protocol", "mlora", "--division", "gender"]
    assert main([*arguments, "--candidates", "age"]) == 0
    assert asked == [("movielens-1m", {"data_dir": "x", "division": "gender", "protocol": "mlora"})]
    assert "domains of 'gender'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "{d}", "--division", "sex"], "has no division 'sex'; it has age, gender, cut"),
        (["--dataset", "{d}", "--candidates", "sex"], "has no division 'sex'"),
        (["--dataset", "{d}", "--candidates", "gender,age"], "candidate 'age' is the natural division itself"),
        (["--dataset", "{d}", "--candidates", ","], "no candidate is named"),
        (["--dataset", "{d}", "--data_dir", "x"], "is prepared already; leave out --data_dir"),
        (["--dataset", "{d}", "--max_rows", "3"], "max_rows must be at least 5"),
        (["--dataset", "{d}", "--output", "{d}/none/r.json"], "does not exist; create it"),
        (["--dataset", "{d}/.."], "is no prepared data set"),
        (["--dataset", "nothing"], "--dataset 'nothing' is unknown; choose one of synthetic"),
        (["--dataset", "movielens-1m"], "name their folder with --data_dir"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    rng = np.random.default_rng(8)
    columns = {name: rng.integers(0, 2, 60) for name in ("age", "gender", "cut")}
    folder = write(tmp_path / "d", rng.integers(0, 2, 60), {"item": rng.integers(0, 3, 60)}, columns)
    assert main([argument.replace("{d}", folder) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert complaint in printed.err


def test_too_few_rows_or_divisions_are_told(tmp_path: Path) -> None:
    two = np.array([0, 1])
    few = write(tmp_path / "few", two, {"item": two}, {"natural": two, "other": two})
    with pytest.raises(ValueError, match="has 2 training rows, too few for 5 folds"):
        rank_divisions(few)
    alone = write(tmp_path / "alone", two, {"item": two}, {"natural": two})
    with pytest.raises(ValueError, match="no division besides 'natural'"):
        rank_divisions(alone)


def test_the_help_says_how_it_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "The score is what these effects save in log loss" in capsys.readouterr().out
