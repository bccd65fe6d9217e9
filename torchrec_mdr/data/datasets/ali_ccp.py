"""Ali-CCP: impressions of Taobao's recommendations, from the original files or from Scenario-Wise-Rec's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl

from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.data.datasets.published import published_defaults
from torchrec_mdr.data.datasets.raw_rows import LABEL, RawRows, lot
from torchrec_mdr.data.features import LabelPlan
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.splits import SPLIT_SEED
from torchrec_mdr.data.text_scan import LINE, Fault, is_missing, not_number, not_one_of, scan_fields, scan_table
from torchrec_mdr.storage import isfile

SCENARIO = "301"
# fields of the user's line, and of the impression's own
_COMMON = ("101", "121", "122", "124", "125", "126", "127", "128", "129", "109_14", "110_14", "127_14", "150_14")
_OWN = ("205", "206", "207", "210", "216", "508", "509", "702", "853", SCENARIO)
_COMMON_DENSE = ("109_14", "110_14", "127_14", "150_14")
_OWN_DENSE = ("508", "509", "702", "853")
_DIVISIONS = {"scenario": SCENARIO, "gender": "124", "age": "125", "occupation": "128", "geography": "129"}
_SPARSE = tuple(name for name in (*_COMMON, *_OWN) if name != SCENARIO)
_DENSE = tuple(f"D{name}" for name in (*_COMMON_DENSE, *_OWN_DENSE))
_TABLES = {"train": "train", "validation": "val", "test": "test"}
_SIZES = {
    "multilora": {
        "backbone_options.hidden": [1024, 512, 512, 256, 256, 64, 64],
        "method_options.rank": [32, 32, 32, 16, 16, 8, 8],
    }
}


@dataclass(frozen=True)
class AliCCP(Dataset):
    """Impressions on Taobao, in the protocol of MultiLoRA (section 4.1): domains by context feature 301, label click.

    The original test set is halved by lot into validation and test rows. 13 user, 5 item, 4 combination features and
    the scenario are sparse features; of a field with several values a row keeps the last, as Scenario-Wise-Rec does,
    and the numbers beside the values of 8 fields are dense features. Values of fewer than ten training rows share an
    id. Purchases without a click are left out. Divisions: scenario (301), gender (124), age (125), occupation (128),
    geography (129). 42.3 million training and 43.0 million test rows. The paper reports a total AUC of .6153 for Mix,
    .6212 for SingleLoRA and .6231 for MultiLoRA (Table 3; log loss .1626, .1601, .1587).

    Args:
        data_dir (str): folder of the files that `form` names.
        form (Literal["original", "tables"]): `original`: sample_skeleton_train.csv, common_features_train.csv and the
            same for test; `tables`: Scenario-Wise-Rec's ali_ccp_train.csv, ali_ccp_val.csv and ali_ccp_test.csv, or its
            samples, ali_ccp_train_sample.csv and so on, whose splits and ids are kept.
    """

    data_dir: str
    form: Literal["original", "tables"] = "original"

    origin: ClassVar[str] = (
        "https://tianchi.aliyun.com/dataset/408 (original) or https://github.com/Xiaopengli1/Scenario-Wise-Rec (tables)"
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        if self.form == "original":
            parts = ("train", "test")
            names = [f"{name}_{part}" for part in parts for name in ("sample_skeleton", "common_features")]
        else:
            names = [f"ali_ccp_{_TABLES[split]}" for split in SPLITS]
            if not isfile(f"{self.data_dir}/{names[0]}.csv"):
                names = [f"{name}_sample" for name in names]
        return tuple(f"{self.data_dir}/{name}.csv" for name in names)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return "scenario", "gender"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: the paper's Table 2; nothing was chosen here."""
        return published_defaults(choice, _SIZES)

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        splits = self._original() if self.form == "original" else self._tables()
        RawRows(
            splits={
                split: rows.with_columns(pl.col(field).alias(name) for name, field in _DIVISIONS.items())
                for split, rows in splits.items()
            },
            sparse=_SPARSE,
            dense=_DENSE,
            divisions=tuple(_DIVISIONS),
            min_count=10 if self.form == "original" else 1,  # the tables' ids are made so already
            scaling="range" if self.form == "original" else "none",
            raw_label=LabelPlan(LABEL, "click"),
            raw_names=_DIVISIONS,
            source={"form": self.form, "label": "click", "split": "test halved by lot", "seed": SPLIT_SEED},
        ).write(folder, "ali-ccp")

    def _tables(self) -> dict[str, pl.LazyFrame]:
        fields = ("click", *_COMMON, *_OWN, *_DENSE)
        faults = {name: not_number(name) for name in fields} | {"click": not_one_of("click", ("0", "1"))}
        splits = {}
        for split, path in zip(SPLITS, self.sources, strict=True):
            rows = scan_table(path, ",", fields).checked(faults)
            numbers = [pl.col(name).cast(pl.Float64) for name in _DENSE]
            splits[split] = rows.with_columns(pl.col("click").cast(pl.Int8).alias(LABEL), *numbers)
        return splits

    def _original(self) -> dict[str, pl.LazyFrame]:
        train = self._impressions(*self.sources[:2])
        test = self._impressions(*self.sources[2:])
        drawn = lot(pl.col(LINE), SPLIT_SEED)
        return {"train": train, "validation": test.filter(drawn < 0.5), "test": test.filter(drawn >= 0.5)}

    def _impressions(self, skeleton: str, common: str) -> pl.LazyFrame:
        """Lines of impressions joined with their users' lines, which many impressions share."""
        users = scan_fields(common, ",", ("key", "count", "features")).checked(
            {"key": is_missing("key"), "features": _no_features()}
        )
        parsed = users.select("key", *_parsed(_COMMON, _COMMON_DENSE)).unique("key", keep="first")
        table = parsed.collect(engine="streaming")
        binary = ("0", "1")
        shown = scan_fields(skeleton, ",", ("id", "click", "purchase", "key", "count", "features")).checked(
            {
                "click": not_one_of("click", binary),
                "purchase": not_one_of("purchase", binary),
                "features": _no_features(),
                "key": Fault(pl.col("key").is_in(table["key"].implode()).not_(), f"a line of {common.split('/')[-1]}"),
            }
        )
        own = shown.filter((pl.col("click") == "1") | (pl.col("purchase") == "0")).select(
            LINE, pl.col("click").cast(pl.Int8).alias(LABEL), "key", *_parsed(_OWN, _OWN_DENSE)
        )
        return own.join(table.lazy(), on="key", how="left", maintain_order="left")


def _parsed(sparse: Sequence[str], dense: Sequence[str]) -> list[pl.Expr]:
    """Fields of a text of entries field, value, number, separated as `_no_features` says; of each field the last."""
    form = "(?s)^(?:.*\x01)?{}\x02([^\x03]*)\x03([^\x01]*)"
    values = [pl.col("features").str.extract(form.format(name), 1).alias(name) for name in sparse]
    numbers = [pl.col("features").str.extract(form.format(name), 2) for name in dense]
    cast = [text.cast(pl.Float64, strict=False).alias(f"D{name}") for text, name in zip(numbers, dense, strict=True)]
    return [*values, *cast]


def _no_features() -> Fault:
    entry = "[^\x01\x02\x03]+\x02[^\x01\x02\x03]*\x03[-+.0-9eE]+"
    whole = pl.col("features").str.contains(f"^{entry}(?:\x01{entry})*$")
    return Fault(whole.not_(), "entries of a field, a value and a number, separated by \\x02, \\x03 and \\x01")
