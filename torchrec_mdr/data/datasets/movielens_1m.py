"""MovieLens-1M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from torchrec_mdr.data.datasets.movielens import AGE_BRACKETS, MovieLens
from torchrec_mdr.data.text_table import read_text_table, refuse_rows


@dataclass(frozen=True)
class MovieLens1M(MovieLens):
    """MovieLens-1M: 1,000,209 ratings by 6,040 users.

    Args:
        data_dir (str): folder of ratings.dat, users.dat and movies.dat.
        protocol (str): see :class:`MovieLens`.
        division (str): see :class:`MovieLens`.

    Raises:
        ValueError: an unknown protocol or division.
    """

    NAME: ClassVar[str] = "movielens-1m"
    FILES: ClassVar[tuple[str, str, str]] = ("ratings.dat", "users.dat", "movies.dat")
    SEPARATOR: ClassVar[str] = "::"
    OCCUPATIONS: ClassVar[tuple[str, ...]] = (
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

    def _users(self, path: str) -> pl.DataFrame:
        fields = ("user", "gender", "age", "occupation", "zip")
        users = read_text_table(path, self.SEPARATOR, fields, ("user", "age", "occupation"))
        brackets = f"one of {', '.join(map(str, AGE_BRACKETS))}"
        refuse_rows(users, path, "age", ~pl.col("age").is_in(AGE_BRACKETS), brackets)
        refuse_rows(users, path, "occupation", ~pl.col("occupation").is_between(0, 20), "a number from 0 to 20")
        return users

    def _movies(self, path: str) -> pl.DataFrame:
        movies = read_text_table(path, self.SEPARATOR, ("movie", "title", "genres"), ("movie",))
        return movies.with_columns(genre=pl.col("genres").str.split("|").list.first())
