"""The study's data, grid and picture belong together."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from torchrec_mdr.compare.grid import read_grid
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.report.gain_study import BLIND, MIDDLE, POINTS, RANKS, Point, draw, gain_table, gains
from torchrec_mdr.report.rule_of_thumb import rule_of_thumb

GRID = Path(__file__).resolve().parents[2] / "examples" / "when_it_pays.yaml"


def test_the_grid_names_the_data_sets_and_ranks() -> None:
    cells = read_grid(str(GRID)).cells
    assert len(cells) == 72
    names = {Path(cell.options["dataset"]).name for cell in cells}
    assert names == {point.name + end for point in POINTS for end in ("", BLIND)}
    ranks = {cell.options["method_options.rank"] for cell in cells if "method_options.rank" in cell.options}
    assert ranks == set(RANKS)
    assert {cell.variant for cell in cells if cell.options["dataset"].endswith(BLIND)} == {"mix"}


def test_blind_data_are_the_same_rows_without_the_domain_as_a_feature(tmp_path: Path) -> None:
    point = Point(domains=3, rows=40)
    for name, dataset in (("seen", point.dataset()), ("blind", point.blind_dataset())):
        (tmp_path / name).mkdir()
        dataset.write(str(tmp_path / name))
    seen, blind = (pl.read_parquet(tmp_path / name / "train.parquet") for name in ("seen", "blind"))
    assert set(seen.columns) - set(blind.columns) == {"scenario", "segment"}
    assert blind.equals(seen.select(blind.columns)) and "domain_scenario" in blind.columns
    features = {feature.name for feature in Schema.load(str(tmp_path / "blind")).sparse_features}
    assert not features & {"scenario", "segment"}


def test_gains_are_paired_by_seed_and_drawn(tmp_path: Path) -> None:
    lines = [
        {"dataset": MIDDLE.name + end, "variant": variant, "seed": seed, "status": "finished"}
        | {"auc": auc + 0.01 * seed, "backbone_auc": backbone}
        for seed in (0, 1)
        for end, variant, auc, backbone in (
            (BLIND, "mix", 0.7, None),
            ("", "mlora", 0.75, 0.73),
            ("", "rank-4", 0.76, 0.73),
        )
    ]
    lines.append({"dataset": MIDDLE.name, "variant": "star", "seed": 2, "status": "finished", "auc": 0.9})
    runs = pl.DataFrame(lines, infer_schema_length=None)
    found = gains(runs, MIDDLE)
    assert found["mlora"].values == pytest.approx((0.05, 0.05)) and "star" not in found
    assert found["domain as a feature"].values == pytest.approx((0.03, 0.02))
    assert "+.050 (+.050 to +.050)" in gain_table(runs)
    draw(runs, str(tmp_path / "picture.svg"))
    assert (tmp_path / "picture.svg").stat().st_size > 1000


def test_the_rule_of_thumb_goes_by_the_rows_that_a_typical_row_lies_among() -> None:
    nothing, some, much = (
        rule_of_thumb([50] * 400),
        rule_of_thumb([300] * 30),
        rule_of_thumb([5_000, 4_000, *[10] * 50]),
    )
    assert "gained nothing" in nothing and "400 of them with fewer than 100" in nothing
    assert "gained .01 of AUC" in some and "of 300 or more" in some
    assert "gained .02 of AUC" in much and "52 domains, 50 of them" in much and "of 5,000 or more" in much
    assert "gained nothing" in rule_of_thumb([400, 400, 400])  # too few in all
    assert "one domain" in rule_of_thumb([7, 0])
