"""Data sets whose preferences are known, since they were drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_mdr.data.schema import Division, Schema, SparseFeature, domain_column
from torchrec_mdr.data.writer import write_split
from torchrec_mdr.experiments.rank_divisions import DivisionScore


def write(folder: Path, labels: Any, sparse: dict[str, Any], divisions: dict[str, Any], **dense: Any) -> str:
    """A prepared training split; there are no other splits to look at."""
    folder.mkdir()
    sizes = {
        name: int(np.max(pa.array(ids).flatten() if isinstance(ids, pa.Array) else ids)) + 1
        for name, ids in sparse.items()
    }
    table = {"label": np.asarray(labels, dtype=np.float32), **sparse, **dense}
    table.update({domain_column(name): ids for name, ids in divisions.items()})
    rows = write_split(str(folder), "train", [table])
    Schema(
        dataset="made",
        label="label",
        sparse_features=tuple(
            SparseFeature(name, size, isinstance(sparse[name], pa.Array)) for name, size in sizes.items()
        ),
        dense_features=tuple(dense),
        divisions=tuple(Division(name, int(ids.max()) + 1) for name, ids in divisions.items()),
        rows={"train": rows, "validation": 0, "test": 0},
    ).save(str(folder))
    return str(folder)


def draw(rng: np.random.Generator, logits: Any) -> Any:
    return (rng.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def by_name(scores: list[DivisionScore]) -> dict[str, DivisionScore]:
    return {score.division: score for score in scores}


def user_data(folder: Path) -> str:
    """Users with strong tastes of their own, of which a little goes by gender."""
    rng = np.random.default_rng(4)
    n, users, genres = 60_000, 600, 8
    user, genre = rng.integers(0, users, n), rng.integers(0, genres, n)
    gender, age, cut = rng.integers(0, 2, users), rng.integers(0, 2, users), rng.integers(0, 20, users)
    taste = rng.normal(0, 1, (users, genres)) + 0.4 * (2 * gender[:, None] - 1) * (-1) ** np.arange(genres)
    labels = draw(rng, taste[user, genre] + rng.normal(0, 1, users)[user])
    divisions = {"age": age, "gender": gender, "cut": cut}
    sparse = {"user": user, "genre": genre, "age": age[user]}
    return write(folder, labels, sparse, {name: ids[user] for name, ids in divisions.items()})
