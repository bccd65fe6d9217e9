"""Effects of categorical features on the log-odds of a label, estimated by counting and shrunken by empirical Bayes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Slopes = tuple[Floats, Floats]
# a Newton step on a rare label can overshoot; the next visit goes on from where this one was cut
MAX_STEP = 2.0
TOLERANCE = 0.01
GATE = 0


@dataclass(frozen=True)
class Cells:
    """A grouping of rows, or of a feature's entries, into cells.

    Args:
        ids (Ints): int64 [n], in [0, size).
        size (int): number of cells; of those made by `of` and `cross` none is empty.
    """

    ids: Ints
    size: int

    @staticmethod
    def of(values: Ints, bound: int) -> Cells:
        """One cell for each value that occurs.

        Args:
            values (Ints): [n], in [0, bound).
            bound (int): end of the values.

        Returns:
            Cells: numbered in the order of the values.

        Example::

            >>> Cells.of(np.array([7, 2, 7]), 10)
            Cells(ids=array([1, 0, 1]), size=2)
        """
        if bound > 4 * len(values) + 65_536:  # a table of all values would dwarf the rows
            occurring, ids = np.unique(values, return_inverse=True)
            return Cells(ids, len(occurring))
        occurs = np.zeros(bound, dtype=np.intp)
        occurs[values] = 1
        numbers = np.cumsum(occurs) - occurs
        return Cells(numbers[values], int(occurs.sum()))

    def cross(self, other: Cells) -> Cells:
        """One cell for each pair of cells that occurs."""
        return Cells.of(self.ids * other.size + other.ids, self.size * other.size)

    def within(self, coarser: Cells) -> Ints:
        """For a grouping that these cells refine, the coarser cell of each cell: [size]."""
        coarse = np.empty(self.size, dtype=coarser.ids.dtype)
        coarse[self.ids] = coarser.ids
        return coarse


@dataclass(frozen=True)
class Feature:
    """A categorical feature; a row with several ids counts as a fraction of a row under each of them.

    Args:
        name (str): name of the feature.
        cells (Cells): the ids of n rows, or of m entries where rows may have several ids.
        rows (Ints | None): [m], the row of each entry; None where every row has one entry, itself.
        shares (Floats | None): [m], the entry's share of its row; None likewise.
    """

    name: str
    cells: Cells
    rows: Ints | None = None
    shares: Floats | None = None

    def deal(self, cells: Cells) -> Cells:
        """A grouping of rows as one of entries."""
        return cells if self.rows is None else Cells(cells.ids[self.rows], cells.size)

    def sums(self, cells: Cells, values: Floats) -> Floats:
        """Sums of the rows' values, each dealt to its entries, in cells of entries: [n] -> [cells.size]."""
        dealt = values if self.rows is None or self.shares is None else values[self.rows] * self.shares
        return _sum(cells.ids, dealt, cells.size)

    def collect(self, values: Floats, num_rows: int) -> Floats:
        """Mean of the entries' values in each row, 0 in rows without any: [m] -> [n]."""
        if self.rows is None or self.shares is None:
            return values
        return _sum(self.rows, values * self.shares, num_rows)


def slopes(labels: Floats, logits: Floats) -> Slopes:
    """Residual y - p and curvature p (1 - p) of each row's log loss by its logit."""
    p = np.exp(-logits)
    p += 1
    np.reciprocal(p, out=p)
    return labels - p, p * (1 - p)


def log_loss(labels: Floats, logits: Floats) -> Floats:
    """Log loss of each row, in nats."""
    loss: Floats = np.log1p(np.exp((1 - 2 * labels) * logits))
    return loss


Term = tuple[Feature, Cells]


class AdditiveLogit:
    """A logit that is a sum of shrunken effects, one a cell of each term, fitted by backfitting.

    Each visit of a term is a Newton step of its cells under a normal prior, whose variance is estimated on the visit
    from the spread of the cells' effects beyond what noise explains (method of moments).

    Args:
        labels (Floats): [n], 0 or 1.
        terms (Sequence[Term]): features, each with cells of its entries; coarse ones first.
    """

    def __init__(self, labels: Floats, terms: Sequence[Term]) -> None:
        positive = labels.sum()
        self.labels = labels
        self.terms = list(terms)
        self.effects = [np.zeros(cells.size) for _, cells in terms]
        self.logits = np.full(len(labels), np.log((positive + 0.5) / (len(labels) - positive + 0.5)))

    def fit(self) -> None:
        """One round over the terms."""
        for term in range(len(self.terms)):
            self._visit(term)

    def extended(self, term: Term, rounds: int) -> AdditiveLogit:
        """The same with a further, coarse term, and fitted on unless that changes next to nothing."""
        result = AdditiveLogit(self.labels, [term, *self.terms])
        result.effects[1:] = [effects.copy() for effects in self.effects]
        result.logits = self.logits.copy()
        if result._visit(0) > TOLERANCE:
            for _ in range(rounds):
                result.fit()
        return result

    def _visit(self, term: int) -> float:
        """Largest change of an effect."""
        feature, cells = self.terms[term]
        residual, curvature = (feature.sums(cells, slope) for slope in slopes(self.labels, self.logits))
        pull = curvature * self.effects[term] + residual
        excess = _divide(pull**2, curvature).sum() - (curvature > 0).sum()
        ridge = curvature.sum() / excess if excess > 0 else np.inf
        step = np.clip(_divide(pull, curvature + ridge) - self.effects[term], -MAX_STEP, MAX_STEP)
        self.effects[term] += step
        self.logits += feature.collect(step[cells.ids], len(self.labels))
        return float(np.abs(step).max())


@dataclass(frozen=True)
class Contrast:
    """How auxiliary domains differ under the ids of a feature within a natural domain.

    Args:
        feature (Feature): the feature.
        fine (Cells): of its entries, by natural domain, auxiliary domain and id.
        parent (Ints): [fine.size], the pair of natural domain and id of each.
        levels (tuple[Ints, ...]): [fine.size] each, the effect that each cell has on a level: first effects that the
            natural domains share, then their own.
        folded (Cells): of its entries, fold-major: fold * fine.size + fine cell.
    """

    feature: Feature
    fine: Cells
    parent: Ints
    levels: tuple[Ints, ...]
    folded: Cells

    @staticmethod
    def of(feature: Feature, natural: Cells, auxiliary: Cells, folds: Cells) -> Contrast | None:
        """The contrast of a feature.

        Args:
            feature (Feature): the feature.
            natural (Cells): [n], natural domains.
            auxiliary (Cells): [n], domains of the candidate.
            folds (Cells): [n].

        Returns:
            Contrast | None: None where natural domain and id determine the auxiliary domain, so nothing can differ.
        """
        natural, auxiliary, folds = feature.deal(natural), feature.deal(auxiliary), feature.deal(folds)
        parents, shared = natural.cross(feature.cells), auxiliary.cross(feature.cells)
        fine = parents.cross(auxiliary)
        if fine.size == parents.size:
            return None
        levels: list[Ints] = [np.arange(fine.size)]
        if shared.size < fine.size:
            levels.insert(0, fine.within(shared))
        folded = Cells(folds.ids * fine.size + fine.ids, folds.size * fine.size)
        return Contrast(feature, fine, fine.within(parents), tuple(levels), folded)

    def change(self, slope: Slopes, held_out: int) -> Floats | None:
        """What shrunken effects, learnt from all folds but one, add to the rows' logits.

        Args:
            slope (Slopes): of the rows at their present logits.
            held_out (int): the fold not to learn from.

        Returns:
            Floats | None: [n]; None where noise explains all differences.
        """
        folds = [self.feature.sums(self.folded, values).reshape(-1, self.fine.size) for values in slope]
        g, h = (np.delete(sums, held_out, axis=0) for sums in folds)
        total = np.zeros(self.fine.size)
        for level in self.levels:
            effects = self._effects(g, h, level)
            g = g - h * effects
            total += effects
        return self.feature.collect(total[self.fine.ids], len(slope[0])) if total.any() else None

    def _effects(self, g: Floats, h: Floats, level: Ints) -> Floats:
        """One level's effects: [fine.size]; g and h are [folds, fine.size].

        Residuals are centred within each parent first, so that all that is learnt is how its cells differ. Let e be the
        centred residuals of an effect's cells, h their curvature, and i the sum of h (1 - h / h_parent) over them;
        e_j and h_j are their parts from fold j. With noise of phi times its nominal variance (more than 1 where rows of
        a unit go together) and effects of variance v, in expectation

            sum (e_j - h_j e / h)^2 = phi sum (h - sum_j h_j^2 / h)     over effects and folds
            sum e^2 = phi sum i + v sum h i                             over effects

        which give phi and v; the effect is e / (h + phi / v).
        """
        total = h.sum(0)
        parents = _sum(self.parent, total)
        share = _divide(total, parents[self.parent])
        mean = _divide(_sum(self.parent, g.sum(0)), parents)[self.parent]
        e_parts, h_parts = (np.stack([_sum(level, row) for row in values]) for values in (g - h * mean, h))
        e, curvature = e_parts.sum(0), h_parts.sum(0)
        information = _sum(level, total * (1 - share))
        freedom = (curvature - _divide((h_parts**2).sum(0), curvature)).sum()
        phi = ((e_parts - h_parts * _divide(e, curvature)) ** 2).sum() / freedom if freedom > 0 else 1.0
        excess = (e**2).sum() - phi * information.sum()
        if excess <= 0:
            return np.zeros(self.fine.size)
        ridge = phi * (curvature @ information) / excess
        effects = np.clip(_divide(e, curvature + ridge), -MAX_STEP, MAX_STEP)[level]
        # the natural domain's own mean under each id stays as it is
        effects -= _sum(self.parent, share * effects)[self.parent]
        return np.where(parents[self.parent] > 0, effects, 0)


def _sum(groups: Ints, values: Floats, size: int = 0) -> Floats:
    return np.asarray(np.bincount(groups, values, size), dtype=np.float64)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
