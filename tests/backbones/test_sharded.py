"""Backbones in TorchRec's sharded pipeline, with the fused kernel, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.backbones.conftest import CASES
from tests.ranks import RankPool
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.registry import BACKBONES

CPU = torch.device("cpu")


class Training(nn.Module):
    """A model with its loss, as the pipeline wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def shard(training: Training, optimizer: type[torch.optim.Optimizer], lr: float) -> DistributedModelParallel:
    names = []
    for module in training.modules():
        if isinstance(module, EmbeddingBagCollection):
            apply_optimizer_in_backward(optimizer, module.parameters(), {"lr": lr})
            names += [config.name for config in module.embedding_bag_configs()]
    constraints = {name: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for name in names}
    planner = EmbeddingShardingPlanner(Topology(world_size=1, compute_device="cpu"), constraints=constraints)
    sharders = [EmbeddingBagCollectionSharder()]
    return DistributedModelParallel(
        training,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=CPU,
        plan=planner.plan(training, sharders),
        sharders=sharders,
    )


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with every shard in place of its table: with one rank there is one."""
    return {
        name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in state.items()
    }


def train_twice(name: str, schema: Schema, batches: list[DomainBatch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Trains a backbone in the pipeline and in a plain loop from the same start; every state entry of both."""
    options = {} if name.startswith("dlrm") else {"batch_norm": True}
    plain = Training(materialize_tables(BACKBONES[name](hidden=(12, 6), **options).build(schema, 8)))
    sharded = shard(Training(BACKBONES[name](hidden=(12, 6), **options).build(schema, 8)), torch.optim.SGD, lr=0.1)
    start = plain.state_dict()
    for key, value in whole(sharded.state_dict()).items():
        value.copy_(start[key])

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        plain(batch)[0].backward()
        optimizer.step()

    dense = [parameter for key, parameter in sharded.named_parameters() if "embedding_bags" not in key]
    pipeline = TrainPipelineSparseDist(sharded, torch.optim.SGD(dense, lr=0.1), CPU)
    iterator = iter(batches)
    for _ in batches:
        pipeline.progress(iterator)
    collections = sum(isinstance(module, EmbeddingBagCollection) for module in plain.modules())
    assert len(pipeline._pipelined_modules) == collections

    trained = whole(sharded.state_dict())
    return {key: (value.detach(), trained[key]) for key, value in plain.state_dict().items()}


@pytest.mark.parametrize(("name", "num_dense"), CASES)
def test_the_pipeline_trains_what_a_plain_loop_trains(
    name: str, num_dense: int, one_rank: RankPool, make_schema: Callable, make_batches: Callable
) -> None:
    schema = make_schema(num_dense)
    for key, (plain, sharded) in one_rank.run(train_twice, name, schema, make_batches(schema, 4))[0].items():
        assert torch.allclose(plain, sharded, atol=1e-5), key


def first_order_step(schema: Schema, batch: DomainBatch) -> tuple[Tensor, Tensor]:
    """One step of row-wise Adagrad on first-order weights: the gradient and the weights after it."""
    plain = Training(materialize_tables(LinearArch.from_schema(schema)))
    plain(batch)[0].backward()
    sharded = shard(Training(LinearArch.from_schema(schema)), RowWiseAdagrad, lr=0.1)
    sharded(batch)[0].backward()
    bag = "model.sparse_arch.embedding_bag_collection.embedding_bags.linear_f0.weight"
    return plain.get_parameter(bag).grad, whole(sharded.state_dict())[bag]


def test_row_wise_adagrad_steps_twice_as_far_on_first_order_weights(
    one_rank: RankPool, make_schema: Callable, make_batches: Callable
) -> None:
    schema = make_schema()
    gradient, weight = one_rank.run(first_order_step, schema, make_batches(schema, 1)[0])[0]
    assert gradient[:, 0].any() and not gradient[:, 1:].any() and not weight[:, 1:].any()
    assert torch.allclose(weight[:, 0], -2 * 0.1 * gradient[:, 0].sign(), atol=1e-3)


@pytest.fixture
def make_batches(make_rows: Callable) -> Callable[[Schema, int], list[DomainBatch]]:
    def make(schema: Schema, count: int) -> list[DomainBatch]:
        torch.manual_seed(0)
        batches = []
        for _ in range(count):
            dense, ids, sparse_features = make_rows(schema, 16)
            domains = BatchDomains.from_ids(torch.zeros(16, dtype=torch.int64), [1])
            labels = (ids.sum(dim=1) % 2).float()
            batches.append(DomainBatch(dense, sparse_features, labels, domains, global_rows=16))
        return batches

    return make
