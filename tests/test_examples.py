"""The example of a domain that comes later, on synthetic data whose division takes the place of the age groups."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from tests.helpers import load_example
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.prepare import prepare

SMALL = ["--batch_size=256", "--backbone_options.hidden=[8,4]", "--stages.pretrain.epochs=1", "--stages.adapt.epochs=1"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("new_domain")


@pytest.fixture(scope="module")
def by_age(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Synthetic data with four domains, called age, the last of which has an item of its own."""
    folder = Path(prepare("synthetic", output=str(tmp_path_factory.mktemp("age") / "data"), rows=4000, num_domains=4))
    schema = Schema.load(str(folder))
    natural = replace(schema.divisions[0], name="age")
    item = schema.sparse_features[0]
    for split in SPLITS:
        frame = pl.read_parquet(folder / f"{split}.parquet").rename({"domain_scenario": "domain_age"})
        own = pl.when(pl.col("domain_age") == 3).then(0).otherwise(pl.max_horizontal(item.name, pl.lit(1)))
        frame.with_columns(own.cast(pl.Int32).alias(item.name)).write_parquet(folder / f"{split}.parquet")
    replace(schema, divisions=(natural, *schema.divisions[1:])).save(str(folder))
    return str(folder)


def test_newcomers_ids_come_last_and_the_old_data_lack_them(example: ModuleType, by_age: str, tmp_path: Path) -> None:
    everyone, old = example.write_data(by_age, tmp_path)
    before, whole, part = Schema.load(by_age), Schema.load(str(everyone)), Schema.load(str(old))
    assert part.division("age").num_domains == 3 and whole.division("age").num_domains == 4
    first = before.sparse_features[0].name
    for split in SPLITS:
        source = pl.read_parquet(f"{by_age}/{split}.parquet")
        mapped, kept = (pl.read_parquet(f"{folder}/{split}.parquet") for folder in (everyone, old))
        assert kept.equals(mapped.filter(pl.col("domain_age") < 3)) and len(kept) == part.rows[split]
        for feature in before.sparse_features:  # one id for one id
            pairs = pl.DataFrame({"old": source[feature.name], "new": mapped[feature.name]}).unique()
            assert pairs["old"].n_unique() == pairs["new"].n_unique() == len(pairs)
        assert set(mapped.filter(pl.col("domain_age") == 3)[first]) == {whole.sparse_features[0].num_embeddings - 1}
        assert kept[first].max() < part.sparse_features[0].num_embeddings == whole.sparse_features[0].num_embeddings - 1


@pytest.mark.full
def test_it_runs_and_writes_its_table(
    example: ModuleType,
    by_age: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example.write_data(by_age, tmp_path / "data")
    arguments = ["new_domain.py", "--data_dir=none", f"--output_dir={tmp_path}", "--seeds", "0", "--", *SMALL]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    (figures,) = json.loads((tmp_path / "new_domain.json").read_text())["results"]
    assert list(figures) == ["backbone", "new adapter", "retrained"]
    added, again = figures["new adapter"], figures["retrained"]
    assert 0 < added["parameters written"] < again["parameters written"]
    assert 0 < added["seconds"] and 0.3 < again["new domain's AUC"] < 1
    # old adapters are untouched, and the backbone is what it was
    old = json.loads((tmp_path / "old-0" / "metrics.json").read_text())["test"]["domains"]
    new = json.loads((tmp_path / "added-0" / "metrics.json").read_text())["test"]["domains"]
    assert all(new[name]["auc"] == pytest.approx(domain["auc"], abs=1e-6) for name, domain in old.items())
    assert "retrained" in capsys.readouterr().out and "retrained" in (tmp_path / "new_domain.md").read_text()
