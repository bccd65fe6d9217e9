"""Taobao theme clicks (Cloud Theme): clicks of users on items within themes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import polars as pl

from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.data.datasets.negatives import sampled_rows
from torchrec_mdr.data.datasets.published import published_defaults
from torchrec_mdr.data.datasets.raw_rows import RawRows
from torchrec_mdr.data.text_scan import Fault, header, is_missing, scan_table

WIDTH = 128  # numbers that the data set publishes for each user and item
_SIZES = {"mlora": {"embeddings.dim": 128, "method_options.alpha": 256}}


@dataclass(frozen=True)
class TaobaoThemes(Dataset):
    """Clicks within themes of Taobao's front page, in the protocol of MLoRA and MoE-MLoRA, which take it from MAMDR.

    The first themes to appear in the log are the domains. Clicks of users and items that have published vectors are
    positive rows, each once; negatives are sampled, see `sampled_rows`; 60/20/20 within each theme and label. MoE-MLoRA
    reports WAUC, averaged over eight backbones, of .7469 (base), .7445 (MLoRA) and .7589 (MoE-MLoRA) for 10 themes, and
    .7736, .7712 and .7857 for 20 (Table 1). Settings of recipe `paper` are those of MLoRA's `config/Taobao_10`.

    Args:
        data_dir (str): folder of theme_click_log.csv, user_embedding.csv and item_embedding.csv.
        themes (int): number of themes: 10, 20 and 30 in the papers.
        vectors (bool): whether the published vectors of user and item, 128 numbers each, are dense features in place of
            the ids, as in the papers, where they are frozen.

    Raises:
        ValueError: fewer than two themes.
    """

    data_dir: str
    themes: int = 10
    vectors: bool = True

    origin: ClassVar[str] = "https://tianchi.aliyun.com/dataset/9716"

    def __post_init__(self) -> None:
        if self.themes < 2:
            raise ValueError(f"taobao-themes needs themes of at least 2, not {self.themes}")

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        names = ("theme_click_log.csv", "user_embedding.csv", "item_embedding.csv")
        return tuple(f"{self.data_dir}/{name}" for name in names)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return ("theme",)

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: MLoRA's settings; nothing was chosen here."""
        return published_defaults(choice, _SIZES)

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        log, users, items = self.sources
        fields = {"user_id": "user", "item_id": "item", "theme_id": "theme"}
        scan = scan_table(log, ",", tuple(fields))
        clicks = scan.checked({name: is_missing(name) for name in fields}).select(tuple(fields)).rename(fields)
        found = clicks.select(pl.col("theme").unique(maintain_order=True)).collect(engine="streaming")["theme"]
        themes = found.head(self.themes).to_list()
        if len(themes) < self.themes:
            raise ValueError(
                f"{log} has {len(themes)} themes, not {self.themes}; set --dataset_options.themes to fewer"
            )
        vectors = {"user": self._vectors(users, "user"), "item": self._vectors(items, "item")}
        rows = clicks.filter(pl.col("theme").is_in(themes))
        for name, table in vectors.items():
            rows = rows.join(table.select(name).lazy(), on=name, how="semi", maintain_order="left")
        distinct = rows.unique(maintain_order=True).collect(engine="streaming")
        raw = sampled_rows(distinct, "theme", themes, {"themes": self.themes, "vectors": self.vectors})
        (self._with_vectors(raw, vectors) if self.vectors else raw).write(folder, "taobao-themes")

    def _vectors(self, path: str, name: str) -> pl.DataFrame:
        """A file of ids and texts of WIDTH numbers, whatever its header, as a column `name` and WIDTH more."""
        key, text = (header(path, ",") + ["", ""])[:2]
        numbers = pl.col(text).str.split(" ").list.eval(pl.element().cast(pl.Float32, strict=False))
        good = (numbers.list.len() == WIDTH) & numbers.list.eval(pl.element().is_null()).list.any().not_()
        faults = {key: is_missing(key), text: Fault(good.not_(), f"{WIDTH} numbers with blanks between them")}
        table = scan_table(path, ",", (key, text)).checked(faults)
        names = [f"{name}_{i}" for i in range(WIDTH)]
        split = table.select(pl.col(key).alias(name), numbers.list.to_struct(fields=names).alias("vector"))
        return split.unnest("vector").unique(name, keep="first", maintain_order=True).collect(engine="streaming")

    def _with_vectors(self, raw: RawRows, vectors: dict[str, pl.DataFrame]) -> RawRows:
        splits = dict(raw.splits)
        for split, rows in splits.items():
            for name, table in vectors.items():
                rows = rows.join(table.lazy(), on=name, how="left", maintain_order="left")
            splits[split] = rows
        dense = tuple(f"{name}_{i}" for name in vectors for i in range(WIDTH))
        return replace(raw, splits=splits, sparse=(), dense=dense, scaling="none")
