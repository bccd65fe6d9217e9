from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from torchrec_mdr.data.datasets.movielens import activity, random_users
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.data.splits import stratified_split
from torchrec_mdr.prepare import prepare

USERS_1M = ["7::F::1::10::48067", "9::M::56::16::70072", "11::M::25::0::48067-12", "20::F::18::20::02460"]
MOVIES_1M = ["3::Ma\xeetresse, La (1973)::Drama|Comedy", "10::A::B (1995)::Action"]
USERS_100K = ["1|17|M|student|85711", "2|18|F|other|94043", "3|56|M|writer|32067", "4|49|F|none|T8H1N"]
MOVIES_100K = [
    f"{movie}|Name {movie}\x85|01-Jan-1995||http://x|"
    + "|".join("1" if genre in genres else "0" for genre in range(19))
    for movie, genres in ((1, {3, 5}), (2, {0}), (5, {18}))
]


def write_1m(folder: Path, **changed: list[str]) -> Path:
    """Made-up files in MovieLens-1M's format."""
    ratings = [f"{user}::{movie}::{1 + (user + movie) % 5}::97{user}" for user in (20, 7, 11, 9) for movie in (3, 10)]
    files = {"users": USERS_1M, "movies": [MOVIES_1M[0], "10::A (1995)::Action"], "ratings": ratings} | changed
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"{name}.dat").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    return folder


def write_100k(folder: Path, **changed: list[str]) -> Path:
    """Made-up files in MovieLens-100k's format."""
    ratings = [f"{user}\t{movie}\t{1 + (user + movie) % 5}\t88" for user in (3, 1, 4, 2) for movie in (5, 1, 2)]
    files = {"user": USERS_100K, "item": MOVIES_100K, "data": ratings} | changed
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"u.{name}").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    return folder


def table(folder: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f"{folder}/{split}.parquet") for split in SPLITS])


def prepared(tmp_path: Path, source: Path, **options: Any) -> tuple[Schema, pl.DataFrame]:
    dataset = "movielens-1m" if (source / "ratings.dat").exists() else "movielens-100k"
    folder = prepare(dataset, data_dir=str(source), cache_dir=str(tmp_path / "cache"), **options)
    return Schema.load(folder), table(folder)


def test_every_column_of_a_rating_1m(tmp_path: Path) -> None:
    schema, rows = prepared(tmp_path, write_1m(tmp_path / "raw"), protocol="multilora", division="age3")
    # user 11, 25 to 34, occupation 0, third zip, movie 10, rated 1 + 21 % 5 = 2
    found = rows.filter((pl.col("user") == 2) & (pl.col("movie") == 1)).to_dicts()
    assert found == [
        {
            "label": 0.0,
            "user": 2,
            "gender": 1,
            "occupation": 0,
            "zip": 2,
            "movie": 1,
            "genre": 0,
            "domain": 1,
            "age": pytest.approx(24 / 55),
            "domain_age3": 1,
            "domain_gender": 1,
            "domain_age": 2,
            "domain_occupation": 0,
            "domain_random3": found[0]["domain_random3"],
            "domain_activity": found[0]["domain_activity"],
        }
    ]
    sizes = {feature.name: feature.num_embeddings for feature in schema.sparse_features}
    assert sizes == {"user": 4, "gender": 2, "occupation": 21, "zip": 4, "movie": 2, "genre": 2, "domain": 3}
    assert schema.divisions[0].domain_names == ("under 25", "25-34", "35+")
    # (20 + 10) % 5 + 1 = 1, (20 + 3) % 5 + 1 = 4
    assert dict(rows.filter(pl.col("user") == 3).select("movie", "label").iter_rows()) == {0: 1.0, 1: 0.0}


def test_every_column_of_a_rating_100k(tmp_path: Path) -> None:
    schema, rows = prepared(tmp_path, write_100k(tmp_path / "raw"), protocol="multilora", division="age")
    users = rows.group_by("user").first().sort("user")
    assert users["domain_age"].to_list() == [0, 1, 6, 4]
    assert users["domain_age3"].to_list() == [0, 0, 2, 2]
    assert users["age"].to_list() == pytest.approx([0, 1 / 39, 1, 32 / 39])
    assert users["occupation"].to_list() == [18, 13, 20, 12]
    assert users["zip"].to_list() == [1, 2, 0, 3]
    assert dict(rows.select("movie", "genre").unique().iter_rows()) == {0: 3, 1: 0, 2: 18}
    # rated 1 + (2 + 1) % 5 = 4
    assert rows.filter((pl.col("user") == 1) & (pl.col("movie") == 0))["label"].to_list() == [1.0]
    assert schema.division("occupation").domain_names[18] == "student"


def test_protocol_mlora_has_its_own_label_and_features(tmp_path: Path) -> None:
    schema, rows = prepared(tmp_path, write_1m(tmp_path / "raw"), protocol="mlora", division="occupation")
    assert [feature.name for feature in schema.sparse_features] == ["user", "movie", "domain"]
    assert schema.dense_features == ()
    names = [division.name for division in schema.divisions]
    assert names == ["occupation", "gender", "age", "age3", "random3", "activity"]
    assert rows["domain"].equals(rows["domain_occupation"], check_names=False)
    # only rated 5: (11 + 3) % 5, and (9 + 10) % 5
    assert set(rows.filter(pl.col("label") == 1).select("user", "movie").iter_rows()) == {(2, 0), (1, 1)}


def test_split_of_movielens_1m_multilora(tmp_path: Path, movielens_1m: Path) -> None:
    schema, rows = prepared(tmp_path, movielens_1m, protocol="multilora", division="age3")
    assert schema.rows == {"train": 800_167, "validation": 100_020, "test": 100_022}
    assert np.bincount(rows["domain"]).tolist() == [210_747, 395_556, 393_906]
    assert np.bincount(rows["domain"][-100_022:]).tolist() == [21_138, 39_563, 39_321]
    sizes = {feature.name: feature.num_embeddings for feature in schema.sparse_features}
    assert (sizes["user"], sizes["movie"], sizes["genre"], sizes["zip"]) == (6040, 3883, 18, 3439)
    # row by row against the file
    lines = (movielens_1m / "ratings.dat").read_text().splitlines()
    users = (movielens_1m / "users.dat").read_text().splitlines()
    order = np.random.default_rng(2024).permutation(len(lines))
    for place in (0, 12_345, 800_166, 800_167, 900_187, 1_000_208):
        user, _, rating, _ = lines[order[place]].split("::")
        row = rows.row(place, named=True)
        raw_user, gender, age, occupation, _ = users[row["user"]].split("::")
        assert raw_user == user
        assert row["label"] == (int(rating) > 3)
        assert (row["gender"], row["occupation"]) == ("FM".index(gender), int(occupation))
        assert row["age"] == pytest.approx((int(age) - 1) / 55)
    assert rows["age"].min() == 0 and rows["age"].max() == 1


@pytest.mark.parametrize(("division", "num_domains"), [("gender", 2), ("age", 7), ("occupation", 21)])
def test_split_of_movielens_1m_mlora(tmp_path: Path, movielens_1m: Path, division: str, num_domains: int) -> None:
    schema, rows = prepared(tmp_path, movielens_1m, protocol="mlora", division=division)
    assert schema.divisions[0].num_domains == num_domains
    assert rows.height == 1_000_209
    assert rows["label"].sum() == 226_310
    counted = rows.with_columns(
        split=pl.concat([pl.repeat(i, schema.rows[split], eager=True) for i, split in enumerate(SPLITS)])
    )
    counts = counted.group_by("domain", "label", "split").len().pivot("split", index=["domain", "label"], values="len")
    assert counts.height == 2 * num_domains
    for _, _, *found in counts.select("domain", "label", "0", "1", "2").iter_rows():
        total = sum(found)
        assert all(abs(n - share * total) <= 1.001 for n, share in zip(found, (0.6, 0.2, 0.2), strict=True))


def test_movielens_100k(tmp_path: Path, movielens_100k: Path) -> None:
    schema, rows = prepared(tmp_path, movielens_100k, protocol="multilora", division="occupation")
    assert schema.rows == {"train": 80_000, "validation": 10_000, "test": 10_000}
    sizes = {feature.name: feature.num_embeddings for feature in schema.sparse_features}
    assert (sizes["user"], sizes["movie"], sizes["genre"]) == (943, 1682, 19)
    names = schema.divisions[0].domain_names
    assert names == tuple((movielens_100k / "u.occupation").read_text().split())
    assert rows["label"].sum() == 55_375


def test_the_stratified_split_is_seeded_and_random() -> None:
    rng = np.random.default_rng(0)
    domains, labels = rng.integers(0, 3, 5000), rng.random(5000) < 0.2
    split = stratified_split(domains, labels)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(5000))
    assert all(np.array_equal(rows, stratified_split(domains, labels)[name]) for name, rows in split.items())
    # no stretch of the file is favoured
    assert abs(split["train"].mean() - 2500) < 100


def test_activity_counts_training_ratings_only() -> None:
    users = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    train = np.array([0, 3, 4, 5, 9])
    # training ratings: 1, 2, 1, 1; the median is 1
    assert activity(users, train, 5).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_users_are_dealt_by_lot() -> None:
    users = np.random.default_rng(0).integers(0, 3001, 20_000)
    domains = random_users(users, 3001, 3)
    of_user = dict(zip(users.tolist(), domains.tolist(), strict=True))
    assert all(of_user[user] == domain for user, domain in zip(users.tolist(), domains.tolist(), strict=True))
    assert np.bincount(random_users(np.arange(3001), 3001, 3)).tolist() == [1001, 1000, 1000]
    # by lot, not by number
    assert abs(np.corrcoef(np.arange(3001), random_users(np.arange(3001), 3001, 3))[0, 1]) < 0.06


RATINGS = ["7::3::5::1", "9::10::3::2", "20::3::1::3"]


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        (
            "ratings",
            [*RATINGS, "7::3::5"],
            r"ratings\.dat, line 4: 3 fields where 4 are expected, .*: user, movie, rat",
        ),
        ("ratings", [*RATINGS, "7::3::5::1::1"], r"ratings\.dat, line 4: 5 fields where 4 are expected"),
        ("ratings", [RATINGS[0], "", *RATINGS], r"ratings\.dat, line 2: 1 fields where 4"),
        ("ratings", [*RATINGS, "7::x::5::1"], r"ratings\.dat, line 4: movie is 'x', which is no whole number; restore"),
        ("ratings", [*RATINGS, "7::3::4.5::1"], r"line 4: rating is '4.5', which is no whole number"),
        ("ratings", [RATINGS[0], "7::3::6::1"], r"line 2: rating is '6', not a number from 1 to 5"),
        ("ratings", [*RATINGS, "8::3::5::1"], r"ratings\.dat, line 4: user 8 has no row in users\.dat; restore"),
        ("ratings", [RATINGS[0], "7::4::5::1"], r"ratings\.dat, line 2: movie 4 has no row in movies\.dat; restore"),
        ("users", [*USERS_1M, "21::F::1::10"], r"users\.dat, line 5: 4 fields where 5"),
        ("users", [*USERS_1M, "21::X::1::10::1"], r"users\.dat, line 5: gender is 'X', not F or M"),
        ("users", [*USERS_1M, "21::F::2::10::1"], r"users\.dat, line 5: age is '2', not one of 1, 18, 25"),
        ("users", [*USERS_1M, "21::F::1::21::1"], r"users\.dat, line 5: occupation is '21', not a number from 0 to 20"),
        ("users", [*USERS_1M, USERS_1M[0]], r"users\.dat, line 5: user is '7', not a number that no earlier line has"),
        ("movies", MOVIES_1M, r"movies\.dat, line 2: 4 fields where 3 are expected"),
        ("movies", [MOVIES_1M[0], MOVIES_1M[0]], r"movies\.dat, line 2: movie is '3', not a number that no earlier"),
        ("movies", [], r"movies\.dat, line 1: 1 fields where 3"),
    ],
)
def test_a_faulty_line_is_named_1m(tmp_path: Path, file: str, lines: list[str], message: str) -> None:
    source = write_1m(tmp_path / "raw", **{file: lines})
    with pytest.raises(ValueError, match=message) as caught:
        prepared(tmp_path, source)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("data", ["1\t5\t3\t1", "1\t5\t3"], r"u\.data, line 2: 3 fields where 4 are expected, separated by '\\t'"),
        ("data", ["1\t5\t3\t1", "9\t5\t3\t1"], r"u\.data, line 2: user 9 has no row in u\.user"),
        ("data", ["1\t4\t3\t1"], r"u\.data, line 1: movie 4 has no row in u\.item"),
        ("user", [*USERS_100K, "5|x|M|writer|1"], r"u\.user, line 5: age is 'x', which is no whole number"),
        ("user", [*USERS_100K, "5|5|M|king|1"], r"u\.user, line 5: occupation is 'king', not one of the 21"),
        ("item", [MOVIES_100K[0], "2|x"], r"u\.item, line 2: 2 fields where 24 are expected, .*, \.\.\.; restore"),
    ],
)
def test_a_faulty_line_is_named_100k(tmp_path: Path, file: str, lines: list[str], message: str) -> None:
    source = write_100k(tmp_path / "raw", **{file: lines})
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, source)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    source = write_1m(tmp_path / "raw")
    (source / "ratings.dat").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ratings\.dat is empty; restore"):
        prepared(tmp_path, source)


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    source = write_1m(tmp_path / "raw")
    _, expected = prepared(tmp_path, source)
    for path in source.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    _, found = prepared(tmp_path, source)
    assert found.equals(expected)
