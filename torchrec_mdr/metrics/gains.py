"""What one model gains over another on the same rows, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats

from torchrec_mdr.metrics.domain_metrics import DomainMetrics
from torchrec_mdr.metrics.results import Metrics
from torchrec_mdr.metrics.sorted_rows import SortedRows, runs_of, slices

LEVEL = 0.95
TINY = 1e-12  # placements that differ by less are the same
STEPS, CLOSE = 200, 1e-12  # of the search for offsets: most of them, and how far the last one goes
FEWEST = 10  # rows of either class, below which an interval of AUC by a normal law means nothing
Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Gain:
    """A difference in a figure, and how sure it is.

    The interval is that of other rows drawn from where these come from, for these two models; what another seed would
    have trained is not in it.

    Args:
        difference (float | None): None where the figure is not defined.
        low (float | None): end of the interval; None where there are too few rows for one.
        high (float | None): its other end.
        p (float | None): two-sided, of no difference.
    """

    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def auc_gain(after: Floats, before: Floats, labels: Ints) -> Gain:
    """The difference in AUC of two models' scores for the same rows, by DeLong.

    A row's placement is the share of the other class's rows that it stands on the right side of (ties half). AUC is the
    mean placement of the positives, and of the negatives; DeLong's variance of a difference is that of the placements'
    differences over positives, plus that over negatives: what Welch's test of two means takes. Against the bootstrap it
    needs two sorts instead of thousands, and gives the same to the third digit.

    Args:
        after (Floats): [n], scores of the one model.
        before (Floats): [n], scores of the other.
        labels (Ints): [n], 0 or 1.

    Example::

        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 2, 2000)
        >>> before = labels + rng.normal(0, 2, 2000)
        >>> gain = auc_gain(before + labels, before, labels)
        >>> 0 < gain.low < gain.difference < gain.high
        True

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 1988; placements from ranks: Sun and Xu, 2014.
    """
    return auc_gains(after, before, labels, np.zeros(len(labels), dtype=np.int8), 1)[0]


def auc_gains(after: Floats, before: Floats, labels: Ints, domains: Ints, num_domains: int) -> list[Gain]:
    """The difference in AUC within each domain, by itself; see :func:`auc_gain`.

    Args:
        after (Floats): [n], scores of the one model.
        before (Floats): [n], scores of the other.
        labels (Ints): [n], 0 or 1.
        domains (Ints): [n], in [0, num_domains).
        num_domains (int): N.
    """
    counts = np.zeros(2 * num_domains)
    for own in slices(len(labels)):
        counts += np.bincount(_classes(labels[own], domains[own]), minlength=2 * num_domains)
    placed = np.zeros(len(labels))
    _place(placed, after, labels, domains, counts, np.add)
    _place(placed, before, labels, domains, counts, np.subtract)
    means, squares, farthest = (np.zeros(2 * num_domains) for _ in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        for own in slices(len(labels)):
            np.add.at(means, _classes(labels[own], domains[own]), placed[own])
        means /= counts
        for own in slices(len(labels)):
            groups = _classes(labels[own], domains[own])
            distances = placed[own] - means[groups]
            np.add.at(squares, groups, distances**2)
            np.maximum.at(farthest, groups, np.abs(distances))
        errors = squares / (counts - 1) / counts  # squared, of the means
        of_negatives, of_positives = errors.reshape(-1, 2).T
        both = of_negatives + of_positives
        fewer = of_negatives**2 / (counts[0::2] - 1) + of_positives**2 / (counts[1::2] - 1)
        freedom, error = both**2 / fewer, np.sqrt(both)  # Welch's
        half = error * stats.t.ppf((1 + LEVEL) / 2, freedom)
        p = 2 * stats.t.sf(np.abs(means[0::2]) / error, freedom)
    fewest, constant = counts.reshape(-1, 2).min(1), farthest.reshape(-1, 2).max(1) < TINY
    columns = means[1::2], means[0::2] - half, means[0::2] + half, p, fewest, constant
    return [_gain(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _gain(difference: float, low: float, high: float, p: float, rows: int, constant: bool) -> Gain:
    """Of a domain with so many rows in its smaller class."""
    if rows and constant and abs(difference) < TINY:  # the models order the rows alike
        return Gain(0.0, 0.0, 0.0)
    if rows < FEWEST:
        return Gain(difference if rows else None)
    return Gain(difference, difference, difference) if constant else Gain(difference, low, high, p)


def logloss_gain(after: Floats, before: Floats, labels: Ints) -> Gain:
    """The difference in log loss of two models' logits for the same rows, by the paired t test."""
    if not len(labels):
        return Gain(None)
    differences = np.empty(len(labels))
    for own in slices(len(labels)):
        signs = np.where(labels[own] == 1, -1.0, 1.0)
        differences[own] = np.logaddexp(0, signs * after[own]) - np.logaddexp(0, signs * before[own])
    difference = float(differences.mean())
    if len(labels) < FEWEST:
        return Gain(difference)
    if np.ptp(differences) == 0:
        return Gain(difference, difference, difference)
    test = stats.ttest_1samp(differences, 0.0)  # the paired one, which would make them anew
    interval = test.confidence_interval(LEVEL)
    return Gain(difference, float(interval.low), float(interval.high), float(test.pvalue))


@dataclass(frozen=True)
class Gains:
    """What a model gains over another on the rows of an evaluation.

    Args:
        auc (Gain): over all rows.
        wauc (Gain): the domains' gains weighted by their rows, each domain's own rows drawn by themselves.
        logloss (Gain): over all rows; what is below 0 is better.
        domains (dict[str, Gain]): in AUC, by domain name, in id order.
    """

    auc: Gain
    wauc: Gain
    logloss: Gain
    domains: dict[str, Gain]

    def to_dict(self, listed: Iterable[str] | None = None) -> dict[str, Any]:
        """The form in `metrics.json`; of the domains that are listed there, where those are not all."""
        shown = self if listed is None else replace(self, domains={name: self.domains[name] for name in listed})
        return asdict(shown)


def paired_gains(after: DomainMetrics, before: DomainMetrics) -> Gains:
    """What one model gains over another; where a process group exists, every rank must call it.

    Rows that weigh more than others get differences and no intervals: DeLong's are of rows that count alike.

    Args:
        after (DomainMetrics): rows of an evaluation, as the one model scores them.
        before (DomainMetrics): the same rows in the same order on every rank, as the other does.

    Raises:
        ValueError: the rows are not the same.
    """
    logits, labels, domains, weights = after.all_rows()
    others, *same = before.all_rows()
    if not (np.array_equal(labels, same[0]) and np.array_equal(domains, same[1])):
        raise ValueError("two evaluations can be compared on the same rows in the same order only")
    del same  # of several ranks, copies
    if (weights != 1).any():
        return _without_intervals(after.compute(), before.compute())
    found = auc_gains(logits, others, labels, domains, len(after.domain_names))
    by_domain = dict(zip(after.domain_names, found, strict=True))
    return Gains(
        auc_gain(logits, others, labels),
        _weighted(list(by_domain.values()), np.bincount(domains, minlength=len(by_domain))),
        logloss_gain(logits, others, labels),
        by_domain,
    )


def domain_offsets(logits: Floats, labels: Ints, domains: Ints, weights: Floats, num_domains: int) -> Floats:
    """The constant that each domain's logits lack: what knowing the domain at all gives a model that does not see it.

    Args:
        logits (Floats): [n].
        labels (Ints): [n], 0 or 1.
        domains (Ints): [n], in [0, num_domains).
        weights (Floats): [n], how much each row counts.
        num_domains (int): N.

    Returns:
        Floats: [N], by maximum likelihood with a standard normal prior, which keeps domains of few rows near 0.

    Example::

        >>> labels, domains = np.array([1, 1, 1, 0] * 200), np.array([0] * 800)
        >>> domain_offsets(np.zeros(800), labels, domains, np.ones(800), 2).round(1)  # log(3), and no rows
        array([1.1, 0. ])
    """
    positives, total = np.zeros(num_domains), np.zeros(num_domains)
    for own in slices(len(logits)):
        np.add.at(positives, domains[own], weights[own].astype(np.float64) * labels[own])
        np.add.at(total, domains[own], weights[own].astype(np.float64))
    high = total + 1.0  # the prior outweighs the rows there
    low, offsets = -high, np.zeros(num_domains)
    for _ in range(STEPS):  # Newton's, within brackets that close
        slope, curvature = np.zeros(num_domains), np.zeros(num_domains)
        for own in slices(len(logits)):
            share = special.expit(logits[own] + offsets[domains[own]])
            np.add.at(slope, domains[own], weights[own].astype(np.float64) * share)
            np.add.at(curvature, domains[own], weights[own].astype(np.float64) * share * (1 - share))
        slope, curvature = slope - positives + offsets, curvature + 1.0
        low, high = np.where(slope < 0, offsets, low), np.where(slope > 0, offsets, high)
        reached = offsets - slope / curvature
        reached = np.where((reached > low) & (reached < high), reached, (low + high) / 2)
        moved = np.abs(reached - offsets).max(initial=0.0, where=slope != 0)
        offsets = np.where(slope == 0, offsets, reached)
        if moved < CLOSE:
            break
    return offsets


def _without_intervals(after: Metrics, before: Metrics) -> Gains:
    def gain(one: float | None, other: float | None) -> Gain:
        return Gain(None if one is None or other is None else one - other)

    return Gains(
        gain(after.auc, before.auc),
        gain(after.wauc, before.wauc),
        gain(after.logloss, before.logloss),
        {name: gain(domain.auc, before.domains[name].auc) for name, domain in after.domains.items()},
    )


def _classes(labels: Ints, domains: Ints) -> NDArray[np.int64]:
    """Twice the domain, and one more for positives. [n], [n] -> [n]."""
    return 2 * domains.astype(np.int64) + (labels == 1)


def _place(placed: Floats, scores: Floats, labels: Ints, domains: Ints, counts: Floats, put: np.ufunc) -> None:
    """Adds to each row, or takes from it, of what share of the other class's rows of its domain it stands right of.

    Args:
        placed (Floats): [n], changed in place.
        scores (Floats): [n].
        labels (Ints): [n], 0 or 1.
        domains (Ints): [n].
        counts (Floats): [2N], rows of each domain's negatives and positives.
        put (np.ufunc): `np.add` or `np.subtract`.
    """
    columns = (torch.from_numpy(column) for column in (scores, labels, domains))
    rows = SortedRows(next(columns), next(columns), next(columns), places=True)
    negatives, positives = torch.from_numpy(counts).view(-1, 2).unbind(1)
    for block, runs in runs_of(rows.blocks()):
        # rows of the other class below, ties half; 0 / 0 where there are none
        of_positives = (runs.negatives_below + runs.negatives / 2) / negatives[runs.groups]
        of_negatives = 1.0 - (runs.positives_below + runs.positives / 2) / positives[runs.groups]
        one, other = (of_run.repeat_interleave(runs.rows) for of_run in (of_positives, of_negatives))
        assert block.places is not None
        own = block.places.numpy()
        placed[own] = put(placed[own], torch.where(block.labels == 1, one, other).numpy())


def _weighted(gains: list[Gain], rows: Ints) -> Gain:
    known = [(gain, count) for gain, count in zip(gains, rows, strict=True) if gain.difference is not None]
    if not known:
        return Gain(None)
    weights = np.array([count for _, count in known], dtype=np.float64)
    weights /= weights.sum()
    difference = float(weights @ [gain.difference for gain, _ in known])
    # half an interval is 1.96 errors, nearly; where there is none, the error of a difference is at most 1
    factor = float(stats.norm.ppf((1 + LEVEL) / 2))
    errors = [1.0 if g.low is None or g.high is None else (g.high - g.low) / 2 / factor for g, _ in known]
    error = float(np.sqrt((weights**2) @ np.square(errors)))
    if error == 0.0:
        return Gain(difference, difference, difference)
    low, high = stats.norm.interval(LEVEL, difference, error)
    return Gain(difference, float(low), float(high), float(2 * stats.norm.sf(abs(difference) / error)))
