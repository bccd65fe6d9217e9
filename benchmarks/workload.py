"""Random rows and stage runs that several benchmarks measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import EmbeddingConfig, EmbeddingOptimizer
from torchrec_mdr.methods import Method
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.stage_runtime import StageRuntime


def click_schema(
    rows: int, num_sparse: int, num_dense: int, divisions: Sequence[Division], smallest: int = 10
) -> Schema:
    """A schema with tables of very unequal size, as click logs have them.

    Args:
        rows (int): embedding rows of all tables together, about.
        num_sparse (int): tables.
        num_dense (int): dense features.
        divisions (Sequence[Division]): the natural one first.
        smallest (int): rows of the smallest table.

    Raises:
        ValueError: fewer rows than so many tables need.

    Example::

        >>> schema = click_schema(1_000_000, 26, 13, [Division("scenario", 20)])
        >>> sizes = [feature.num_embeddings for feature in schema.sparse_features]
        >>> sizes[0], abs(sum(sizes) - 1_000_000) < 1000
        (10, True)
    """
    if rows < smallest * num_sparse:
        raise ValueError(f"{num_sparse} tables need {smallest * num_sparse} embedding rows at least, not {rows}")
    low, high = 0.0, float(np.log(rows / smallest))
    steps = np.linspace(0.0, 1.0, num_sparse)
    for _ in range(100):
        growth = (low + high) / 2
        sizes = smallest * np.exp(growth * steps)
        low, high = (growth, high) if sizes.sum() < rows else (low, growth)
    sparse = tuple(SparseFeature(f"sparse_{i}", int(size)) for i, size in enumerate(sizes.round()))
    dense = tuple(f"dense_{i}" for i in range(num_dense))
    return Schema("random", "label", sparse, dense, tuple(divisions), {})


def random_batches(schema: Schema, batch_size: int, count: int, seed: int = 0) -> list[DomainBatch]:
    """Batches as the loader makes them: rows sorted by their combination of domains, low ids frequent.

    Args:
        schema (Schema): features, and divisions whose domains are equally frequent.
        batch_size (int): rows of each.
        count (int): batches.
        seed (int): the same seed gives the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [division.num_domains for division in schema.divisions]
    batches = []
    for _ in range(count):
        keys = torch.zeros(batch_size, dtype=torch.int64)
        columns = [torch.randint(size, (batch_size,), generator=generator) for size in sizes]
        for column, size in zip(columns, sizes, strict=True):
            keys = keys * size + column
        domains = torch.stack(columns, 1)[keys.argsort()]
        draws = torch.rand(len(schema.sparse_features), batch_size, generator=generator, dtype=torch.float64) ** 2
        tables = torch.tensor([[feature.num_embeddings] for feature in schema.sparse_features])
        values = (draws * tables).long().flatten()
        features = KeyedJaggedTensor(
            keys=[feature.name for feature in schema.sparse_features],
            values=values,
            lengths=torch.ones(values.numel(), dtype=torch.int32),
            stride=batch_size,
        )
        dense = torch.rand(batch_size, len(schema.dense_features), generator=generator)
        labels = (torch.rand(batch_size, generator=generator) < 0.3).float()
        batches.append(DomainBatch(dense, features, labels, BatchDomains.from_sorted(domains, sizes), batch_size))
    return batches


def with_divisions(batches: Iterable[DomainBatch], divisions: Sequence[Division]) -> list[DomainBatch]:
    """The same batches, with the domains of their first divisions alone."""
    sizes = [division.num_domains for division in divisions]
    return [
        DomainBatch(
            batch.dense_features,
            batch.sparse_features,
            batch.labels,
            BatchDomains.from_sorted(batch.domains.ids[:, : len(sizes)].contiguous(), sizes),
            batch.global_rows,
        )
        for batch in batches
    ]


def build_runtime(
    backbone: nn.Module,
    method: Method,
    divisions: Sequence[Division],
    stage: Stage,
    optimizer: EmbeddingOptimizer,
    dim: int,
    environment: Environment,
    compiles: bool = False,
    noise: bool = True,
) -> StageRuntime:
    """A stage as the trainer sets it up, from initial values.

    Args:
        backbone (nn.Module): a new one, tables on the meta device.
        method (Method): the method.
        divisions (Sequence[Division]): that it uses.
        stage (Stage): one of its stages, or another.
        optimizer (EmbeddingOptimizer): of the tables, where they train.
        dim (int): width of the tables.
        environment (Environment): rank, world size, device.
        compiles (bool): whether what holds no table is compiled.
        noise (bool): whether dropout acts and norms go by the statistics of the batch where the backbone is frozen.
    """
    model = MultiDomainModel(backbone, method, divisions)
    weights = torch.ones(divisions[stage.division].num_domains) if stage.per_domain else None
    embeddings = EmbeddingConfig(dim=dim, optimizer=optimizer)
    settings = StageConfig(backbone_noise=noise)
    return StageRuntime(model, stage, settings, embeddings, weights, 0, environment, compiles=compiles)


def floor_of_adapting(
    backbone: nn.Module,
    method: Method,
    divisions: Sequence[Division],
    optimizer: EmbeddingOptimizer,
    dim: int,
    environment: Environment,
) -> StageRuntime:
    """The least that an adapt stage does: the plain model forward, and backward down to the first adapted layer.

    Arguments are those of :func:`build_runtime`.
    """
    floor = Stage("floor", "adapt", frozenset(), Route.BASE)
    runtime = build_runtime(backbone, method, divisions, floor, optimizer, dim, environment)
    first = next(module for module in runtime.model.modules() if isinstance(module, AdapterLinear))
    first.register_forward_hook(lambda _, inputs, output: output.detach().requires_grad_())
    return runtime


def training(runtime: StageRuntime, batches: Sequence[DomainBatch]) -> Callable[[], None]:
    """What trains a stage on all of some batches, each time it is called."""

    def train() -> None:
        for _ in runtime.train(iter(batches)):
            pass

    return train
