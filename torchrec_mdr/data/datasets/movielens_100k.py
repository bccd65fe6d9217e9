"""MovieLens-100k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from torchrec_mdr.data.datasets.movielens import MovieLens
from torchrec_mdr.data.text_table import read_text_table, refuse_rows


@dataclass(frozen=True)
class MovieLens100K(MovieLens):
    """MovieLens-100k: 100,000 ratings by 943 users, whose ages are put into the brackets of MovieLens-1M.

    Args:
        data_dir (str): folder of u.data, u.user and u.item.
        protocol (str): see :class:`MovieLens`.
        division (str): see :class:`MovieLens`.

    Raises:
        ValueError: an unknown protocol or division.
    """

    NAME: ClassVar[str] = "movielens-100k"
    FILES: ClassVar[tuple[str, str, str]] = ("u.data", "u.user", "u.item")
    SEPARATOR: ClassVar[str] = "\t"
    OCCUPATIONS: ClassVar[tuple[str, ...]] = (
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

    GENRES: ClassVar[tuple[str, ...]] = (
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

    def _users(self, path: str) -> pl.DataFrame:
        users = read_text_table(path, "|", ("user", "age", "gender", "occupation", "zip"), ("user", "age"))
        refuse_rows(users, path, "age", pl.col("age") < 0, "an age in years")
        unknown = ~pl.col("occupation").is_in(self.OCCUPATIONS)
        refuse_rows(users, path, "occupation", unknown, "one of the 21 of u.occupation")
        numbers = {name: i for i, name in enumerate(self.OCCUPATIONS)}
        return users.with_columns(occupation=pl.col("occupation").replace_strict(numbers))

    def _movies(self, path: str) -> pl.DataFrame:
        flags = [f"genre {name}" for name in self.GENRES]
        fields = ("movie", "title", "release date", "video release date", "URL", *flags)
        movies = read_text_table(path, "|", fields, ("movie", *flags))
        return movies.with_columns(genre=pl.lit(pl.Series(self.GENRES)).gather(pl.concat_list(flags).list.arg_max()))
