"""Raw rows as users have them, of every kind of column."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from torchrec_mdr.data.importing.options import ImportOptions
from torchrec_mdr.data.importing.prepare import Imported, import_rows

SHOPS = ("cart", "home", "mail", "search")


def rows(count: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Clicks whose probability depends on shop and item."""
    rng = np.random.default_rng(seed)
    shop, item = rng.integers(0, 4, count), rng.integers(0, 40, count)
    taste = np.random.default_rng(1).normal(0, 2, (4, 40))
    genres = np.array(["a", "b", "c", "d"])
    start = datetime(2024, 1, 1)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, count // 10, count) + 10**12,
            "item": [f"i{i}" for i in item],
            "shop": np.array(SHOPS)[shop],
            "price": [None if rng.random() < 0.1 else float(x) for x in np.exp(rng.normal(2, 1.5, count))],
            "age": rng.integers(18, 80, count),
            "genres": ["|".join(genres[rng.random(4) < 0.4]) for _ in range(count)],
            "time": [start + timedelta(seconds=int(s)) for s in np.sort(rng.integers(0, 90 * 86400, count))],
            "member": rng.random(count) < 0.5,
            "constant": 1,
            "request": [f"r{i}" for i in range(count)],
            "clicked": (rng.random(count) < 1 / (1 + np.exp(-taste[shop, item]))).astype(int),
        }
    )


def prepare(table: Any, folder: Path, **options: Any) -> Imported:
    """Prepares a frame, or paths, in `folder/made`."""
    given = {"label": "clicked", "domain": "shop", **options}
    frame = table if isinstance(table, pl.DataFrame) else None
    paths = {} if frame is not None else {"input": [str(path) for path in table]}
    return import_rows(ImportOptions(**given, **paths), str(folder / "made"), frame)


def split(imported: Imported, name: str) -> pl.DataFrame:
    """A prepared split."""
    return pl.read_parquet(f"{imported.folder}/{name}.parquet")


def kinds(imported: Imported) -> dict[str, str]:
    """What each column was taken for."""
    return {column.name: column.kind for column in imported.decision.columns}
