"""Scores candidate auxiliary divisions; the package's docstring says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from tqdm import tqdm

from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.rows import Rows
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.experiments.rank_divisions.effects import (
    AdditiveLogit,
    Cells,
    Contrast,
    Feature,
    Floats,
    Ints,
    log_loss,
    slopes,
)

FOLDS = 5
ROUNDS = 4
DENSE_BINS = 16
# a feature determines a division where it leaves at most a tenth of the errors of guessing the largest domain
MIN_DETERMINED = 0.9
# ids of fewer than ten a domain say more about themselves than about the domain, so they are not held out together
MIN_UNITS_PER_DOMAIN = 10
MIN_ROWS_PER_UNIT = 2


@dataclass(frozen=True)
class DomainScore:
    """A candidate's score in one natural domain.

    Args:
        score (float | None): nats per row; None where the domain has no rows.
        standard_error (float | None): of the score; likewise.
        rows (int): training rows of the domain.
    """

    score: float | None
    standard_error: float | None
    rows: int


@dataclass(frozen=True)
class DivisionScore:
    """How much preferences differ between a candidate's domains, given the natural division.

    Args:
        division (str): the candidate.
        num_domains (int): its number of domains.
        score (float): reduction of the held-out log loss, in nats per row; about 0 or below it where nothing differs.
        standard_error (float): of the score.
        held_out_by (str | None): the feature whose ids had all their rows in one fold; None where rows were dealt
            singly.
        domains (dict[str, DomainScore]): of each natural domain, by name.
        features (dict[str, float]): what each feature adds to the score; those under which domains cannot differ are
            left out.
    """

    division: str
    num_domains: int
    score: float
    standard_error: float
    held_out_by: str | None
    domains: dict[str, DomainScore]
    features: dict[str, float]


def rank_divisions(
    folder: str, natural: str | None = None, candidates: Sequence[str] | None = None, max_rows: int = 2_000_000
) -> list[DivisionScore]:
    """Ranks candidate auxiliary divisions by how much preferences differ between their domains, given the natural one.

    Args:
        folder (str): the prepared data set.
        natural (str | None): the natural division; None takes the schema's first.
        candidates (Sequence[str] | None): divisions to rank; None takes all others.
        max_rows (int): of a larger training split only about so many rows, drawn at random, are read into memory.

    Returns:
        list[DivisionScore]: best first.

    Raises:
        ValueError: the folder holds no prepared data, a division is unknown, a candidate is the natural division, there
            is none, or there are fewer training rows than folds.

    Example::

        >>> import tempfile
        >>> from torchrec_mdr.prepare import prepare
        >>> folder = prepare("synthetic", cache_dir=tempfile.mkdtemp(), rows=20_000, num_domains=3)
        >>> best = rank_divisions(folder, "scenario")[0]
        >>> best.division, best.num_domains, best.score > 4 * best.standard_error
        ('segment', 3, True)
    """
    schema = Schema.load(folder)
    natural = natural or schema.divisions[0].name
    names = _candidates(schema, natural, candidates)
    if max_rows < FOLDS:
        raise ValueError(f"max_rows must be at least {FOLDS}, the number of folds, not {max_rows}")
    reader = SplitReader(folder, schema, "train", [natural])
    with tqdm(total=len(reader.groups) + ROUNDS + len(names) * FOLDS, leave=False, delay=1) as bar:
        bar.set_description("reading")
        rows, divisions = _read(reader, [natural, *names], max_rows, bar.update)
        if len(rows) < FOLDS:
            raise ValueError(f"{folder} has {len(rows)} training rows, too few for {FOLDS} folds; prepare more")
        bar.set_description("fitting what is known without a candidate")
        known = _Known(rows, _features(rows, schema, reader.multi_hot), divisions[natural], bar.update)
        scores = []
        for name in names:
            bar.set_description(name)
            scores.append(_score(known, schema, natural, name, divisions[name], bar.update))
    return sorted(scores, key=lambda score: -score.score)


def _candidates(schema: Schema, natural: str, candidates: Sequence[str] | None) -> list[str]:
    schema.division(natural)
    if candidates is None:
        candidates = [division.name for division in schema.divisions if division.name != natural]
        if not candidates:
            raise ValueError(f"data set '{schema.dataset}' has no division besides '{natural}', so none to rank")
    if not candidates:
        raise ValueError("no candidate is named; name divisions, or leave them out to rank all")
    for name in candidates:
        schema.division(name)
        if name == natural:
            raise ValueError(f"candidate '{name}' is the natural division itself; leave it out")
    return list(dict.fromkeys(candidates))


def _read(
    reader: SplitReader, names: Sequence[str], max_rows: int, progress: Callable[[], object]
) -> tuple[Rows, dict[str, Ints]]:
    """Training rows, and their domain ids under each division."""
    rng = np.random.default_rng(0)
    share = max_rows / max(sum(group.rows for group in reader.groups), 1)
    parts: list[Rows] = []
    divisions: dict[str, list[Ints]] = {name: [np.empty(0, dtype=np.int64)] for name in names}
    for group, rows in reader.all_rows():
        kept = np.flatnonzero(rng.random(group.rows) < share) if share < 1 else np.arange(group.rows)
        parts.append(rows.take(kept))
        for name, ids in divisions.items():
            ids.append(reader.domains(group, name)[kept])
        progress()
    return Rows.cat(parts, reader.form, sum(map(len, parts))), {
        name: np.concatenate(ids) for name, ids in divisions.items()
    }


def _features(rows: Rows, schema: Schema, multi_hot: Sequence[bool]) -> list[Feature]:
    """All features as categories, those with few ids first."""
    features = []
    single, bags = count(), iter(rows.bags)
    for feature, many in zip(schema.sparse_features, multi_hot, strict=True):
        if many:
            bag = next(bags)
            lengths = np.diff(bag.offsets)
            owners = np.repeat(np.arange(len(rows)), lengths)
            cells = Cells.of(bag.values, feature.num_embeddings)
            features.append(Feature(feature.name, cells, owners, 1 / lengths[owners]))
        else:
            features.append(Feature(feature.name, Cells.of(rows.ids(next(single)), feature.num_embeddings)))
    for name, values in zip(schema.dense_features, rows.dense.T, strict=True):
        cuts = np.unique(np.quantile(values, np.arange(1, DENSE_BINS) / DENSE_BINS))
        features.append(Feature(name, Cells.of(np.searchsorted(cuts, values, side="right"), DENSE_BINS)))
    return sorted(features, key=lambda feature: feature.cells.size)


class _Known:
    """The training rows, and the logits that are known without a candidate."""

    def __init__(self, rows: Rows, features: list[Feature], natural: Ints, progress: Callable[[], object]) -> None:
        self.labels = rows.labels.astype(np.float64)
        self.natural_ids = natural
        self.natural = Cells.of(natural, int(natural.max()) + 1)
        self.everything = Feature("", Cells(np.zeros(len(rows), dtype=np.intp), 1))
        terms = [(self.everything, self.natural)]
        # a feature that the natural division determines says nothing new
        self.features = [feature for feature in features if not _determines(self.natural, feature)]
        for feature in self.features:
            own = feature.deal(self.natural).cross(feature.cells)
            terms += [(feature, cells) for cells in (feature.cells, own)[: 1 + (own.size > feature.cells.size)]]
        self.logit = AdditiveLogit(self.labels, terms)
        for _ in range(ROUNDS):
            self.logit.fit()
            progress()


def _score(
    known: _Known, schema: Schema, natural: str, name: str, ids: Ints, progress: Callable[[], object]
) -> DivisionScore:
    num_rows, num_domains = len(ids), schema.division(name).num_domains
    auxiliary = Cells.of(ids, num_domains)
    unit = _unit(known.features, auxiliary)
    units = unit.cells if unit else Cells(np.arange(num_rows), num_rows)
    folds = Cells((np.random.default_rng(0).permutation(units.size) % FOLDS)[units.ids], FOLDS)
    both = known.natural.cross(auxiliary)
    # under an attribute of its own a domain or a unit cannot differ but in rate, which is known
    owners = [both, *([unit.cells] if unit else [])]
    features = [feature for feature in known.features if not any(_determines(owner, feature) for owner in owners)]
    possible = [Contrast.of(feature, known.natural, auxiliary, folds) for feature in features]
    contrasts = [contrast for contrast in possible if contrast is not None]
    base = known.logit.extended((known.everything, both), ROUNDS).logits if contrasts else known.logit.logits
    base_slopes = slopes(known.labels, base)
    gains = np.zeros(num_rows)
    by_feature = {contrast.feature.name: 0.0 for contrast in contrasts}
    for fold in range(FOLDS):
        held_out = np.flatnonzero(folds.ids == fold)
        labels = known.labels[held_out]
        logits, slope, loss = base, base_slopes, log_loss(labels, base[held_out])
        for contrast in contrasts:
            change = contrast.change(slope, fold)
            if change is None:
                continue
            logits = logits + change
            slope, before, loss = slopes(known.labels, logits), loss, log_loss(labels, logits[held_out])
            gains[held_out] += before - loss
            by_feature[contrast.feature.name] += float((before - loss).sum()) / num_rows
        progress()
    names = schema.division(natural).domain_names
    domains = {domain: _mean(gains, units, known.natural_ids == i) for i, domain in enumerate(names)}
    total = _mean(gains, units, np.ones(num_rows, dtype=np.bool_))
    assert total.score is not None and total.standard_error is not None
    held_out_by = unit.name if unit else None
    return DivisionScore(name, num_domains, total.score, total.standard_error, held_out_by, domains, by_feature)


def _determines(cells: Cells, feature: Feature) -> bool:
    """Whether all rows of a cell have the same id of a feature."""
    dealt = feature.deal(cells)
    return dealt.cross(feature.cells).size == Cells.of(dealt.ids, dealt.size).size


def _unit(features: Sequence[Feature], auxiliary: Cells) -> Feature | None:
    """The finest feature that determines the candidate and has several rows an id."""
    num_rows = len(auxiliary.ids)
    chance = int(np.bincount(auxiliary.ids).max())
    found = None
    for feature in features:
        cells = feature.cells
        few = cells.size < MIN_UNITS_PER_DOMAIN * auxiliary.size
        if feature.rows is not None or few or num_rows < MIN_ROWS_PER_UNIT * cells.size:
            continue
        pairs = cells.cross(auxiliary)
        largest = np.zeros(cells.size, dtype=np.int64)
        np.maximum.at(largest, pairs.within(cells), np.bincount(pairs.ids))
        if largest.sum() - chance >= MIN_DETERMINED * (num_rows - chance):
            found = feature
    return found


def _mean(gains: Floats, units: Cells, mask: np.ndarray) -> DomainScore:
    """Mean of the rows' gains and its standard error, rows of a unit taken together."""
    rows = int(mask.sum())
    if not rows:
        return DomainScore(None, None, 0)
    mean = float(gains[mask].mean())
    sums = np.bincount(units.ids[mask], gains[mask] - mean)
    return DomainScore(mean, float(np.sqrt((sums**2).sum())) / rows, rows)
