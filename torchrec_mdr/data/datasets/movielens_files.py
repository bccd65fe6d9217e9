"""Reads the original files of MovieLens-1M and MovieLens-100k, and names the line where one is faulty."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from torchrec_mdr.storage import path_manager

AGE_BRACKETS = (1, 18, 25, 35, 45, 50, 56)
GENDERS = ("F", "M")
OCCUPATIONS_1M = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
OCCUPATIONS_100K = (
    "administrator",
    "artist",
    "doctor",
    "educator",
    "engineer",
    "entertainment",
    "executive",
    "healthcare",
    "homemaker",
    "lawyer",
    "librarian",
    "marketing",
    "none",
    "other",
    "programmer",
    "retired",
    "salesman",
    "scientist",
    "student",
    "technician",
    "writer",
)
GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_MEND = "restore the original file"


@dataclass(frozen=True)
class Ratings:
    """The ratings in file order, joined with their users and movies; every id is contiguous from 0.

    Args:
        rows (pl.DataFrame): columns user, movie, rating, gender, bracket (index into AGE_BRACKETS), age, occupation,
            zip, genre.
        sizes (dict[str, int]): number of ids of user, movie, gender, occupation, zip, genre.
        age_range (tuple[int, int]): youngest and oldest age of the users' file.
        occupations (tuple[str, ...]): names in id order.
    """

    rows: pl.DataFrame
    sizes: dict[str, int]
    age_range: tuple[int, int]
    occupations: tuple[str, ...]


def read_1m(data_dir: str) -> Ratings:
    """Reads ratings.dat, users.dat and movies.dat.

    Raises:
        ValueError: a file is missing, or one of its lines is faulty.
    """
    path = f"{data_dir}/users.dat"
    users = _read(path, "::", ("user", "gender", "age", "occupation", "zip"), ("user", "age", "occupation"))
    _refuse(users, path, "age", ~pl.col("age").is_in(AGE_BRACKETS), f"one of {', '.join(map(str, AGE_BRACKETS))}")
    _refuse(users, path, "occupation", ~pl.col("occupation").is_between(0, 20), "a number from 0 to 20")
    movies = _read(f"{data_dir}/movies.dat", "::", ("movie", "title", "genres"), ("movie",))
    movies = movies.with_columns(genre=pl.col("genres").str.split("|").list.first())
    ratings = _read(f"{data_dir}/ratings.dat", "::", *_RATING)
    names = ("users.dat", "movies.dat", "ratings.dat")
    return _join(data_dir, names, users, _numbered(movies, "genre"), ratings, OCCUPATIONS_1M)


def read_100k(data_dir: str) -> Ratings:
    """Reads u.data, u.user and u.item.

    Raises:
        ValueError: a file is missing, or one of its lines is faulty.
    """
    path = f"{data_dir}/u.user"
    users = _read(path, "|", ("user", "age", "gender", "occupation", "zip"), ("user", "age"))
    _refuse(users, path, "age", pl.col("age") < 0, "an age in years")
    _refuse(users, path, "occupation", ~pl.col("occupation").is_in(OCCUPATIONS_100K), "one of the 21 of u.occupation")
    users = users.with_columns(occupation=pl.col("occupation").replace_strict(_index(OCCUPATIONS_100K)))
    flags = tuple(f"genre {name}" for name in GENRES_100K)
    fields = ("movie", "title", "release date", "video release date", "URL", *flags)
    movies = _read(f"{data_dir}/u.item", "|", fields, ("movie", *flags))
    movies = movies.with_columns(genre=pl.concat_list(flags).list.arg_max(), genre_count=pl.lit(len(GENRES_100K)))
    ratings = _read(f"{data_dir}/u.data", "\t", *_RATING)
    return _join(data_dir, ("u.user", "u.item", "u.data"), users, movies, ratings, OCCUPATIONS_100K)


_RATING = (("user", "movie", "rating", "timestamp"), ("user", "movie", "rating", "timestamp"))


def _join(
    data_dir: str,
    names: tuple[str, str, str],
    users: pl.DataFrame,
    movies: pl.DataFrame,
    ratings: pl.DataFrame,
    occupations: tuple[str, ...],
) -> Ratings:
    users_path, movies_path, ratings_path = (f"{data_dir}/{name}" for name in names)
    _refuse(ratings, ratings_path, "rating", ~pl.col("rating").is_between(1, 5), "a number from 1 to 5")
    _refuse(users, users_path, "gender", ~pl.col("gender").is_in(GENDERS), "F or M")
    for table, path, name in ((users, users_path, "user"), (movies, movies_path, "movie")):
        _refuse(table, path, name, ~pl.col(name).is_first_distinct(), "a number that no earlier line has")
    users = _numbered(users, "zip").with_columns(
        gender=pl.col("gender").replace_strict(_index(GENDERS), return_dtype=pl.Int32),
        # a bracket starts at its age, except the first, which starts at birth
        bracket=pl.sum_horizontal(pl.col("age") >= age for age in AGE_BRACKETS[1:]).cast(pl.Int32),
    )
    joined = ratings
    for table, name, other in ((users, "user", names[0]), (movies, "movie", names[1])):
        joined = joined.join(table.with_row_index("index"), on=name, how="left", maintain_order="left")
        lost = joined["index"].is_null().arg_true()
        if len(lost):
            raise ValueError(
                f"{ratings_path}, line {lost[0] + 1}: {name} {joined[name][lost[0]]} has no row in {other}; "
                "restore the original files, all of the same data set"
            )
        joined = joined.drop(name).rename({"index": name})
    sizes = {
        "user": users.height,
        "movie": movies.height,
        "gender": len(GENDERS),
        "occupation": len(occupations),
        "zip": int(users["zip_count"][0]),
        "genre": int(movies["genre_count"][0]),
    }
    columns = ("user", "movie", "rating", "gender", "bracket", "age", "occupation", "zip", "genre")
    ages = (int(users["age"].min()), int(users["age"].max()))  # type: ignore[arg-type]
    return Ratings(joined.select(pl.col(name).cast(pl.Int32) for name in columns), sizes, ages, occupations)


def _read(path: str, separator: str, fields: tuple[str, ...], numbers: tuple[str, ...]) -> pl.DataFrame:
    try:
        with path_manager.open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); point --data_dir at the folder of the original files"
        ) from error
    # latin-1, as the titles are; and no splitlines, which also splits at characters inside them
    lines = content.decode("latin-1").replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; {_MEND}")
    text = pl.DataFrame({"line": lines})
    counts = text["line"].str.count_matches(separator, literal=True) + 1
    wrong = (counts != len(fields)).arg_true()
    if len(wrong):
        raise ValueError(
            f"{path}, line {wrong[0] + 1}: {counts[wrong[0]]} fields where {len(fields)} are expected, separated by "
            f"{separator!r}: {', '.join(fields[:5])}{', ...' if len(fields) > 5 else ''}; {_MEND}"
        )
    split = text.select(pl.col("line").str.split_exact(separator, len(fields) - 1).struct.rename_fields(list(fields)))
    table = split.unnest("line")
    parsed = table.with_columns(pl.col(name).cast(pl.Int32, strict=False) for name in numbers)
    for name in numbers:
        bad = parsed[name].is_null().arg_true()
        if len(bad):
            raise ValueError(
                f"{path}, line {bad[0] + 1}: {name} is '{table[name][bad[0]]}', which is no whole number; {_MEND}"
            )
    return parsed


def _refuse(table: pl.DataFrame, path: str, field: str, faulty: pl.Expr, wanted: str) -> None:
    bad = table.select(faulty.alias("bad"))["bad"].arg_true()
    if len(bad):
        raise ValueError(f"{path}, line {bad[0] + 1}: {field} is '{table[field][bad[0]]}', not {wanted}; {_MEND}")


def _numbered(table: pl.DataFrame, column: str) -> pl.DataFrame:
    # distinct values in ascending order become 0, 1, ...
    dense = (pl.col(column).rank("dense") - 1).cast(pl.Int32)
    return table.with_columns(dense.alias(column), pl.col(column).n_unique().alias(f"{column}_count"))


def _index(names: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}
