"""Scores of encoded rows: known domains by the method's own way, unknown ones by the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.features import EncodedRows
from torchrec_mdr.data.schema import Division, Schema, domain_column
from torchrec_mdr.inference.run import Run
from torchrec_mdr.inference.scorer import Domains, Scorer
from torchrec_mdr.inference.untrained import untrained_rows


class RowScores(NamedTuple):
    """What a model makes of n rows.

    Args:
        logits (NDArray): float32 or float64 [n], NaN where a row has no score.
        reasons (pl.Series): String [n], why a row has no score; null where it has one.
        unknown (pl.Series): String [n], the divisions whose domain is unknown, with commas; null where all are known.
    """

    logits: NDArray[np.floating]
    reasons: pl.Series
    unknown: pl.Series

    @property
    def probabilities(self) -> pl.Series:
        """Float64 [n], null where a row has no score."""
        good = np.isfinite(self.logits)
        scores = 1.0 / (1.0 + np.exp(-np.where(good, self.logits, 0.0).astype(np.float64)))
        return where(good, pl.Series("score", scores))


class RunScorer:
    """Scores rows by a run's model.

    A row of an unknown domain is scored by the pretrained backbone, as in a run's `test_backbone`. Where the method has
    none, such a row has no score but a reason. Where the domain is a feature, too, the id of unknown ones, which no
    training row had, is looked up as the mean of its table's rows, as in a bundle.

    Args:
        run (Run): see :func:`~torchrec_mdr.inference.load_run`.
        batch_size (int | None): rows that go through the model together; 16,384 where left out, and 4,096 where the
            adapters of their domains are read on demand.
    """

    def __init__(self, run: Run, batch_size: int | None = None) -> None:
        self.run = run
        self.batch_size = batch_size or (16384 if run.model.bank_tables is None else 4096)
        self.method = run.experiment.method
        self.has_backbone = self.method.serves_unknown_domains(run.divisions)
        self._means = [(weight, row, weight.detach().mean(0)) for weight, row in untrained_rows(run)]

    def __call__(self, rows: EncodedRows, route: Route | None = None) -> RowScores:
        """Scores rows in their order.

        Args:
            rows (EncodedRows): n rows in the form of the run's data.
            route (Route | None): another way than the method's own; BASE is the backbone alone.
        """
        run = self.run
        logits = np.full(len(rows), np.nan, dtype=np.float32)
        unknown = np.stack([rows.unknown[division.name].to_numpy() for division in run.divisions], axis=1)
        some = np.asarray(unknown.any(axis=1))
        own = np.stack([rows.columns[domain_column(d.name)].to_numpy() for d in run.divisions], axis=1)
        ids = np.where(unknown, -1, own).astype(np.int64)
        nowhere = unknown.all(axis=1)
        reasons = rows.errors
        if not self.has_backbone and some.any():
            complaint = (
                f"the domain is unknown to training, and method '{run.config.method}' has no backbone of its own to "
                "score it by"
            )
            strangers = where(some, pl.repeat(complaint, len(rows), eager=True))
            reasons = pl.select(pl.coalesce(reasons, strangers)).to_series()
        good = reasons.is_null().to_numpy()
        with self._mean_rows():
            self._fill(logits, rows.columns, ids, np.flatnonzero(good & ~nowhere), route or self.method.route)
            self._fill(logits, rows.columns, np.zeros_like(ids), np.flatnonzero(good & nowhere), Route.BASE)
        return RowScores(logits, reasons.alias("reason"), unknown_divisions(unknown, run.divisions))

    @contextmanager
    def _mean_rows(self) -> Iterator[None]:
        """The rows of unknown domains' ids hold their tables' means for a while; the run's model stays as it is."""
        drawn = [weight[row].detach().clone() for weight, row, _ in self._means]
        with torch.no_grad():
            for weight, row, mean in self._means:
                weight[row] = mean
        try:
            yield
        finally:
            with torch.no_grad():
                for (weight, row, _), values in zip(self._means, drawn, strict=True):
                    weight[row] = values

    def _fill(
        self,
        logits: NDArray[np.float32],
        columns: pl.DataFrame,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        route: Route,
    ) -> None:
        """Puts the logits of some rows into their places."""
        model = self.run.model
        device = next(model.parameters()).device
        with torch.no_grad(), model.routed(route):
            for start in range(0, len(rows), self.batch_size):
                index = rows[start : start + self.batch_size]
                dense, sparse = features(columns[index], self.run.schema)
                domain_ids = torch.from_numpy(ids[index]).to(device)
                found: Tensor = model(dense.to(device), sparse.to(device), domain_ids)
                logits[index] = found.flatten().cpu().numpy()


class BundleScorer:
    """Scores rows by an open bundle, as :class:`RunScorer` does by a run, calibrated where the bundle is.

    Args:
        scorer (Scorer): the bundle.
        batch_size (int): rows that are scored together.
    """

    def __init__(self, scorer: Scorer, batch_size: int = 16384) -> None:
        self.scorer = scorer
        self.batch_size = batch_size

    def __call__(self, rows: EncodedRows) -> RowScores:
        """Scores rows in their order.

        A domain that was put under a new name is known by that name; one that has no adapter any more is unknown.
        """
        manifest = self.scorer.manifest
        names = [division.name for division in manifest.divisions]
        ids = np.stack([rows.columns[domain_column(name)].to_numpy() for name in names], axis=1).astype(np.int64)
        ids = np.where(np.stack([rows.unknown[name].to_numpy() for name in names], axis=1), -1, ids)
        domains, unknown = self._with_new_names(rows, ids)
        logits, reasons = np.full(len(rows), np.nan), rows.errors
        good = reasons.is_null().to_numpy()
        if not manifest.has_backbone:
            unknown = ~self.scorer.known(_given(domains)).numpy()
            strangers = np.asarray(unknown.any(axis=1))
            good = good & ~strangers
            complaint = pl.repeat("the domain is unknown, and the method has no backbone", len(rows), eager=True)
            reasons = pl.select(pl.coalesce(reasons, where(strangers, complaint))).to_series()
        for place in np.split(np.flatnonzero(good), range(self.batch_size, int(good.sum()), self.batch_size)):
            dense, sparse = features(rows.columns[place], self.scorer.schema)
            scores = self.scorer.score(dense, sparse, _given(domains[place]))
            logits[place] = scores.calibrated.numpy()
            unknown[place] = ~scores.known.numpy()
        return RowScores(logits, reasons.alias("reason"), unknown_divisions(unknown, manifest.divisions))

    def _with_new_names(
        self, rows: EncodedRows, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | NDArray[np.object_], NDArray[np.bool_]]:
        """The rows' domains [n, V], as names where some are new to training, and which are unknown."""
        unknown, serving = np.asarray(ids < 0), self.scorer.store.current().serving
        named = np.empty(ids.shape, dtype=object)
        found = False
        for v, division in enumerate(self.scorer.manifest.divisions):
            added = set(serving.get(division.name, {})) - set(division.domain_names)
            new = rows.names[division.name].is_in(list(added)).fill_null(False).to_numpy()
            named[:, v] = np.array([*division.domain_names, None], dtype=object)[ids[:, v]]  # -1 is the last one
            named[new, v] = rows.names[division.name].filter(new).to_numpy()
            unknown[new, v] = False
            found = found or bool(new.any())
        return (named if found else ids), unknown


def _given(domains: NDArray[np.int64] | NDArray[np.object_]) -> Domains:
    """As a scorer takes them."""
    return domains.tolist() if domains.dtype == object else torch.from_numpy(domains)


def unknown_divisions(unknown: NDArray[np.bool_], divisions: Sequence[Division]) -> pl.Series:
    """Names of the divisions that do not know a row's domain, with commas; null where all do.

    Args:
        unknown (NDArray): bool [n, V].
        divisions (Sequence[Division]): V of them.
    """
    names = [where(unknown[:, v], pl.repeat(d.name, len(unknown), eager=True)) for v, d in enumerate(divisions)]
    text = pl.select(pl.concat_str(names, separator=",", ignore_nulls=True)).to_series()
    return where(np.asarray(unknown.any(axis=1)), text).alias("unknown_domain")


def where(good: NDArray[np.bool_], values: pl.Series) -> pl.Series:
    """The values where a mask is true, null elsewhere."""
    return values.set(~pl.Series(good), None)


def features(columns: pl.DataFrame, schema: Schema) -> tuple[Tensor, KeyedJaggedTensor]:
    """Rows in a schema's form, as a model takes them.

    Args:
        columns (pl.DataFrame): n rows with the schema's features, whose ids are in range.
        schema (Schema): names the features.

    Returns:
        tuple: dense features, float32 [n, num_dense_features]; ids of the sparse features.

    Example::

        >>> from torchrec_mdr.data.schema import SparseFeature
        >>> schema = Schema("d", "y", (SparseFeature("item", 9), SparseFeature("tags", 9, True)), ("price",), (), {})
        >>> frame = pl.DataFrame({"item": [7, 8], "tags": [[1, 2], []], "price": [0.5, 1.0]})
        >>> dense, sparse = features(frame, schema)
        >>> dense.tolist(), sparse.values().tolist(), sparse.lengths().tolist()
        ([[0.5], [1.0]], [7, 8, 1, 2], [1, 1, 2, 0])
    """
    dense = np.empty((columns.height, len(schema.dense_features)), dtype=np.float32)
    for place, name in enumerate(schema.dense_features):
        dense[:, place] = columns[name].to_numpy()
    values, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for feature in schema.sparse_features:
        column = columns[feature.name]
        if isinstance(column.dtype, pl.List):
            lengths.append(column.list.len().to_numpy().astype(np.int32))
            values.append(column.filter(column.list.len() > 0).explode().to_numpy().astype(np.int64))
        else:
            lengths.append(np.ones(columns.height, dtype=np.int32))
            values.append(column.to_numpy().astype(np.int64))
    sparse = KeyedJaggedTensor(
        keys=[feature.name for feature in schema.sparse_features],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=columns.height,
    )
    return torch.from_numpy(dense), sparse
