from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from torchrec_mdr.data.datasets.synthetic import Synthetic, Teacher, auc_by_group
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare("synthetic", cache_dir=str(tmp_path_factory.mktemp("cache")), rows=100_000)


def test_the_default_data_set(folder: str) -> None:
    schema = Schema.load(folder)
    assert schema.rows == {"train": 80_000, "validation": 10_000, "test": 10_000}
    assert [(division.name, division.num_domains) for division in schema.divisions] == [
        ("scenario", 20),
        ("segment", 3),
    ]
    for split in SPLITS:
        table = pq.read_table(f"{folder}/{split}.parquet")
        assert table.num_rows == schema.rows[split]
        for feature in schema.sparse_features:
            ids = table[feature.name].to_numpy()
            assert ids.min() >= 0 and ids.max() < feature.num_embeddings
        assert set(table["label"].to_numpy()) == {0, 1}
        assert table["domain_scenario"].equals(table["scenario"])
        assert table["domain_segment"].equals(table["segment"])


def test_the_same_options_give_the_same_files(tmp_path: Path) -> None:
    first, second, other = (
        prepare("synthetic", output=str(tmp_path / name), rows=2000, seed=seed)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    for split in SPLITS:
        read = [Path(f"{folder}/{split}.parquet").read_bytes() for folder in (first, second, other)]
        assert read[0] == read[1] != read[2]


def test_splits_and_chunks_hold_different_rows(tmp_path: Path) -> None:
    folder = prepare("synthetic", cache_dir=str(tmp_path), rows=180_000)
    prices = np.concatenate([pq.read_table(f"{folder}/{split}.parquet")["dense_0"].to_numpy() for split in SPLITS])
    assert len(np.unique(prices)) > 0.98 * len(prices)


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.5])
def test_domain_sizes_follow_zipfs_law(skew: float) -> None:
    columns, _ = Teacher(Synthetic(num_domains=10, skew=skew)).chunk([1], 60_000)
    share = np.bincount(columns["scenario"], minlength=10) / 60_000
    expected = np.arange(1, 11) ** -skew
    expected /= expected.sum()
    assert np.abs(share - expected).max() < 4 * (expected.max() * (1 - expected.max()) / 60_000) ** 0.5


def test_labels_are_drawn_with_the_teachers_probabilities() -> None:
    columns, logits = Teacher(Synthetic()).chunk([1], 200_000)
    expected = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for bin_ in range(10):
        chosen = (expected * 10).astype(int) == bin_
        error = columns["label"][chosen].mean() - expected[chosen].mean()
        assert abs(error) < 5 * 0.5 / chosen.sum() ** 0.5


def test_the_logit_is_the_sum_of_its_parts_row_by_row() -> None:
    config = Synthetic(num_domains=5, rank=3, domain_scale=1.0, shared_scale=0.0, auxiliary_scale=0.0)
    teacher = Teacher(config)
    columns, logits = teacher.chunk([7], 4000)
    part = np.empty(4000)
    for row in range(4000):
        latents = [table[columns[f"sparse_{i}"][row]] for i, table in enumerate(teacher._latents)]
        x = np.concatenate([*latents, [columns[f"dense_{i}"][row] for i in range(config.num_dense_features)]])
        domain = columns["scenario"][row]
        directions, signs = teacher._scenario._directions[domain], teacher._scenario._signs[domain]
        part[row] = sum(signs[j] * np.tanh(2 * directions[j] @ x) for j in range(3))
    rest = logits - part / part.std()
    for domain in range(5):
        # what remains is one constant a domain, up to the scale's estimate
        assert rest[columns["scenario"] == domain].std() < 0.05
    assert logits.std() > 0.9


def test_each_part_has_the_asked_deviation() -> None:
    for name in ("shared_scale", "domain_scale", "auxiliary_scale"):
        scales = dict.fromkeys(("shared_scale", "domain_scale", "auxiliary_scale"), 0.0) | {name: 2.0}
        columns, logits = Teacher(Synthetic(num_domains=1, **scales)).chunk([1], 20_000)
        assert abs(logits.std() - 2) < 0.1


def test_the_teachers_auc_is_known_and_above_chance_in_every_domain(folder: str) -> None:
    teacher_auc = Schema.load(folder).source["teacher_auc"]
    assert 0.8 < teacher_auc["test"] < 0.95
    assert len(teacher_auc["test_domains"]) == 20
    assert min(teacher_auc["test_domains"]) > 0.75


def test_the_teachers_auc_needs_the_domain() -> None:
    columns, logits = Teacher(Synthetic()).chunk([1], 50_000)
    label, scenario = columns["label"], columns["scenario"]
    shifted = Teacher(Synthetic())
    parts = shifted._draw(np.random.default_rng([1]), 50_000)
    shared = shifted._parts(parts[4], scenario, columns["segment"])[0]
    assert roc_auc_score(label, logits) - roc_auc_score(label, shared) > 0.1


def test_auc_by_group_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.standard_normal(3000).astype(np.float32), rng.integers(0, 7, 3000)
    labels = (rng.random(3000) < 0.3).astype(np.float32)
    labels[groups == 5] = 1
    groups[groups == 6] = 0
    found = auc_by_group(scores, labels, groups, 7)
    for group in range(5):
        chosen = groups == group
        assert found[group] == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]), abs=1e-12)
    assert np.isnan(found[5]) and np.isnan(found[6])


def test_a_thousand_domains(tmp_path: Path) -> None:
    folder = prepare("synthetic", cache_dir=str(tmp_path), rows=150_000, num_domains=1000, num_embeddings=10, skew=0.5)
    schema = Schema.load(folder)
    assert schema.divisions[0].num_domains == 1000
    domains = pq.read_table(f"{folder}/train.parquet")["domain_scenario"].to_numpy()
    assert len(np.unique(domains)) == 1000
    finite = [value for value in schema.source["teacher_auc"]["test_domains"] if value is not None]
    assert len(finite) > 900 and np.mean(finite) > 0.75


def test_the_other_division_can_be_the_natural_one(tmp_path: Path) -> None:
    folder = prepare("synthetic", division="segment", cache_dir=str(tmp_path), rows=1000)
    schema = Schema.load(folder)
    assert [division.name for division in schema.divisions] == ["segment", "scenario"]
    assert len(schema.source["teacher_auc"]["test_domains"]) == 3


@pytest.mark.parametrize("rows", [1, 9])
def test_splits_may_be_empty(tmp_path: Path, rows: int) -> None:
    folder = prepare("synthetic", cache_dir=str(tmp_path), rows=rows)
    assert sum(pq.read_metadata(f"{folder}/{split}.parquet").num_rows for split in SPLITS) == rows


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rows", 0, "synthetic data need rows >= 1, not 0"),
        ("num_domains", 0, "synthetic data need num_domains >= 1, not 0"),
        ("skew", float("nan"), "synthetic data need skew >= 0, not nan"),
        ("division", "age", "synthetic data have no division 'age'; choose scenario or segment"),
    ],
)
def test_impossible_options_are_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**{option: value})  # type: ignore[arg-type]
