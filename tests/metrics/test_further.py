"""Metrics beside those that every evaluation has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.metrics.rows import NAMES, compute, label_places, make_rows
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.registry import METRICS
from torchrec_mdr.train import main

FOREIGN = '''
from torchrec_mdr.metrics import group_sums

class Rate:
    """Share of positive rows."""
    def __call__(self, logits, labels, groups, num_groups):
        ones = group_sums(logits.new_ones(len(logits)), groups, num_groups)
        return group_sums(labels.double(), groups, num_groups) / ones

rate = Rate()
'''


def test_they_stand_beside_auc_and_log_loss_in_metrics_json() -> None:
    written = json.loads(json.dumps(compute(make_rows(300), metrics={"places": label_places}).to_dict()))
    assert list(written) == ["auc", "wauc", "logloss", "rows", "ne", "calibration", "places", "domains"]
    assert list(written["domains"]["a"]) == ["auc", "logloss", "rows", "ne", "calibration", "places"]


def test_they_see_one_order_of_the_rows() -> None:
    rows = make_rows(2000, decimals=0)
    expected = compute(rows, metrics={"places": label_places})
    for seed in range(3):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
        logits, labels, domain_ids = (column[order] for column in rows)
        shuffled = compute((logits, labels, domain_ids), batch=97, metrics={"places": label_places})
        assert shuffled == expected


def test_they_see_sorted_rows_of_all_groups() -> None:
    seen: list[int] = []

    def look(logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
        rows = list(zip(groups.tolist(), logits.tolist(), labels.tolist(), strict=True))
        assert rows == sorted(rows) and len(rows) == 300
        assert (logits.dtype, labels.dtype, groups.dtype) == (torch.float64, torch.int64, torch.int64)
        seen.append(num_groups)
        return torch.full((num_groups,), float("inf"))

    result = compute(make_rows(300), metrics={"look": look})
    assert seen == [1, 4]
    assert result.others == {"look": None}  # JSON has no infinity


def test_a_metric_that_gives_no_number_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric 'all' must give a tensor \[1\], a number a group, not \[300\]"):
        compute(make_rows(300), metrics={"all": lambda logits, *_: logits})
    with pytest.raises(ValueError, match="not float"):
        compute(make_rows(300), metrics={"all": lambda *_: 0.5})  # type: ignore[dict-item,return-value]


@pytest.mark.parametrize("name", ["auc", "domains", "ne", "calibration"])
def test_a_name_that_results_have_already_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"a further metric may not be named '{name}'"):
        DomainMetrics(NAMES, {name: label_places})


@pytest.fixture
def foreign_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that brings two metrics, one of which cannot be imported."""
    (tmp_path / "foreign_metrics.py").write_text(FOREIGN)
    info = tmp_path / "foreign_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-metrics\nVersion: 1.0\n")
    points = "[torchrec_mdr.metrics]\nrate = foreign_metrics:rate\nbroken = foreign_metrics:missing\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    METRICS.__dict__.pop("_known", None)  # what the registry has found so far
    yield
    METRICS.__dict__.pop("_known", None)


def run(folder: Path, *options: str) -> int:
    small = ["--method=mix", "--dataset_options.rows=2000", "--dataset_options.num_domains=3"]
    small += ["--stages.joint.epochs=1", "--backbone_options.hidden=[8]"]
    return main([*small, f"--output_dir={folder / 'run'}", *options])


def test_a_run_computes_those_it_is_asked_for(
    foreign_package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path, "--metrics=[rate]") == 0
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for part in (written["test"], written["stages"][0]["validation"]):
        for group in (part, *part["domains"].values()):
            assert 0.2 < group["calibration"] < 5 and 0 < group["rate"] < 1
        weighted = sum(domain["rate"] * domain["rows"] for domain in part["domains"].values()) / part["rows"]
        assert part["rate"] == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clicks",
            "--metrics 'clicks' is unknown; choose one of broken, rate; AUC, WAUC",
        ),
        ("broken", "be imported"),
    ],
)
def test_a_run_with_an_impossible_metric_does_not_start(
    foreign_package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, message: str
) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path, f"--metrics=[{name}]") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*"))
