"""The figures of a comparison, against independent computations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from torchrec_mdr.compare.figures import Group, VariantRow
from torchrec_mdr.compare.results import DOMAIN_SCHEMA, RUN_SCHEMA
from torchrec_mdr.compare.statistics import best_baseline, make_groups, paired

KEY = {"dataset": "d", "division": "v", "backbone": "mlp"}


def line(variant: str, seed: int, auc: float | None, validation: float = 0.5, **more: Any) -> dict[str, Any]:
    known = {"status": "finished", "auc": auc, "wauc": auc, "logloss": 0.5, "validation_auc": validation}
    return {**dict.fromkeys(RUN_SCHEMA), **KEY, "variant": variant, "method": variant, "seed": seed, **known, **more}


def domain(variant: str, seed: int, name: str, auc: float | None, base: float | None = None) -> dict[str, Any]:
    own = {"variant": variant, "method": variant, "seed": seed, "domain": name, "auc": auc, "backbone_auc": base}
    return {**dict.fromkeys(DOMAIN_SCHEMA), **KEY, **own, "rows": 10}


def group(lines: list[dict[str, Any]], domains: Sequence[dict[str, Any]] = (), **more: Any) -> Group:
    options = {"baselines": ["mix", "star"], "published": {}, **more}
    (only,) = make_groups(pl.DataFrame(lines, RUN_SCHEMA), pl.DataFrame(list(domains), DOMAIN_SCHEMA), **options)
    return only


def row(of: Group, name: str) -> VariantRow:
    return next(row for row in of.rows if row.name == name)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_paired_differences_are_those_of_scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.random(count), rng.random(count)
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    # the order of the seeds differs, and one seed has no partner
    result = paired(dict(enumerate(ours)), {**dict(reversed(list(enumerate(theirs)))), 99: 0.0})
    assert result is not None and result.low is not None and result.high is not None
    assert result.p == pytest.approx(test.pvalue) and result.mean == pytest.approx((ours - theirs).mean())
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert (result.wins, result.seeds) == ((ours > theirs).sum(), count)


def test_paired_differences_by_hand() -> None:
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3); with 2 degrees P = 1 - t / sqrt(t^2 + 2)
    result = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    t = 2 * math.sqrt(3)
    assert result is not None and result.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_where_there_is_nothing_to_test() -> None:
    one = paired({0: 0.8}, {0: 0.7})
    assert one is not None and (one.low, one.high, one.p, one.wins) == (None, None, None, 1)
    assert paired({0: 0.8}, {1: 0.7}) is None
    same = paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert same is not None and (same.mean, same.low, same.high, same.p) == (0.25, 0.25, 0.25, None)


def test_the_best_baseline_is_chosen_by_validation_and_not_by_test() -> None:
    lines = [line("mix", s, auc=0.90, validation=0.70) for s in (0, 1)]
    lines += [line("star", s, auc=0.60, validation=0.80) for s in (0, 1)]
    lines += [line("mlora", s, auc=0.99 + 0.001 * s, validation=0.99) for s in (0, 1)]
    assert best_baseline(pl.DataFrame(lines, RUN_SCHEMA), ["mix", "star"]) == "star"
    compared = group(lines)
    assert compared.baseline == "star" and row(compared, "star").against is None
    against = row(compared, "mlora").against
    assert against is not None and against.mean == pytest.approx(0.3905)
    worse = row(compared, "mix").against
    assert worse is not None and worse.mean == pytest.approx(0.3)


def test_without_a_finished_baseline_nothing_is_compared() -> None:
    waiting = line("mix", 0, None, status="waiting", validation_auc=None)
    compared = group([waiting, line("mlora", 0, 0.8)])
    assert compared.baseline is None and row(compared, "mlora").against is None
    assert row(compared, "mix").state == "waiting" and row(compared, "mix").auc is None


def test_means_and_deviations_over_seeds() -> None:
    values = [0.80, 0.81, 0.85]
    base = [0.79, 0.82, 0.80]
    lines = [
        line("mlora", s, auc, backbone_auc=b, backbone_wauc=b, backbone_logloss=0.5)
        for s, (auc, b) in enumerate(zip(values, base, strict=True))
    ]
    domains = [domain("mlora", s, "x", values[s], base[s]) for s in range(3)]
    domains += [domain("mlora", s, "y", 0.5 if s else None, 0.5) for s in range(3)]
    compared = group(lines, domains)
    found = row(compared, "mlora")
    assert found.auc is not None and found.auc.mean == pytest.approx(np.mean(values))
    assert found.auc.std == pytest.approx(np.std(values, ddof=1))
    difference = np.array(values) - base
    assert found.gain is not None and found.gain.mean == pytest.approx(difference.mean())
    assert found.gain.std == pytest.approx(np.std(difference, ddof=1))
    assert compared.domains == ("x", "y") and found.domains[0] == found.auc
    assert found.domains[1] is not None and (found.domains[1].mean, found.domains[1].std) == (0.5, 0.0)
    alone = row(compared, "backbone")
    assert compared.rows[0] is alone and alone.auc is not None and alone.auc.mean == pytest.approx(np.mean(base))
    assert alone.domains[0] == alone.auc


def test_states_say_what_is_missing() -> None:
    failed = {"status": "failed", "reason": "exit code 1: no memory"}
    lines = [line("mix", 0, 0.8), line("mix", 1, None, **failed), line("star", 0, None, **failed)]
    compared = group(lines)
    assert row(compared, "mix").state == "1 of 2 seeds, 1 failed"
    assert row(compared, "star").state == "failed: exit code 1: no memory"


def test_published_figures_stand_beside_their_variant() -> None:
    figures = {"paper": {"mix": 0.8, "star/mlp/v": 0.7, "star/wdl/v": 0.1}, "code": {"mix/mlp/v": 0.6}}
    compared = group([line("mix", 0, 0.8), line("star", 0, 0.8)], published=figures)
    assert compared.labels == ("paper", "code")
    assert row(compared, "mix").published == (0.8, 0.6) and row(compared, "star").published == (0.7, None)


def test_variants_that_start_from_several_backbones() -> None:
    def of(variant: str, seed: int, backbone: str, base: float) -> dict[str, Any]:
        figures = dict.fromkeys(("backbone_auc", "backbone_wauc", "backbone_logloss"), base)
        return line(variant, seed, 0.9, shared_backbone=backbone, **figures)

    lines = [of("a", 0, "p0", 0.7), of("a", 1, "p1", 0.8), of("b", 0, "q0", 0.5), of("c", 1, "p1", 0.8)]
    domains = [domain("a", 0, "x", 0.9, 0.7), domain("a", 1, "x", 0.9, 0.8), domain("b", 0, "x", 0.9, 0.5)]
    compared = group(lines, [*domains, domain("c", 1, "x", 0.9, 0.8)])
    assert [found.name for found in compared.rows] == ["backbone of a, c", "backbone of b", "a", "b", "c"]
    assert [found.is_backbone for found in compared.rows] == [True, True, False, False, False]
    for found, mean in zip(compared.rows, (0.75, 0.5), strict=False):
        assert found.auc is not None and found.auc.mean == pytest.approx(mean)
        assert found.domains[0] is not None and found.domains[0].mean == pytest.approx(mean)
    one = group([of("a", 0, "p0", 0.7), of("c", 1, "p1", 0.8)])
    assert one.rows[0].name == "backbone" and one.rows[0].state == "2 seeds"


def test_domains_stand_by_their_rows_and_their_gains_hold_all_seeds_intervals() -> None:
    def one(seed: int, name: str, rows: int, gain: float, low: float | None, high: float | None) -> dict[str, Any]:
        return domain("lora", seed, name, 0.7 + gain, 0.7) | {"rows": rows, "gain_low": low, "gain_high": high}

    domains = [
        *(
            one(0, "small", 5, 0.2, None, None),
            one(0, "large", 90, 0.01, 0.002, 0.018),
            one(0, "middle", 50, 0.0, -0.1, 0.1),
        ),
        *(
            one(1, "small", 5, 0.4, None, None),
            one(1, "large", 90, 0.03, 0.02, 0.04),
            one(1, "middle", 50, 0.2, 0.1, 0.3),
        ),
    ]
    found = group([line("lora", 0, 0.7), line("lora", 1, 0.7)], domains)
    assert found.domains == ("large", "middle", "small") and found.domain_rows == (90, 50, 5)
    large, middle, small = row(found, "lora").domain_gains
    assert large is not None and (large.mean, large.low, large.high) == pytest.approx((0.02, 0.002, 0.04))
    assert middle is not None and (middle.low, middle.high) == (-0.1, 0.3)
    assert small is not None and small.mean == pytest.approx(0.3) and small.low is None
    assert [gain.is_sure for gain in (large, middle, small)] == [True, False, False]
