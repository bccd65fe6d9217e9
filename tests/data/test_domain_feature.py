"""Whether the domain is among the features, and whether labels can be learned from."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.data import own
from torchrec_mdr.data.domain_feature import domain_feature
from torchrec_mdr.data.labels import check_labels
from torchrec_mdr.data.schema import SPLITS, Schema


def rewrite(folder: Path, split: str, **columns: pl.Expr) -> None:
    path = folder / f"{split}.parquet"
    pl.read_parquet(path).with_columns(**columns).write_parquet(path)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (pl.col("domain_shop"), "item"),
        (11 - 3 * pl.col("domain_shop"), "item"),  # under other ids
        (pl.col("domain_shop").clip(upper_bound=1), None),  # two domains with one id
        (pl.col("domain_shop") + 3 * (pl.col("user") % 2), None),  # domains with two ids each
        (pl.col("domain_shop") + 3 * (pl.col("domain_shop") == 2) * (pl.col("user") % 2), "item"),  # a pool of ids
    ],
)
def test_the_domain_is_known_by_its_values(tmp_path: Path, item: pl.Expr, found: str | None) -> None:
    own.write(tmp_path / "mine")
    for split in SPLITS:
        rewrite(tmp_path / "mine", split, item=item.cast(pl.Int32))
    folder = str(tmp_path / "mine")
    assert domain_feature(folder, Schema.load(folder), "shop") == found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_of_one_class_are_refused_where_they_are_learned_from(
    tmp_path: Path, split: str, label: float, caplog: pytest.LogCaptureFixture
) -> None:
    own.write(tmp_path / "mine")
    folder = str(tmp_path / "mine")
    check_labels(folder, Schema.load(folder))
    rewrite(tmp_path / "mine", split, label=pl.lit(label, dtype=pl.Float32))
    words = f"all labels ('label') of split '{split}' are {label:g}"
    if split == "test":
        check_labels(folder, Schema.load(folder))
        assert words in caplog.text
        return
    with pytest.raises(ValueError) as error:
        check_labels(folder, Schema.load(folder))
    assert words in str(error.value) and "split the rows anew" in str(error.value)
