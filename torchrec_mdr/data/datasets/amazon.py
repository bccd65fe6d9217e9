"""What the Amazon data sets share: reviews of products, one file a category (McAuley's 5-core files)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import ClassVar

import polars as pl

from torchrec_mdr.data.datasets.base import Dataset
from torchrec_mdr.data.datasets.raw_rows import LABEL, Activity, RawRows
from torchrec_mdr.data.features import LabelPlan
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.text_scan import Fault, is_missing, not_number, scan_json
from torchrec_mdr.storage import isfile

_FIELDS = {"reviewerID": "user", "asin": "item", "overall": "rating", "unixReviewTime": "time"}
RAW_NAMES = {name: field for field, name in _FIELDS.items()}
ACTIVITY = ("few reviews", "many reviews")


@dataclass(frozen=True)
class Amazon(Dataset):
    """Reviews of products by category.

    Args:
        data_dir (str): folder of the files, one a category, as they come (.json.gz) or unpacked (.json).
    """

    data_dir: str

    NAME: ClassVar[str]
    PREFIX: ClassVar[str] = ""  # of a category's file
    origin: ClassVar[str] = ""

    @property
    def stems(self) -> Sequence[str]:
        """The categories, as in their files' names, in the order of the domains."""
        raise NotImplementedError

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        plain = [f"{self.data_dir}/{self.PREFIX}{stem}_5.json" for stem in self.stems]
        return tuple(path if isfile(path) else f"{path}.gz" for path in plain)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return "category", "activity"

    def _reviews(self) -> tuple[pl.DataFrame, int]:
        """Reviews in file order, with user, item, rating, time (seconds) and category, and how many were dropped.

        A review of the same user, item, rating and time as an earlier line of its file is the same review, listed under
        another variant of the product; it is dropped.
        """
        faults = {
            "overall": Fault(pl.col("overall").cast(pl.Float64, strict=False).is_between(1, 5).not_(), "1 to 5"),
            "reviewerID": is_missing("reviewerID"),
            "asin": is_missing("asin"),
            "unixReviewTime": not_number("unixReviewTime"),
        }
        parts = []
        for stem, path in zip(self.stems, self.sources, strict=True):
            found = scan_json(path, tuple(_FIELDS)).checked(faults).select(tuple(_FIELDS)).rename(_FIELDS)
            numbers = (pl.col("rating").cast(pl.Float64), pl.col("time").cast(pl.Float64).cast(pl.Int64))
            parts.append(found.with_columns(*numbers, category=pl.lit(stem)).collect(engine="streaming"))
        rows = pl.concat(parts)
        unique = rows.unique(maintain_order=True)
        return unique, rows.height - unique.height

    def _write_by_time(self, folder: str, rule: str, cuts: tuple[int, int] | None, active: int) -> None:
        """Writes reviews, split by their time.

        Args:
            folder (str): where to.
            rule (str): what the rating, `overall`, of positive reviews is, such as `> 3`.
            cuts (tuple[int, int] | None): seconds at which validation and test rows start; None takes those of the
                review after 80 and after 90 % of all. Reviews of one second are never in two splits.
            active (int): a user with more reviews than this among the training rows writes many.
        """
        reviews, dropped = self._reviews()
        if cuts is None:
            times = reviews["time"].sort()
            cuts = times[int(0.8 * len(times))], times[int(0.9 * len(times))]
        reviews = reviews.sort("time", maintain_order=True)
        part = pl.sum_horizontal(pl.col("time") >= cut for cut in cuts)
        rows = reviews.with_columns(pl.sql_expr(f"rating {rule}").alias(LABEL))
        RawRows(
            splits={split: rows.filter(part == i).lazy() for i, split in enumerate(SPLITS)},
            sparse=("user", "item"),
            divisions=("category",),
            activity=Activity("user", active, ACTIVITY),
            raw_label=LabelPlan(LABEL, rule=f"overall {rule}"),
            raw_names=RAW_NAMES,
            source={
                "split": f"by time: validation from {_day(cuts[0])}, test from {_day(cuts[1])}",
                "duplicates_dropped": dropped,
                "activity": f"more than {active} reviews among the training rows",
            },
        ).write(folder, self.NAME)


def seconds(day: date) -> int:
    """Seconds from 1970 to the start of a day, UTC."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _day(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).date().isoformat()
