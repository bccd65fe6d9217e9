"""A data set: coins, each with a bias of its own, tossed in mints that bend them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrec_mdr.data.datasets.base import Choice, Dataset, stage_defaults
from torchrec_mdr.data.schema import SPLITS, Division, Schema, SparseFeature, domain_column
from torchrec_mdr.data.writer import write_split

MINTS = ("London", "Paris", "Wien")


@dataclass(frozen=True)
class Coins(Dataset):
    """Options of the data set.

    Args:
        rows (int): of each split.
        num_coins (int): coins.
        seed (int): the same seed and options give the same rows.
    """

    rows: int = 2000
    num_coins: int = 10
    seed: int = 0

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return ("mint",)

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`."""
        return {"embeddings.dim": 8, "batch_size": 128, **stage_defaults({"epochs": 8, "learning_rate": 1e-2})}

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        rng = np.random.default_rng(self.seed)
        bias, bend = rng.normal(size=self.num_coins), 2 * rng.normal(size=len(MINTS))
        for split in SPLITS:
            coin, mint = rng.integers(self.num_coins, size=self.rows), rng.integers(len(MINTS), size=self.rows)
            wear = rng.random(self.rows)
            heads = rng.random(self.rows) < 1 / (1 + np.exp(-(bias[coin] + bend[mint] * wear)))
            columns = {"heads": heads.astype(np.float32), "coin": coin, "wear": wear, domain_column("mint"): mint}
            write_split(folder, split, [columns])
        Schema(
            dataset="coins",
            label="heads",
            sparse_features=(SparseFeature("coin", self.num_coins),),
            dense_features=("wear",),
            divisions=(Division("mint", names=MINTS),),
            rows=dict.fromkeys(SPLITS, self.rows),
        ).save(folder)
