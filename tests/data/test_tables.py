"""Raw tables in all their forms."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from torchrec_mdr.data.tables import RawTable, open_table

ROWS = pl.DataFrame({"user": [1, 2, 3], "note": ["a,b", None, "ü"], "price": [1.5, None, 2.0]})


def read(*paths: object) -> pl.DataFrame:
    return pl.concat(list(open_table([str(path) for path in paths]).batches(2)))


def csv(path: Path) -> None:
    ROWS.write_csv(path)


def compressed(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        plain = path.with_suffix("")
        write(plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return written


WRITERS = {
    "a.parquet": ROWS.write_parquet,
    "a.csv": csv,
    "a.csv.gz": compressed(csv),
    "a.tsv": lambda path: ROWS.write_csv(path, separator="\t"),
    "semicolons.csv": lambda path: ROWS.write_csv(path, separator=";", include_bom=True),
    "a.jsonl": ROWS.write_ndjson,
    "a.json.gz": compressed(ROWS.write_ndjson),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_kind(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name).with_columns(pl.col("user").cast(int), pl.col("price").cast(float)).equals(ROWS)


def test_folders_globs_and_partitions(tmp_path: Path) -> None:
    for day in (2, 1):
        folder = tmp_path / "rows" / f"day={day}"
        folder.mkdir(parents=True)
        ROWS.with_columns(user=pl.col("user") + 10 * day).write_parquet(folder / "part-0.parquet")
    (tmp_path / "rows" / "_SUCCESS").touch()
    (tmp_path / "rows" / ".part.parquet.crc").touch()
    for inputs in (tmp_path / "rows", tmp_path / "rows" / "*" / "*.parquet", tmp_path / "rows" / "**" / "*.parquet"):
        rows = read(inputs)
        assert rows["user"].to_list() == [11, 12, 13, 21, 22, 23] and rows["day"].to_list() == list("111222")
    table = open_table([str(tmp_path / "rows")])
    assert table.place(4) == f"{tmp_path}/rows/day=2/part-0.parquet, row 1 (from 0)" and table.count() == 6


def test_files_of_other_types_and_orders_of_columns(tmp_path: Path) -> None:
    ROWS.write_parquet(tmp_path / "a.parquet")
    ROWS.select("price", "user", "note").with_columns(pl.col("user").cast(pl.Int16)).write_parquet(
        tmp_path / "b.parquet"
    )
    ROWS.write_csv(tmp_path / "c.csv")
    assert read(tmp_path / "*.parquet").equals(pl.concat([ROWS, ROWS]))
    assert read(tmp_path)["user"].to_list() == list("123") * 3
    ROWS.drop("note").write_csv(tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"d.csv has no column 'note'; it has user, price"):
        open_table([str(tmp_path)]).require(["user", "note"])


def test_frames() -> None:
    pandas = pytest.importorskip("pandas")
    table = RawTable.from_frame(pandas.DataFrame({"a": [1, 2]}))
    assert [frame["a"].to_list() for frame in table.batches()] == [[1, 2]]
    ages = pandas.DataFrame({"age": [20.0, 30.0, 60.0, None], "kept": pandas.Categorical(["a", "b", None, "a"])})
    ages["range"] = pandas.cut(ages["age"], [0, 40, 80])
    ages["month"] = pandas.period_range("2024-01", periods=4, freq="M")
    (frame,) = RawTable.from_frame(ages).batches()
    assert frame["range"].to_list() == ["(0, 40]", "(0, 40]", "(40, 80]", None]
    assert frame["month"][0] == "2024-01" and frame["kept"].to_list() == ["a", "b", None, "a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "a.txt is of a kind that is not read; its name must end with .parquet, .csv"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.parquet", b"PAR1 no", "a.parquet cannot be read"),
        ("a.csv.gz", b"no gzip", "a.csv.gz cannot be read"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 fields where 2 are expected; correct it"),
        ("a.csv", b'a;b\n1;"2\n3"\n1;2;3\n', "a.csv, line 4: 3 fields where 2 are expected"),
        ("a.csv", b'a,b\n1,2\n"1,2\n1,2\n', "a.csv, line 3: a quote begins in this row and does not end; correct it"),
        ("a.csv", b"a,b\n1,\xfc\n", "a.csv is not in UTF-8 .byte 0xfc.; convert it, as by iconv -f latin1 -t utf-8"),
        ("a.csv", "Gerät;b\n1;2\n".encode("latin1"), "a.csv is not in UTF-8 .byte 0xe4.; .* iconv -f latin1"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv is not in UTF-8 .byte 0xff.; .* iconv -f utf-16"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl, line 3: a JSON object is expected in each line, and this is"),
        ("a.json", b'[\n{"a": 1},\n{"a": 2}]', r"a.json, line 1: a JSON object .* .of an array, jq -c '.\[\]' makes"),
        ("b/c.txt", b"x", "the folder .*b holds no file to read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    pl.DataFrame({"a": ["1"], "b": ["2"]}).write_csv(tmp_path / "good.csv")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "good.csv", path.parent if name == "b/c.txt" else path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--input: there is no file .*none\*.csv"):
        open_table([str(tmp_path / "none*.csv")])


@pytest.mark.parametrize("header", ["user,price,user", 'user,price," user"', "user;price;user"])
def test_a_column_that_is_there_twice_is_named(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n" + header.replace("user", "1").replace("price", "2") + "\n")
    with pytest.raises(ValueError, match=r"a\.csv has the column 'user' twice; take one out"):
        read(tmp_path / "a.csv")


def test_rows_are_known_without_reading_them_in_parquet_alone(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2, 3]})
    frame.write_parquet(tmp_path / "rows.parquet")
    frame.write_csv(tmp_path / "rows.csv")
    names = [["rows.parquet", "rows.parquet"], ["rows.parquet", "rows.csv"]]
    assert [open_table([str(tmp_path / one) for one in both]).known_rows() for both in names] == [6, None]
