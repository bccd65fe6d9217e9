"""A training loop of somebody else: batch class, planner, fused optimizers, pipeline and checkpoints of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

DOMAINS = 4
ROWS = 40
CPU = torch.device("cpu")
STEPS = 3
TABLES = ("t_user", "t_item", "t_scenario", "s_item", "p_user")  # of all models here


@dataclass
class Clicks(Pipelineable):
    """A batch; ids of scenarios are in the sparse features, too."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    scenario: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Clicks:
        return Clicks(*(value.to(device, non_blocking=non_blocking) for value in vars(self).values()))

    def record_stream(self, stream: torch.Stream) -> None:
        for value in vars(self).values():
            value.record_stream(stream)


def clicks(seed: int, domains: int = DOMAINS, rows: int = ROWS) -> Clicks:
    """A rank's batch of a step: bags of one to three ids; the last domain is absent."""
    generator = torch.Generator().manual_seed(1000 * seed + (dist.get_rank() if dist.is_initialized() else 0))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    scenario, lengths = integers(domains - 1, rows), 1 + integers(3, 2 * rows)
    lengths = torch.cat([lengths, torch.ones(rows, dtype=torch.int64)])
    values = torch.cat([integers(30, int(lengths[: 2 * rows].sum())), scenario])
    features = KeyedJaggedTensor.from_lengths_sync(["user", "item", "scenario"], values, lengths)
    return Clicks(torch.rand(rows, 4, generator=generator), features, integers(2, rows), scenario)


def build_dlrm(kind: str = "dlrm", device: str = "meta", dense_device: str = "cpu") -> nn.Module:
    """TorchRec's, with three tables."""
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=8, num_embeddings=30, feature_names=[name])
        for name in ("user", "item", "scenario")
    ]
    common: dict[str, Any] = {
        "embedding_bag_collection": EmbeddingBagCollection(tables=tables, device=torch.device(device)),
        "dense_in_features": 4,
        "dense_arch_layer_sizes": [6, 8],
        "over_arch_layer_sizes": [10, 6, 1],
        "dense_device": torch.device(dense_device),
    }
    if kind == "dcn":
        return DLRM_DCN(**common, dcn_num_layers=2, dcn_low_rank_dim=3)
    if kind == "projection":
        branches = {"interaction_branch1_layer_sizes": [12, 16], "interaction_branch2_layer_sizes": [12, 16]}
        return DLRM_Projection(**common, **branches)
    return DLRM(**common)


def shard(train_model: nn.Module) -> DistributedModelParallel:
    """As dlrm_main.py does it: Adagrad in the backward pass, the planner's plan."""
    tables = (
        parameter
        for module in train_model.modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
        for parameter in module.parameters()
    )
    apply_optimizer_in_backward(torch.optim.Adagrad, tables, {"lr": 0.1})
    # tables as small as these would be copied to all ranks otherwise, and have no fused optimizer
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in TABLES}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(train_model, get_default_sharders(), dist.group.WORLD)
    return DistributedModelParallel(train_model, device=CPU, plan=plan)


def dense_optimizer(dmp: DistributedModelParallel) -> KeyedOptimizer:
    """The plain loop's, of everything but the tables."""
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    return KeyedOptimizerWrapper(parameters, lambda params: torch.optim.Adagrad(params, lr=0.01))


def fit(dmp: DistributedModelParallel, optimizer: KeyedOptimizer, batches: list[Clicks]) -> list[float]:
    """Trains on all batches by the pipeline; the losses."""
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU, execute_all_batches=True)
    source: Iterator[Clicks] = iter(batches)
    losses = [float(pipeline.progress(source)[0]) for _ in batches]
    pipeline.detach()
    return losses


def combined(dmp: DistributedModelParallel, other: KeyedOptimizer) -> CombinedOptimizer:
    """The tables' fused optimizer and another one."""
    return CombinedOptimizer([dmp.fused_optimizer, other])


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of a state dict's tensors, nested or flat, of this rank's shards alone where they are sharded."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": tensor for inner, tensor in whole(value).items()}
        elif isinstance(value, ShardedTensor):
            found |= {f"{name}@{i}": shard.tensor.detach().clone() for i, shard in enumerate(value.local_shards())}
        else:
            found[name] = value.detach().clone()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are not bitwise the same."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
