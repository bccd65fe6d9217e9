"""KuaiRand-Pure: short videos shown in the tabs of an app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.data.datasets.published import published_defaults
from torchrec_mdr.data.datasets.raw_rows import LABEL, RawRows, lot
from torchrec_mdr.data.features import LabelPlan
from torchrec_mdr.data.splits import SPLIT_SEED
from torchrec_mdr.data.text_scan import LINE, Fault, TextScan, is_missing, not_number, not_one_of, scan_table

_LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
_DENSE = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_USER = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_VIDEO = ("video_type", "visible_status", "server_width", "server_height")
TABS = ("0", "1", "2", "4", "6")


@dataclass(frozen=True)
class KuaiRandPure(Dataset):
    """Videos shown by the app's standard policies; domains are the tabs 0, 1, 2, 4 and 6, as in Scenario-Wise-Rec.

    Label is_click; 80/10/10 by lot. Features are user, video, 26 of the user and 4 of the video, 4 dense ones and the
    domain. Divisions: tab, and user_active_degree. The released logs of all policies have 1,436,609 rows.
    Scenario-Wise-Rec works on KuaiRand-1K, of the same form, so its figures are of other rows.

    Args:
        data_dir (str): folder of log_standard_4_08_to_4_21_pure.csv, log_standard_4_22_to_5_08_pure.csv,
            user_features_pure.csv and video_features_basic_pure.csv.
        tabs (str): tabs to keep, with commas between them.

    Raises:
        ValueError: no tab.
    """

    data_dir: str
    tabs: str = ",".join(TABS)

    origin: ClassVar[str] = "https://kuairand.com (KuaiRand-Pure, folder data)"

    def __post_init__(self) -> None:
        if not all(tab.strip().isdecimal() for tab in self.tabs.split(",")):
            raise ValueError(f"kuairand-pure needs tabs as numbers with commas between them, not '{self.tabs}'")

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        names = (*_LOGS, "user_features_pure.csv", "video_features_basic_pure.csv")
        return tuple(f"{self.data_dir}/{name}" for name in names)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return "tab", "user_active_degree"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: the papers' settings for other data; none of them publishes any for these."""
        return published_defaults(choice, {})

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        *logs, users_file, videos_file = self.sources
        fields = ("user_id", "video_id", "is_click", "tab")
        faults = {name: is_missing(name) for name in fields} | {"is_click": not_one_of("is_click", ("0", "1"))}
        tabs = [tab.strip() for tab in self.tabs.split(",")]
        shown = pl.concat([scan_table(path, ",", fields).checked(faults).select(fields) for path in logs])
        users = _table(scan_table(users_file, ",", ("user_id", *_USER, *_DENSE)), "user_id", _DENSE)
        videos = _table(scan_table(videos_file, ",", ("video_id", *_VIDEO)), "video_id", ())
        # rows of users or videos without features are left out, as Scenario-Wise-Rec does
        rows = (
            shown.filter(pl.col("tab").is_in(tabs))
            .with_columns(pl.col("is_click").cast(pl.Int8).alias(LABEL))
            .join(users, on="user_id", how="inner", maintain_order="left")
            .join(videos, on="video_id", how="inner", maintain_order="left")
            .with_row_index("row")
        )
        drawn = lot(pl.col("row"), SPLIT_SEED)
        parts = {"train": drawn < 0.8, "validation": drawn.is_between(0.8, 0.9, closed="left"), "test": drawn >= 0.9}
        RawRows(
            splits={split: rows.filter(part) for split, part in parts.items()},
            sparse=("user_id", "video_id", *_USER, *_VIDEO),
            dense=_DENSE,
            divisions=("tab", "user_active_degree"),
            raw_label=LabelPlan(LABEL, "is_click"),
            source={"label": "is_click", "split": "80/10/10 by lot", "seed": SPLIT_SEED, "tabs": tabs},
        ).write(folder, "kuairand-pure")


def _table(scan: TextScan, key: str, numbers: tuple[str, ...]) -> pl.LazyFrame:
    """Features by a key, each key once."""
    faults: dict[str, Fault] = {name: not_number(name) for name in numbers}
    rows = scan.checked({key: is_missing(key), **faults}).select(pl.exclude(LINE))
    return (
        rows.with_columns(pl.col(name).cast(pl.Float64) for name in numbers)
        .unique(key, keep="first")
        .collect(engine="streaming")
        .lazy()
    )
