"""Bad input and bad data: one sentence that names the place and the mend, and nothing half-written."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.data.raw import kinds, prepare, rows
from torchrec_mdr import prepare as command
from torchrec_mdr.data.importing import prepare as importing

FOLDS = ["train"] * 8 + ["validation", "test"]


def changed(name: str, row: int, value: Any) -> pl.DataFrame:
    """Rows as CSV has them, with one value changed."""
    table = rows(200).with_columns(pl.all().cast(pl.String), fold=pl.Series(FOLDS * 20))
    values = table[name].to_list()
    values[row] = value
    return table.with_columns(pl.Series(name, values, dtype=pl.String))


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"domain": None}, "--domain is missing; name the column"),
    ({"label": None}, "--label is missing; name the label's column, or give a --label_rule"),
    ({"label": "click"}, "--label: .*rows.csv has no column 'click'; it has user_id, item"),
    ({"sparse": "item,itm"}, "--sparse.* has no column 'itm'"),
    ({"sparse": "age", "dense": "age"}, "column 'age' is named in --dense and as a category; name it once"),
    ({"exclude": "shop"}, "column 'shop' is named in --exclude and in another option"),
    ({"split": "random:0.9,0.2"}, "--split random:0.9,0.2 .*must be positive and leave some to test"),
    ({"split": "weekly"}, "--split weekly is none of random:0.8,0.1, time:COLUMN:0.8,0.1 and column:COLUMN"),
    ({"split": "time:moment"}, "--split: .* has no column 'moment'"),
    ({"split": "time:item"}, "row 0 .*: column 'item' holds no time, which --split time needs"),
    ({"split": "column:item"}, "row 0 .*: column 'item' is 'i.*', which --split column does not know"),
    ({"min_count": 0}, "--min_count must be at least 1, not 0"),
    ({"pooling": "max"}, "--pooling must be mean or sum, not max"),
    ({"hash": "item"}, "--hash 'item' must name a column and a number of ids"),
    ({"share": ["item"]}, "--share item needs at least two columns"),
    ({"label_rule": "age >"}, "--label_rule 'age >' cannot be read"),
    ({"label_rule": "age + 1"}, "--label_rule 'age \\+ 1' is no condition"),
    ({"label_rule": "agee > 1"}, "--label_rule: .* has no column 'agee'"),
    ({"label": "age"}, "row 0 .*: column 'age': '.*' is no label, which is 0 or 1; say which rows are positive"),
    ({"label_rule": "age > 200"}, "all 160 rows of split 'train' are negative"),
    ({"domain": "price"}, "column 'price' holds fractional numbers, and each would be a domain"),
    ({"domain": "clicked"}, "column 'clicked' is the label and cannot divide the rows"),
    ({"weight": "item"}, "row 0 .*: column 'item': 'i.*' is no weight"),
    ({"dense": "item"}, "row 0 .*: column 'item' holds numbers, but 'i.*' here is no finite one .*of 160 such rows"),
    ({"weight": "clicked"}, "--weight: column 'clicked' is the label; name another one"),
    ({"timestamps": "item"}, "row 0 .*: column 'item' holds times, but 'i.*' here is none .*of 160 such rows"),
    ({"share": ["item,price"]}, "--share: column 'price' is a number, and only categories share a vocabulary"),
    ({"timestamps": "time", "domain": "time"}, "column 'time' cannot divide the rows: it is a timestamp; name another"),
    ({"label_rule": "item > 3"}, "row 0 .*: the label's rule item > 3 gives nothing, as a value is missing or no num"),
    ({"timestamps": "age"}, "--timestamps: column 'age' holds numbers from .*, which are no times"),
    ({"test_input": ["none.csv"]}, "--test_input: there is no file none.csv"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    rows(200).write_csv(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "rows.csv"], tmp_path, **options)
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_a_file_without_rows_and_a_domain_without_values_are_named(tmp_path: Path) -> None:
    rows(200).head(0).write_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"--input: .*none.csv has columns and no rows; name other files"):
        prepare([tmp_path / "none.csv"], tmp_path)
    with pytest.raises(ValueError, match="column 'shop' cannot divide the rows: no training row has a value; name"):
        prepare(rows(200).with_columns(shop=pl.lit(None, pl.String)), tmp_path)


VALUES: list[tuple[str, int, Any, dict[str, Any], str]] = [
    ("clicked", 17, "2", {}, "row 17 .*: column 'clicked': '2' is no label"),
    ("clicked", 17, None, {}, "row 17 .*: column 'clicked': a missing value is no label"),
    ("price", 17, "abc", {}, "row 17 .*: column 'price' holds numbers, but 'abc' here is no finite one"),
    ("price", 17, "inf", {}, "row 17 .*: column 'price' holds numbers, but 'inf' here is no finite one"),
    ("price", 19, "inf", {}, "row 19 .*: column 'price': 'inf' is no finite number"),
    ("age", 3, "-1", {"weight": "age"}, "row 3 .*: column 'age': '-1' is no weight"),
    ("fold", 5, "holdout", {}, "row 5 .*: column 'fold' is 'holdout', which --split column does not know"),
]


@pytest.mark.parametrize(("column", "row", "value", "options", "message"), VALUES)
def test_a_wrong_value_is_named_with_its_file_and_row(
    tmp_path: Path, column: str, row: int, value: Any, options: dict[str, Any], message: str
) -> None:
    table = changed(column, row, value)
    table.head(10).write_csv(tmp_path / "a.csv")
    table.tail(190).write_csv(tmp_path / "b.csv")
    place = f"a.csv, {message}" if row < 10 else f"b.csv, {message.replace(str(row), str(row - 10), 1)}"
    with pytest.raises(ValueError, match=place):
        prepare([tmp_path], tmp_path, split="column:fold", **options)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.csv"]


def test_labels_of_two_other_values_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 1, 2 and not 0 and 1; .* --label_rule 'clicked = 2'"):
        prepare(rows(200).with_columns(pl.col("clicked") + 1), tmp_path)


def test_what_is_proposed_is_quoted_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(300).rename({"time": "Bestellt am", "clicked": 'is "it"'})
    table = table.with_columns(pl.col("age").alias("a,b c"), (pl.col('is "it"') * 9.5).alias("it, then"))
    with pytest.raises(ValueError) as caught:
        prepare(table.with_columns(pl.col('is "it"') + 1), tmp_path, label='is "it"')
    (rule,) = shlex.split(str(caught.value).split("such as --label_rule ")[1])
    prepare(table.with_columns(pl.col('is "it"') + 1), tmp_path / "ruled", label=None, label_rule=rule)
    told = "\n".join(prepare(table, tmp_path, label='is "it"').warnings)
    cut = shlex.split(told.split("say --split ")[1].split("\n")[0])[0]
    out = shlex.split(told.split("--exclude ")[1].split("\n")[0])[0]
    made = prepare(table, tmp_path / "cut", label='is "it"', split=cut, exclude=out)
    assert "it, then" not in kinds(made) and not [one for one in made.warnings if "--split" in one]
    table.write_parquet(tmp_path / "rows.parquet")
    given = ["--input", str(tmp_path / "rows.parquet"), "--label", 'is "it"', "--domain=shop"]
    assert command.main([*given, "--output", str(tmp_path / "my data")]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == f"{tmp_path}/my data/"


def test_too_many_domains_are_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_mdr.data.importing.decide.MAX_DOMAINS", 100)
    with pytest.raises(ValueError, match="column 'request' has 160 different values .* at most 100 .*--min_rows"):
        prepare(rows(200), tmp_path, domain="request")


def test_what_looks_wrong_is_said(tmp_path: Path) -> None:
    table = rows(1000).with_columns(
        outcome=pl.col("clicked") * 2.5,
        code=pl.concat_str(pl.lit("c"), pl.col("clicked") * 5 + pl.col("age") % 5),
        fold=pl.Series(FOLDS * 100),
        shop=pl.when(pl.col("clicked") == 0, pl.col("age") < 30).then(pl.lit("zero")).otherwise("shop"),
    )
    twice = pl.concat([table, table.filter(pl.col("fold") == "train").head(50).with_columns(fold=pl.lit("test"))])
    told = "\n".join(prepare(twice, tmp_path / "a", split="column:fold", exclude="time").warnings)
    assert "column 'outcome' predicts the label alone (AUC 1.000)" in told and "--exclude code" in told
    assert "column 'item' predicts" not in told and "column 'age' predicts" not in told
    assert "50 of 150 rows of split 'test' are also training rows" in told
    assert "1 domain(s) have rows of one class only in split 'train', their adapters learn that alone: 'zero'" in told
    told = "\n".join(prepare(table, tmp_path / "b", split="column:fold").warnings)
    assert "times overlap: test rows begin at 2024-01-01" in told and "also training rows" not in told
    assert "--split time:time" in "\n".join(prepare(table, tmp_path / "c").warnings)
    alone = prepare(table.with_columns(shop=pl.lit("Oslo")), tmp_path / "e", split="column:fold").warnings
    assert "all training rows are in one domain of division 'shop'" in "\n".join(alone)
    by_time = prepare(table.drop("fold"), tmp_path / "d", split="time:time")
    assert not [warning for warning in by_time.warnings if "time" in warning]


def test_forms_that_may_mean_two_things_are_told(tmp_path: Path) -> None:
    table = rows(300).with_columns(
        us=pl.col("time").dt.strftime("%m/%d/%Y"),
        old=pl.col("time").dt.strftime("%d-%m-%Y %H:%M"),
        weight=pl.concat_str(pl.col("age") % 7 + 1, pl.lit(",250")),
        code=(pl.col("age") % 7).cast(pl.String),
    )
    table.with_columns(pl.all().cast(pl.String)).write_csv(tmp_path / "rows.csv")
    told = [one for one in prepare([tmp_path / "rows.csv"], tmp_path, split="time:time").warnings if "mere text" in one]
    assert [one.split("'")[1] for one in told] == ["us", "old", "weight"]
    assert "its dates may have the day or the month first; write them as 2024-03-31, or name it in --sparse" in told[0]
    assert "1,234 there may be 1234 or 1.234; write it so" in told[2]
    (tmp_path / "made").rename(tmp_path / "before")
    named = prepare([tmp_path / "rows.csv"], tmp_path, split="time:time", sparse="us,old,weight")
    assert not [one for one in named.warnings if "mere text" in one]


def test_a_killed_preparation_leaves_nothing_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    rows(200).write_csv(tmp_path / "rows.csv")
    code = (
        "import time; from torchrec_mdr.data.importing import prepare as p; from tests.data.raw import prepare; "
        f"p.decide = lambda *a: time.sleep(60); from pathlib import Path; prepare([{str(tmp_path / 'rows.csv')!r}], "
        f"Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".made.*.preparing/raw/test.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "made").exists()
    prepare(rows(200), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["made", "rows.csv"]


def test_a_failure_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(importing, "find_warnings", fail)
    with pytest.raises(OSError, match="no space"):
        prepare(rows(200), tmp_path)
    assert os.listdir(tmp_path) == []


OWN = ["--input", "rows.csv", "--label", "clicked", "--domain", "shop"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name your own rows with --input, or a public data set with --dataset"),
        (OWN, "--output is missing"),
        (["--dataset", "synthetic", "--label", "clicked"], "--label belongs to --input"),
        (["--input", "rows.csv", "--data_dir", "x", "--output", "y"], "--data_dir belongs to --dataset"),
        (
            ["--input", "rows.csv", "--label", "clicked", "--domain", "shop", "--output", "."],
            "output folder . is in use",
        ),
    ],
)
def test_the_command_ends_with_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(200).write_csv("rows.csv")
    assert command.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and told.count("\n") == 1
