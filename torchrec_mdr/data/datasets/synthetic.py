"""The embedded data set: clicks made by a known teacher whose taste differs from domain to domain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from torchrec_mdr.data.datasets.base import Choice, Dataset, stage_defaults
from torchrec_mdr.data.schema import SPLITS, Division, Schema, SparseFeature, domain_column
from torchrec_mdr.data.writer import ROW_GROUP_ROWS, write_split

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
LATENT_WIDTH = 4
SHARED_UNITS = 16
MEAN_LOGIT = -1.0
DOMAIN_BIAS = 0.3
_CALIBRATION_ROWS = 16_384

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Synthetic(Dataset):
    """Options of the synthetic data set.

    Every id of every sparse feature has a latent vector, and x is a row's latent vectors beside its dense features.
    With a row's scenario d and segment s, all parts scaled to the given standard deviations over the rows,

        logit = shared(x) + low_rank_d(x) + low_rank_s(x) + bias_d + const
        low_rank_d(x) = sum_j c_dj tanh(2 p_dj . x)

    so each domain reads the shared latents through `rank` directions of its own. Scenario and segment are divisions
    and, unless one says no, sparse features both. Scenario sizes follow Zipf's law, segments are of equal size.

    Args:
        rows (int): rows of all splits together, cut 80/10/10.
        num_domains (int): scenarios.
        num_auxiliary_domains (int): segments.
        num_sparse_features (int): besides scenario and segment.
        num_dense_features (int): standard normal.
        num_embeddings (int): ids of the largest sparse feature; the others go down to a tenth of it.
        skew (float): Zipf exponent of the scenarios' sizes; 0 makes them equal.
        rank (int): directions of a domain's own.
        shared_scale (float): standard deviation of the shared part of the logit.
        domain_scale (float): the same of the scenarios' part.
        auxiliary_scale (float): the same of the segments' part.
        seed (int): the same seed and options give the same rows.
        division (str): the natural division: scenario or segment.
        domain_features (bool): whether scenario and segment are sparse features, which a backbone sees.

    Raises:
        ValueError: an option is out of its range.

    Example::

        >>> Synthetic(rows=0)
        Traceback (most recent call last):
        ValueError: synthetic data need rows >= 1, not 0
    """

    rows: int = 300_000
    num_domains: int = 20
    num_auxiliary_domains: int = 3
    num_sparse_features: int = 6
    num_dense_features: int = 4
    num_embeddings: int = 100
    skew: float = 1.0
    rank: int = 2
    shared_scale: float = 1.0
    domain_scale: float = 1.5
    auxiliary_scale: float = 0.9
    seed: int = 0
    division: str = "scenario"
    domain_features: bool = True

    def __post_init__(self) -> None:
        lowest = {
            "rows": 1,
            "num_domains": 1,
            "num_auxiliary_domains": 1,
            "num_sparse_features": 1,
            "num_dense_features": 0,
            "num_embeddings": 1,
            "skew": 0,
            "rank": 1,
            "shared_scale": 0,
            "domain_scale": 0,
            "auxiliary_scale": 0,
            "seed": 0,
        }
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"synthetic data need {name} >= {low}, not {getattr(self, name)}")
        if self.division not in ("scenario", "segment"):
            raise ValueError(f"synthetic data have no division '{self.division}'; choose scenario or segment")

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return "scenario", "segment"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`; the same for all recipes."""
        values = {"embeddings.dim": 16, "batch_size": 2048, "backbone_options.hidden": [64, 32]}
        return values | stage_defaults({"epochs": 6, "patience": 2, "learning_rate": 1e-3})

    def write(self, folder: str) -> None:
        """Writes the three splits and `schema.json` into an existing folder."""
        teacher = Teacher(self)
        rows = {split: int(SHARES[split] * self.rows) for split in SPLITS}
        rows["train"] += self.rows - sum(rows.values())
        test: list[tuple[Floats, Floats, Ints]] = []
        with tqdm(total=self.rows, desc="generating", unit=" rows", unit_scale=True, delay=1) as progress:

            def chunks(split: str) -> Iterator[dict[str, Any]]:
                for number, first in enumerate(range(0, max(rows[split], 1), ROW_GROUP_ROWS)):
                    count = min(ROW_GROUP_ROWS, rows[split] - first)
                    columns, logits = teacher.chunk([self.seed, SPLITS.index(split) + 1, number], count)
                    if split == "test":
                        test.append((logits, columns["label"], columns[domain_column(self.division)]))
                    yield columns
                    progress.update(count)

            for split in SPLITS:
                write_split(folder, split, chunks(split))
        logits, labels, domains = (np.concatenate(parts) for parts in zip(*test, strict=True))
        divisions = sorted(
            (Division("scenario", self.num_domains), Division("segment", self.num_auxiliary_domains)),
            key=lambda division: division.name != self.division,
        )
        per_domain = auc_by_group(logits, labels, domains, divisions[0].num_domains)
        Schema(
            dataset="synthetic",
            label="label",
            sparse_features=tuple(SparseFeature(name, size) for name, size in teacher.vocabulary.items()),
            dense_features=tuple(f"dense_{i}" for i in range(self.num_dense_features)),
            divisions=tuple(divisions),
            rows=rows,
            source={
                "options": asdict(self),
                "teacher_auc": {
                    "test": _finite(auc_by_group(logits, labels, np.zeros_like(domains), 1)[0]),
                    "test_domains": [_finite(value) for value in per_domain],
                },
            },
        ).save(folder)


class Teacher:
    """Draws rows and their labels, a chunk at a time.

    Args:
        config (Synthetic): the options.
    """

    def __init__(self, config: Synthetic) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        sizes = np.geomspace(max(config.num_embeddings / 10, 1), config.num_embeddings, config.num_sparse_features)
        self._sizes = np.maximum(sizes.round().astype(np.int64), 1)
        width = config.num_sparse_features * LATENT_WIDTH + config.num_dense_features
        self._latents = [_normal(rng, int(size), LATENT_WIDTH) for size in self._sizes]
        self._shared = _normal(rng, width, SHARED_UNITS) / np.float32(width**0.5)
        self._readout = _normal(rng, SHARED_UNITS)
        self._scenario = _LowRank(rng, config.num_domains, config.rank, width)
        self._segment = _LowRank(rng, config.num_auxiliary_domains, config.rank, width)
        self._bias = DOMAIN_BIAS * _normal(rng, config.num_domains)
        weights = np.arange(1, config.num_domains + 1) ** -float(config.skew)
        self._cumulative = np.cumsum(weights / weights.sum())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Number of ids of each sparse feature."""
        names = {f"sparse_{i}": int(size) for i, size in enumerate(self._sizes)}
        if not self.config.domain_features:
            return names
        return {**names, "scenario": self.config.num_domains, "segment": self.config.num_auxiliary_domains}

    def chunk(self, seed: list[int], count: int) -> tuple[dict[str, Any], Floats]:
        """Draws some rows.

        Args:
            seed (list[int]): rows depend on the options and this alone.
            count (int): number of rows.

        Returns:
            tuple[dict[str, Any], Floats]: the columns, and the teacher's logits [count].
        """
        rng = np.random.default_rng(seed)
        ids, dense, scenario, segment, x = self._draw(rng, count)
        parts = self._parts(x, scenario, segment)
        logits = sum(scale * part for scale, part in zip(self._scales, parts, strict=True))
        logits = (logits + self._bias[scenario] + MEAN_LOGIT).astype(np.float32)
        labels = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        columns: dict[str, Any] = {"label": labels}
        columns.update((f"sparse_{i}", values) for i, values in enumerate(ids))
        if self.config.domain_features:
            columns.update(scenario=scenario, segment=segment)
        columns.update((f"dense_{i}", values) for i, values in enumerate(dense.T))
        columns.update({domain_column("scenario"): scenario, domain_column("segment"): segment})
        return columns, logits

    @cached_property
    def _scales(self) -> list[float]:
        config = self.config
        _, _, scenario, segment, x = self._draw(np.random.default_rng([config.seed, 4]), _CALIBRATION_ROWS)
        wanted = (config.shared_scale, config.domain_scale, config.auxiliary_scale)
        parts = self._parts(x, scenario, segment)
        return [scale / max(float(part.std()), 1e-6) for scale, part in zip(wanted, parts, strict=True)]

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[list[Ints], Floats, Ints, Ints, Floats]:
        # squared uniforms make low ids frequent, as ids are in practice
        ids = [(size * rng.random(count) ** 2).astype(np.int64) for size in self._sizes]
        dense = _normal(rng, count, self.config.num_dense_features)
        scenario = np.searchsorted(self._cumulative[:-1], rng.random(count), side="right")
        segment = rng.integers(0, self.config.num_auxiliary_domains, count)
        x = np.concatenate([*(table[column] for table, column in zip(self._latents, ids, strict=True)), dense], axis=1)
        return ids, dense, scenario, segment, x

    def _parts(self, x: Floats, scenario: Ints, segment: Ints) -> tuple[Floats, Floats, Floats]:
        return np.tanh(x @ self._shared) @ self._readout, self._scenario(x, scenario), self._segment(x, segment)


class _LowRank:
    """sum_j c_dj tanh(2 p_dj . x) for the domain d of each row."""

    def __init__(self, rng: np.random.Generator, num_domains: int, rank: int, width: int) -> None:
        self._directions = _normal(rng, num_domains, rank, width) / np.float32(width**0.5)
        self._signs = rng.choice(np.array([-1, 1], dtype=np.float32), (num_domains, rank))

    def __call__(self, x: Floats, domains: Ints) -> Floats:
        projected = np.einsum("brw,bw->br", self._directions[domains], x)
        result: Floats = (np.tanh(2 * projected) * self._signs[domains]).sum(axis=1)
        return result


def auc_by_group(scores: Floats, labels: Floats, groups: Ints, num_groups: int) -> NDArray[np.float64]:
    """Exact area under the ROC curve of each group, for scores without ties.

    Args:
        scores (Floats): [n].
        labels (Floats): [n], 0 or 1.
        groups (Ints): [n], in [0, num_groups).
        num_groups (int): number of groups.

    Returns:
        NDArray[np.float64]: [num_groups]; NaN where a group has one class only.

    Example::

        >>> auc_by_group(np.float32([0.1, 0.9, 0.3, 0.2]), np.float32([0, 1, 0, 1]), np.array([0, 0, 1, 1]), 2)
        array([1., 0.])
    """
    order = np.lexsort((scores, groups))
    group, positive = groups[order], labels[order].astype(np.float64)
    totals = np.bincount(group, minlength=num_groups)
    ranks = np.arange(len(order)) - (np.cumsum(totals) - totals)[group] + 1.0
    positives = np.bincount(group, weights=positive, minlength=num_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        wins = np.bincount(group, weights=ranks * positive, minlength=num_groups) - positives * (positives + 1) / 2
        result: NDArray[np.float64] = wins / (positives * (totals - positives))
    return result


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
