"""A small data set as somebody writes it by hand: Parquet files, and a schema.json that is plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = {"train": 600, "validation": 200, "test": 200}
IDS = 12
Domains = Mapping[str, Sequence[str] | int]  # of each division: its domains' names, or their number


def write(
    folder: Path, features: Sequence[str] = ("user", "item"), divisions: Domains | None = None, dense: str = "price"
) -> dict[str, Any]:
    """Writes the folder; a label depends on the first feature and the first division. Gives what schema.json holds."""
    divisions = {"shop": ["north", "south", "west"], "device": 2} if divisions is None else divisions
    sizes = {name: domains if isinstance(domains, int) else len(domains) for name, domains in divisions.items()}
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    taste = rng.normal(0, 2, (next(iter(sizes.values())), IDS))
    for split, rows in ROWS.items():
        table: dict[str, Any] = {name: rng.integers(0, IDS, rows).astype(np.int32) for name in features}
        domains = {f"domain_{name}": rng.integers(0, size, rows).astype(np.int32) for name, size in sizes.items()}
        logits = taste[next(iter(domains.values())), table[features[0]]]
        table["label"] = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        table[dense] = rng.random(rows).astype(np.float32)
        pq.write_table(pa.table(table | domains), folder / f"{split}.parquet")
    content = {
        "version": 1,
        "dataset": "mine",
        "label": "label",
        "sparse_features": [{"name": name, "num_embeddings": IDS} for name in features],
        "dense_features": [dense],
        "divisions": [
            {"name": name, "num_domains": sizes[name], "domain_names": None if isinstance(names, int) else list(names)}
            for name, names in divisions.items()
        ],
        "rows": dict(ROWS),
    }
    (folder / "schema.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return content
