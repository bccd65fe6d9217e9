"""Very many domains: `metrics.json` lists the largest, a table beside it all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.metrics.gains import paired_gains
from torchrec_mdr.metrics.results import MOST_LISTED, NUM_LISTED
from torchrec_mdr.report.tables import domain_table as printed
from torchrec_mdr.training.domain_file import domain_table
from torchrec_mdr.training.run_folder import write_results


def evaluated(num_domains: int, seed: int) -> DomainMetrics:
    """Rows of some domains, the first of which have most; the others have none."""
    generator = torch.Generator().manual_seed(7)
    domains = (torch.rand(5000, generator=generator) ** 4 * 2000).long()
    labels = (torch.rand(5000, generator=generator) > 0.5).float()
    metrics = DomainMetrics([f"shop {i}" for i in range(num_domains)])
    metrics.update(torch.randn(5000, generator=torch.Generator().manual_seed(seed)) + labels, labels, domains)
    return metrics


def test_a_table_has_every_domain_and_json_the_largest(tmp_path: Path) -> None:
    test, backbone = (evaluated(MOST_LISTED + 1, seed) for seed in (1, 2))
    result, base, gains = test.compute(), backbone.compute(), paired_gains(test, backbone)
    listed = result.listed_domains()
    metrics = {"test": result.to_dict(), "gain": gains.to_dict(listed)}
    write_results(str(tmp_path), metrics, None, domain_table(result, base, gains))
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert len(listed) == NUM_LISTED and list(content["test"]["domains"]) == listed == list(content["gain"]["domains"])
    rows = result.rows_per_domain
    assert sorted(content["test"]["domains"][name]["rows"] for name in listed) == sorted(rows)[-NUM_LISTED:]
    summary = content["test"]["domains_summary"]
    auc = result.auc_per_domain
    assert summary["domains"] == MOST_LISTED + 1 and summary["with_rows"] == (rows > 0).sum() < 2001
    assert summary["with_auc"] == np.isfinite(auc).sum()
    assert summary["auc_percentiles"]["50"] == np.nanmedian(auc)
    table = pq.read_table(tmp_path / "domains.parquet").to_pydict()
    assert table["domain"][5] == "shop 5" and table["rows"] == rows.tolist()
    for place in (0, 7, 1500, MOST_LISTED):
        name = table["domain"][place]
        assert table["auc"][place] == result.domains[name].auc
        assert table["backbone_logloss"][place] == base.domains[name].logloss
        assert table["gain_low"][place] == gains.domains[name].low
    assert f"{MOST_LISTED + 1} domains in all: domains.parquet has every one" in printed(content["test"])


def test_as_many_as_are_listed_need_no_table() -> None:
    result = evaluated(MOST_LISTED, 1).compute()
    assert domain_table(result) is None and len(result.to_dict()["domains"]) == MOST_LISTED
    assert "domains_summary" not in result.to_dict()
