"""Criteo's display advertising logs, for throughput."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.data.datasets.raw_rows import LABEL, RawRows, lot
from torchrec_mdr.data.features import LabelPlan
from torchrec_mdr.data.splits import SPLIT_SEED
from torchrec_mdr.data.text_scan import TextScan, not_one_of, scan_fields

_INTEGERS = tuple(f"I{i}" for i in range(1, 14))
_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
FEW_VALUES = ("C9", "C6", "C14", "C17", "C20", "C22", "C23")  # 3 to 27 values in the Kaggle file


@dataclass(frozen=True)
class Criteo(Dataset):
    """Clicks on ads with 13 numbers and 26 categories, in the form of the Kaggle challenge and of the terabyte's days.

    The data have no domains of their own: a category of few values takes their place, so that speed can be measured on
    rows of real width and skew. What adapters gain here says nothing. The first six sevenths of the rows train, the
    last seventh is halved by lot, as is customary for seven days. Numbers become log(1 + max(x, 0)); values of fewer
    than `min_count` training rows share an id with missing ones. The Kaggle file has 45,840,617 rows. No paper reports
    multi-domain figures.

    Args:
        data_dir (str): folder of the files.
        files (str): the files in their order, with commas between them, plain or gz: train.txt, or day_0,day_1,...
        division (str): the category that stands for domains, one of FEW_VALUES; the others can be auxiliary.
        min_count (int): see above.
        min_rows (int): domains of fewer training rows become one, `rare`.

    Raises:
        ValueError: a category of many values, or a count below 1.
    """

    data_dir: str
    files: str = "train.txt"
    division: str = "C9"
    min_count: int = 10
    min_rows: int = 1000

    origin: ClassVar[str] = "https://huggingface.co/datasets/criteo (Kaggle challenge: train.txt)"

    def __post_init__(self) -> None:
        if self.division not in FEW_VALUES:
            raise ValueError(f"criteo has no division '{self.division}'; choose one of {', '.join(FEW_VALUES)}")
        for name in ("min_count", "min_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"criteo needs {name} of at least 1, not {getattr(self, name)}")

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        return tuple(f"{self.data_dir}/{name.strip()}" for name in self.files.split(","))

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return FEW_VALUES[:2]

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: batches and layers that are customary for these data, whatever the recipe."""
        return {"batch_size": 4096, "embeddings.dim": 16, "backbone_options.hidden": [512, 256]}

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        rows = pl.concat([self._rows(path) for path in self.sources]).with_row_index("row")
        total = rows.select(pl.len()).collect(engine="streaming").item()
        last = pl.col("row") >= total - total // 7
        drawn = lot(pl.col("row"), SPLIT_SEED)
        order = (self.division, *(name for name in FEW_VALUES if name != self.division))
        RawRows(
            splits={
                "train": rows.filter(last.not_()),
                "validation": rows.filter(last & (drawn < 0.5)),
                "test": rows.filter(last & (drawn >= 0.5)),
            },
            sparse=_CATEGORIES,
            dense=_INTEGERS,
            divisions=order,
            min_count=self.min_count,
            min_rows=self.min_rows,
            scaling="log1p",
            raw_label=LabelPlan(LABEL, "click"),
            source={"split": "the last seventh, halved by lot", "seed": SPLIT_SEED, "files": self.files},
        ).write(folder, "criteo")

    def _rows(self, path: str) -> pl.LazyFrame:
        fields = ("click", *_INTEGERS, *_CATEGORIES)
        scan: TextScan = scan_fields(path, "\t", fields)
        rows = scan.checked({"click": not_one_of("click", ("0", "1"))})
        numbers = [pl.col(name).cast(pl.Float64) for name in _INTEGERS]
        return rows.select(pl.col("click").cast(pl.Int8).alias(LABEL), *numbers, *_CATEGORIES)
