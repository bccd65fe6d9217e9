"""Tables that nobody has tuned anything on, each made from a seed, as prepared folders with one division, `shop`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_mdr.data.schema import SPLITS, Division, Schema, SparseFeature
from torchrec_mdr.data.writer import write_split

Columns = dict[str, NDArray]


def differing_domains(folder: Path, seed: int, rows: int = 4_000, domains: int = 3, items: int = 50) -> Path:
    """Few rows of domains that differ in taste; the domain is no feature."""
    rng = np.random.default_rng(seed)
    domain, item, user = (rng.integers(0, size, rows) for size in (domains, items, items))
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    taste, habit, slope = rng.normal(size=(domains, items)), rng.normal(size=items), rng.normal(size=(domains, 2))
    logits = 1.2 * taste[domain, item] + 0.8 * habit[user] + (slope[domain] * x).sum(1) - 0.5
    columns = {"item": item, "user": user, "x0": x[:, 0], "x1": x[:, 1], "domain_shop": domain}
    return _write(folder, rng, columns, logits, {"item": items, "user": items}, domains)


def many_domains(folder: Path, seed: int, known: bool, rows: int = 60_000, domains: int = 300) -> Path:
    """Domains whose sizes follow Zipf's law and whose tastes are mixtures of four kinds; by wish a feature, too."""
    items = 100
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, domains + 1)
    domain = rng.choice(domains, rows, p=share / share.sum())
    a, b = (rng.integers(0, items, rows) for _ in range(2))
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    kinds, mixture = rng.normal(size=(4, 6)), rng.dirichlet(np.full(4, 0.5), domains)
    latent = rng.normal(size=(2, items, 3))
    seen = np.concatenate([latent[0][a] + latent[1][b], x], 1)
    logits = np.tanh(seen @ rng.normal(size=(6, 8)) / 2.4) @ rng.normal(size=8) / 2
    logits += np.einsum("rj,rj->r", (mixture @ kinds)[domain], seen) / np.sqrt(3)
    logits += 0.5 * rng.normal(size=domains)[domain] - 0.7
    own = {"shop": domain} if known else {}
    columns = {"a": a, "b": b, **own, **_numbers(x), "domain_shop": domain}
    return _write(folder, rng, columns, logits, {"a": items, "b": items, **dict.fromkeys(own, domains)}, domains)


def interactions(folder: Path, seed: int, rows: int = 50_000) -> Path:
    """Eight categorical and six numeric features that act alone and in pairs; the division is one of them."""
    rng = np.random.default_rng(seed)
    sizes = [2, 5, 7, 9, 14, 16, 42, 90]
    kinds = [(size * rng.random(rows) ** 1.5).astype(np.int64) for size in sizes]
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    logits = 0.5 * sum(rng.normal(size=size)[kind] for size, kind in zip(sizes, kinds, strict=True))
    logits = logits + 0.4 * x @ rng.normal(size=6) - 1.2
    for i, j in ((0, 3), (1, 4), (2, 5), (4, 6)):
        logits += 0.6 * rng.normal(size=(sizes[i], sizes[j]))[kinds[i], kinds[j]]
    logits += 0.5 * x[:, 0] * x[:, 1] - 0.5 * np.abs(x[:, 2]) * (2 * kinds[0] - 1)
    logits += 0.7 * rng.normal(size=sizes[3])[kinds[3]] * x[:, 3]
    columns = {f"c{i}": kind for i, kind in enumerate(kinds)} | _numbers(x) | {"domain_shop": kinds[1]}
    return _write(folder, rng, columns, logits, {f"c{i}": size for i, size in enumerate(sizes)}, sizes[1])


def table(folder: Path, split: str) -> tuple[pl.DataFrame, NDArray]:
    """The features of a split, categorical ones as text, and its labels, for other people's models."""
    schema, rows = Schema.load(str(folder)), pl.read_parquet(folder / f"{split}.parquet")
    sparse = [pl.col(feature.name).cast(pl.String) for feature in schema.sparse_features]
    return rows.select(*sparse, *schema.dense_features), rows["label"].to_numpy()


def _numbers(x: NDArray) -> Columns:
    return {f"x{i}": column for i, column in enumerate(x.T)}


def _write(
    folder: Path, rng: np.random.Generator, columns: Columns, logits: NDArray, sizes: dict[str, int], domains: int
) -> Path:
    """Draws labels, and splits rows 80/10/10 at random."""
    rows = len(logits)
    columns = {"label": (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32), **columns}
    folder.mkdir(parents=True)
    order, ends = rng.permutation(rows), (int(0.8 * rows), int(0.9 * rows))
    parts = dict(zip(SPLITS, np.split(order, ends), strict=True))
    for split, part in parts.items():
        write_split(str(folder), split, [{name: values[part] for name, values in columns.items()}])
    Schema(
        dataset=folder.name,
        label="label",
        sparse_features=tuple(SparseFeature(name, size) for name, size in sizes.items()),
        dense_features=tuple(name for name in columns if name.startswith("x")),
        divisions=(Division("shop", domains),),
        rows={split: len(part) for split, part in parts.items()},
    ).save(str(folder))
    return folder
