"""What the tests of adapters, methods and the sharded runtime share: random rows, backbones, and slow references."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.registry import BACKBONES

DIVISIONS = (Division("scenario", 3), Division("gender", 2))
NUM_EMBEDDINGS = 50
DIM = 8


def schema_of(divisions: Sequence[Division] = DIVISIONS) -> Schema:
    """Three sparse features, two dense ones."""
    sparse = tuple(SparseFeature(name, NUM_EMBEDDINGS) for name in "abc")
    return Schema("random", "label", sparse, ("x", "y"), tuple(divisions), {})


def build_backbone(name: str, batch_norm: bool = True) -> nn.Module:
    """A small backbone of this package, tables on the meta device; `mlp` with batch norm."""
    options: dict[str, Any] = {"batch_norm": batch_norm} if name == "mlp" else {"dense_hidden": (6,)}
    if name == "dlrm_dcn":
        options["dcn_low_rank_dim"] = 3
    return BACKBONES[name](hidden=(10, 5), **options).build(schema_of(), DIM)


def hand_built_dlrm(crossnet: bool = False) -> DLRM:
    """TorchRec's own DLRM, or DLRM_DCN, on the CPU."""
    tables = [
        EmbeddingBagConfig(name=f"t_{n}", embedding_dim=DIM, num_embeddings=NUM_EMBEDDINGS, feature_names=[n])
        for n in "abc"
    ]
    collection = EmbeddingBagCollection(tables=tables)
    if crossnet:
        return DLRM_DCN(collection, 2, [6, DIM], [10, 5, 1], dcn_num_layers=2, dcn_low_rank_dim=3)
    return DLRM(collection, 2, [6, DIM], [10, 5, 1])


@dataclass(frozen=True)
class Rows:
    """Rows in the loader's order, sorted by their combination of domains.

    Args:
        dense (Tensor): [B, 2].
        sparse (Tensor): int64 [B, 3].
        labels (Tensor): [B].
        domains (Tensor): int64 [B, V].
    """

    dense: Tensor
    sparse: Tensor
    labels: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def pick(self, index: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.dense[index], self.sparse[index], self.labels[index], self.domains[index])

    def kjt(self) -> KeyedJaggedTensor:
        """The ids, jagged."""
        lengths = torch.ones(self.sparse.numel(), dtype=torch.int32)
        return KeyedJaggedTensor.from_lengths_sync(["a", "b", "c"], self.sparse.t().flatten(), lengths)

    def batch(self, sizes: Sequence[int], global_rows: int | None = None) -> DomainBatch:
        """The batch that a loader would make of them."""
        domains = BatchDomains.from_sorted(self.domains, sizes)
        return DomainBatch(self.dense, self.kjt(), self.labels, domains, global_rows or len(self))


def random_rows(num_rows: int, divisions: Sequence[Division] = DIVISIONS, seed: int = 0) -> Rows:
    """Random rows that hold every combination of domains, unequally often, where there are rows enough."""
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.minimum(*torch.randint(division.num_domains, (2, num_rows), generator=generator))
        for division in divisions
    ]
    ids = torch.stack(columns, 1)
    combinations = torch.cartesian_prod(*[torch.arange(division.num_domains) for division in divisions])
    ids[: len(combinations)] = combinations.view(len(combinations), -1)[:num_rows]
    return sort_rows(
        Rows(
            torch.rand(num_rows, 2, generator=generator),
            torch.randint(NUM_EMBEDDINGS, (num_rows, 3), generator=generator),
            (torch.rand(num_rows, generator=generator) > 0.5).float(),
            ids,
        )
    )


def sort_rows(rows: Rows) -> Rows:
    """Sorts by combination of domains, first division major, otherwise keeping the order."""
    order = torch.arange(len(rows))
    for column in reversed(rows.domains.unbind(1)):
        order = order[torch.sort(column[order], stable=True).indices]
    return rows.pick(order)


def with_others_changed(rows: Rows, division: int, domain: int, seed: int) -> Rows:
    """New labels and features for all rows but those of one domain; counts and order stay."""
    other = random_rows(len(rows), seed=seed)
    own = rows.domains[:, division] == domain
    return replace(
        rows,
        dense=torch.where(own.unsqueeze(1), rows.dense, 5 * other.dense),
        sparse=torch.where(own.unsqueeze(1), rows.sparse, other.sparse),
        labels=torch.where(own, rows.labels, other.labels),
    )


@torch.no_grad()
def randomise(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Fills parameters and statistics with small random values that depend on the name alone."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            values = 0.4 * torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                values = values.abs() + 0.5
            tensor.copy_(values)


def low_rank_rows(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """``up[d] down[d] x + bias[d]``, row by row: the oracle of the grouped product."""
    if not len(ids):
        return x.new_zeros(0, bias.shape[1]) + 0.0 * (x.sum() + down.sum() + up.sum() + bias.sum())
    return torch.stack([up[d] @ (down[d] @ row) + bias[d] for row, d in zip(x, ids.tolist(), strict=True)])


class CountOps(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def load_example(name: str) -> ModuleType:
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
