"""From results to the figures of a comparison: means over seeds, and paired differences from the best baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

import polars as pl
from scipy import stats

from torchrec_mdr.compare.figures import BACKBONE_ROW, DomainGain, Group, Paired, Spread, VariantRow

_GROUP = ("dataset", "division", "backbone")


def make_groups(
    runs: pl.DataFrame,
    domains: pl.DataFrame,
    baselines: Sequence[str],
    published: Mapping[str, Mapping[str, float]],
) -> tuple[Group, ...]:
    """The figures of every data set, division and backbone.

    Args:
        runs (DataFrame): one line a run, see `RUN_SCHEMA`.
        domains (DataFrame): one line a run and domain, see `DOMAIN_SCHEMA`.
        baselines (Sequence[str]): variants that the best baseline is chosen from.
        published (Mapping): figures by label, then by `variant` or `variant/backbone/division`.
    """
    groups = []
    for key, table in runs.group_by(_GROUP, maintain_order=True):
        names = dict(zip(_GROUP, (str(part) for part in key), strict=True))
        own = domains.filter(*(pl.col(name) == value for name, value in names.items()))
        groups.append(_group(names, table, own, baselines, published))
    return tuple(groups)


def best_baseline(runs: pl.DataFrame, baselines: Sequence[str]) -> str | None:
    """The baseline with the highest mean validation AUC; test figures have no say. None where none has finished.

    Args:
        runs (DataFrame): the runs of one group.
        baselines (Sequence[str]): variants to choose from.
    """
    means = (
        runs.filter(pl.col("variant").is_in(list(baselines)) & (pl.col("status") == "finished"))
        .group_by("variant", maintain_order=True)
        .agg(pl.col("validation_auc").mean())
        .drop_nulls()
        .sort("validation_auc", descending=True, maintain_order=True)
    )
    return None if means.is_empty() else str(means["variant"][0])


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compares two variants seed by seed.

    Args:
        values (Mapping[int, float]): a figure by seed.
        baseline (Mapping[int, float]): the same of the baseline.

    Returns:
        Paired | None: None where they have no seed in common.

    Example::

        >>> result = paired({0: 0.82, 1: 0.83}, {0: 0.80, 1: 0.84, 2: 0.9})
        >>> (round(result.mean, 6), result.wins, result.seeds)
        (0.005, 1, 2)
    """
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    ours, theirs = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = [value - other for value, other in zip(ours, theirs, strict=True)]
    mean, wins = fmean(differences), sum(difference > 0 for difference in differences)
    if len(seeds) == 1:
        return Paired(mean, None, None, None, wins, 1)
    if min(differences) == max(differences):  # they have no distribution to test against
        return Paired(mean, mean, mean, None, wins, len(seeds))
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    return Paired(mean, float(interval.low), float(interval.high), float(test.pvalue), wins, len(seeds))


def _group(
    names: Mapping[str, str],
    runs: pl.DataFrame,
    domains: pl.DataFrame,
    baselines: Sequence[str],
    published: Mapping[str, Mapping[str, float]],
) -> Group:
    sizes = domains.unique("domain", keep="first", maintain_order=True)
    sizes = sizes.sort("rows", descending=True, maintain_order=True)
    order = sizes["domain"].to_list()
    best = best_baseline(runs, baselines)
    baseline = _by_seed(runs.filter(pl.col("variant") == best), "auc") if best is not None else {}
    rows = _backbone_rows(runs, domains, order)
    for (variant,), table in runs.group_by(("variant",), maintain_order=True):
        own = domains.filter(pl.col("variant") == variant)
        against = paired(_by_seed(table, "auc"), baseline) if variant != best else None
        rows.append(_row(str(variant), table, own, order, against))
    shown = tuple(
        replace(row, published=tuple(_figure(of, row.name, names) for of in published.values())) for row in rows
    )
    return Group(
        names["dataset"],
        names["division"],
        names["backbone"],
        tuple(order),
        tuple(sizes["rows"].to_list()),
        shown,
        best,
        tuple(published),
    )


def _row(
    name: str, runs: pl.DataFrame, domains: pl.DataFrame, order: Sequence[str], against: Paired | None
) -> VariantRow:
    done = runs.filter(pl.col("status") == "finished")
    if done.is_empty():
        return VariantRow(name, _state(runs))
    gains = {figure: done[figure] - done[f"backbone_{figure}"] for figure in ("auc", "wauc")}
    return VariantRow(
        name,
        _state(runs),
        _spread(done["auc"]),
        _spread(done["wauc"]),
        _spread(done["logloss"]),
        _spread(done["ne"]),
        _spread(done["calibration"]),
        _domain_spreads(domains, order, "auc"),
        _domain_gains(domains, order),
        gain=_spread(gains["auc"]),
        wauc_gain=_spread(gains["wauc"]),
        validation=_spread(done["validation_auc"]),
        trained=done["trained"][0],
        share=done["share_of_interaction"][0],
        speed=_spread(done["samples_per_second"]),
        seconds=_spread(done["seconds"]),
        against=against,
    )


def _backbone_rows(runs: pl.DataFrame, domains: pl.DataFrame, order: Sequence[str]) -> list[VariantRow]:
    """The pretrained backbones by themselves: one for all variants, or one for each set of variants that shares one."""
    sets: list[tuple[list[str], dict[int, str]]] = []  # variants, and their backbone by seed
    known = runs.drop_nulls("backbone_auc")
    for (variant,), table in known.group_by(("variant",), maintain_order=True):
        own = dict(
            zip(table["seed"].to_list(), table["shared_backbone"].fill_null(str(variant)).to_list(), strict=True)
        )
        for names, shared in sets:
            if all(shared.get(seed, key) == key for seed, key in own.items()):
                names.append(str(variant))
                shared.update(own)
                break
        else:
            sets.append(([str(variant)], own))
    rows = []
    for names, _ in sets:
        # as the first run of each seed found it
        first = known.filter(pl.col("variant").is_in(names)).unique("seed", keep="first", maintain_order=True)
        own_domains = domains.join(first.select("variant", "seed"), on=("variant", "seed"), maintain_order="left")
        rows.append(
            VariantRow(
                BACKBONE_ROW if len(sets) == 1 else f"{BACKBONE_ROW} of {', '.join(names)}",
                _seeds(len(first)),
                _spread(first["backbone_auc"]),
                _spread(first["backbone_wauc"]),
                _spread(first["backbone_logloss"]),
                domains=_domain_spreads(own_domains, order, "backbone_auc"),
                is_backbone=True,
            )
        )
    return rows


def _state(runs: pl.DataFrame) -> str:
    counts = {status: len(runs.filter(pl.col("status") == status)) for status in runs["status"].unique()}
    done = counts.pop("finished", 0)
    if done == len(runs):
        return _seeds(done)
    if done:
        return ", ".join([f"{done} of {_seeds(len(runs))}", *(f"{n} {status}" for status, n in sorted(counts.items()))])
    stopped = runs.drop_nulls("reason")
    return f"{stopped['status'][0]}: {stopped['reason'][0]}" if len(stopped) else "waiting"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _by_seed(runs: pl.DataFrame, figure: str) -> dict[int, float]:
    known = runs.drop_nulls(figure)
    return dict(zip(known["seed"].to_list(), known[figure].to_list(), strict=True))


def _domain_spreads(domains: pl.DataFrame, order: Sequence[str], figure: str) -> tuple[Spread | None, ...]:
    values = {str(name): table[figure] for (name,), table in domains.group_by(("domain",))}
    return tuple(_spread(values[name]) if name in values else None for name in order)


def _domain_gains(domains: pl.DataFrame, order: Sequence[str]) -> tuple[DomainGain | None, ...]:
    known = domains.drop_nulls(["auc", "backbone_auc"])
    found: dict[str, DomainGain] = {}
    for (name,), table in known.group_by(("domain",)):
        mean = fmean((table["auc"] - table["backbone_auc"]).to_list())
        ends = [table[f"gain_{end}"].to_list() for end in ("low", "high")]
        has_all = None not in ends[0] and None not in ends[1]
        found[str(name)] = DomainGain(mean, min(ends[0]), max(ends[1])) if has_all else DomainGain(mean, None, None)
    return tuple(found.get(name) for name in order)


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)


def _figure(figures: Mapping[str, float], name: str, group: Mapping[str, str]) -> float | None:
    return figures.get(f"{name}/{group['backbone']}/{group['division']}", figures.get(name))
