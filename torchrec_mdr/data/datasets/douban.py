"""Douban: ratings of books, music and movies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.data.datasets.published import published_defaults
from torchrec_mdr.data.datasets.raw_rows import LABEL, Activity, RawRows
from torchrec_mdr.data.features import LabelPlan
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.splits import SPLIT_SEED, random_split
from torchrec_mdr.data.text_scan import Fault, is_missing, scan_table

KINDS = ("book", "music", "movie")
ACTIVITY = ("at most 50 ratings", "more than 50 ratings")
_ACTIVE = 50


@dataclass(frozen=True)
class Douban(Dataset):
    """Ratings of books, music and movies, in the protocol of Scenario-Wise-Rec.

    Label rating > 3, an empty rating counting as none; random 8:1:1. Features are user, item, place and joined (the
    month in which the user joined), and the domain. Divisions: kind, and activity: whether the user has more than 50
    ratings, counted among the training rows, which is this project's own. 227,251 book, 179,847 music and 1,278,401
    movie ratings by 2,212, 1,820 and 2,712 users.

    Args:
        data_dir (str): folder of bookreviews_cleaned.txt, musicreviews_cleaned.txt, moviereviews_cleaned.txt and
            users_cleaned.txt.
    """

    data_dir: str

    origin: ClassVar[str] = (
        "https://www.kaggle.com/datasets/fengzhujoey/douban-datasetratingreviewside-information (text information)"
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        files = (*(f"{kind}reviews_cleaned" for kind in KINDS), "users_cleaned")
        return tuple(f"{self.data_dir}/{name}.txt" for name in files)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return "kind", "activity"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: the papers' settings for other data; none of them publishes any for these."""
        return published_defaults(choice, {})

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        *files, users_file = self.sources
        numeric = pl.col("rating").cast(pl.Float64, strict=False)
        faults = {
            "user_id": is_missing("user_id"),
            "rating": Fault(numeric.is_null() & pl.col("rating").is_not_null(), "a number"),
        }
        parts: list[pl.LazyFrame] = []
        for kind, path in zip(KINDS, files, strict=True):
            item = f"{kind}_id"
            found = scan_table(path, "\t", ("user_id", item, "rating")).checked({**faults, item: is_missing(item)})
            parts.append(
                found.select(
                    pl.col("user_id").alias("user"),
                    pl.format("{} {}", pl.lit(kind), item).alias("item"),
                    (numeric > 3).fill_null(False).alias(LABEL),
                    pl.lit(kind).alias("kind"),
                )
            )
        ratings = pl.concat(parts).collect(engine="streaming")
        people = scan_table(users_file, "\t", ("UID", "living_place", "join_time")).checked({"UID": is_missing("UID")})
        users = people.select(
            pl.col("UID").alias("user"),
            pl.col("living_place").alias("place"),
            pl.col("join_time").str.slice(0, 7).alias("joined"),
        ).unique("user", keep="first", maintain_order=True)
        splits = random_split(ratings.height)
        joined = ratings.lazy().join(users, on="user", how="left", maintain_order="left")
        rows = joined.collect(engine="streaming")
        RawRows(
            splits={split: rows[splits[split]].lazy() for split in SPLITS},
            sparse=("user", "item", "place", "joined"),
            divisions=("kind",),
            activity=Activity("user", _ACTIVE, ACTIVITY),
            raw_label=LabelPlan(LABEL, rule="rating > 3"),
            source={"label": "rating > 3", "split": "random 80/10/10", "seed": SPLIT_SEED},
        ).write(folder, "douban")
