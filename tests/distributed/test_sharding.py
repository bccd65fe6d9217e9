"""Tables: their initial values, their freezing, and what sharding refuses."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.planner import Topology

from tests.distributed.stage_runs import (
    ADAM,
    ROWWISE,
    Job,
    batches,
    environment,
    jobs,
    make_runtime,
    some_rows,
    train,
    whole,
)
from tests.helpers import DIM, build_backbone
from tests.ranks import RankPool
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.distributed import sharding
from torchrec_mdr.distributed.sharding import EmbeddingConfig, Sharding
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.methods.stage import pretrain_stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.stage_runtime import StageRuntime

METHOD = MLoRA(rank=2)


def initial_tables(config: EmbeddingConfig, backbone: str, block: int, seed: int) -> dict[str, Tensor]:
    """The tables of a new runtime, drawn in blocks of a few rows; 256 wide, so that column-wise sharding cuts them."""
    sharding._INIT_BLOCK, before = block, sharding._INIT_BLOCK
    schema = Schema("random", "label", (SparseFeature("a", 50), SparseFeature("b", 7)), (), (Division("d", 2),), {})
    model = MultiDomainModel(BACKBONES[backbone](hidden=(4,)).build(schema, 256), METHOD, schema.divisions)
    try:
        runtime = StageRuntime(model, pretrain_stage(), StageConfig(), config, None, seed, environment())
    finally:
        sharding._INIT_BLOCK = before
    return whole(runtime.state(frozenset({ParameterGroup.EMBEDDINGS})))


def of(kind: Sharding) -> EmbeddingConfig:
    return EmbeddingConfig(dim=256, optimizer="adam" if kind == "data_parallel" else "sgd", sharding=kind)


def test_initial_tables_are_the_same_for_every_sharding_and_number_of_ranks(
    one_rank: RankPool, two_ranks: RankPool
) -> None:
    first = one_rank.run(initial_tables, of("data_parallel"), "mlp", 16, 0)[0]
    assert [tuple(table.shape) for table in first.values()] == [(50, 256), (7, 256)]
    for pool in (one_rank, two_ranks):
        for kind in ("data_parallel", "table_wise", "row_wise", "column_wise"):
            for tables in pool.run(initial_tables, of(kind), "mlp", 16, 0):
                assert all(torch.equal(table, first[name]) for name, table in tables.items()), kind
    large, small = first.values()
    assert large.abs().max() <= 50**-0.5 and small.abs().max() <= 7**-0.5  # TorchRec's own bounds
    assert large.abs().max() > 0.99 * 50**-0.5 and abs(large.mean()) < 0.01 * 50**-0.5
    assert len(large.unique(dim=0)) == 50 and not torch.equal(large[:7], small)
    other = one_rank.run(initial_tables, of("data_parallel"), "mlp", 16, 1)[0]
    assert not any(torch.equal(table, first[name]) for name, table in other.items())


def test_first_order_weights_start_at_zero(one_rank: RankPool) -> None:
    for name, table in one_rank.run(initial_tables, of("table_wise"), "wdl", 16, 0)[0].items():
        assert table.any() == ("linear_" not in name), name


@pytest.mark.parametrize("config", [ADAM, ROWWISE, EmbeddingConfig(dim=DIM, optimizer="adam", sharding="row_wise")])
def test_frozen_tables_may_be_sharded_in_any_way_and_do_not_move(config: EmbeddingConfig, two_ranks: RankPool) -> None:
    job = replace(jobs(METHOD, "dlrm")[1], embeddings=config)
    for outcome in two_ranks.run(train, job, some_rows(2)):
        tables = {n: t for n, t in outcome.before.items() if outcome.groups[n] is ParameterGroup.EMBEDDINGS}
        assert len(tables) == 3
        assert all(torch.equal(table, outcome.after[name]) for name, table in tables.items())
        assert not any("embedding_bags" in name for name in outcome.optimizer)


def gradients_of_lookups(job: Job) -> list[bool]:
    runtime = make_runtime(job)
    seen: list[bool] = []

    def look(module: object, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):  # and not the tracer's proxy
            seen.append(output.requires_grad)

    runtime.model.backbone.sparse_arch.register_forward_hook(look)
    list(runtime.train(batches(job, some_rows(2))))
    return seen


def test_frozen_lookups_run_without_gradients(one_rank: RankPool) -> None:
    pretrain, adapt = jobs(METHOD, "dlrm")
    assert one_rank.run(gradients_of_lookups, pretrain)[0] == [True, True]
    assert one_rank.run(gradients_of_lookups, adapt)[0] == [False, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            EmbeddingConfig(DIM, "adam", "row_wise"),
            "'row_wise' of table 't_a' needs a fused optimizer, and fbgemm has no",
        ),
        (EmbeddingConfig(DIM, "adam", "auto", {"b": "table_wise"}), "'table_wise' of table 't_b' needs a fused"),
        (EmbeddingConfig(DIM, "sgd", "data_parallel"), "'data_parallel' of table 't_a' trains with Adam only"),
        (EmbeddingConfig(DIM, "sgd", "auto", {"z": "table_wise"}), "table_sharding names 'z', .* they are a, b, c"),
    ],
)
def test_what_cannot_be_had_is_refused(config: EmbeddingConfig, message: str, one_rank: RankPool) -> None:
    job = replace(jobs(METHOD, "mlp")[0], embeddings=config)
    with pytest.raises(ValueError, match=message):
        one_rank.run(train, job, some_rows(1))


def plan_of(job: Job) -> dict[str, str]:
    plan = make_runtime(job).sharded.plan.plan.values()
    return {table: sharding.sharding_type for tables in plan for table, sharding in tables.items()}


def test_sharding_is_chosen_by_table(two_ranks: RankPool) -> None:
    pretrain = jobs(METHOD, "mlp")[0]
    chosen = two_ranks.run(plan_of, replace(pretrain, embeddings=ROWWISE))[0]
    assert chosen == {"t_a": "row_wise", "t_b": "column_wise", "t_c": "table_wise"}
    everything = EmbeddingConfig(DIM, "sgd", "row_wise", {"c": "table_wise"})
    chosen = two_ranks.run(plan_of, replace(pretrain, embeddings=everything))[0]
    assert chosen == {"t_a": "row_wise", "t_b": "row_wise", "t_c": "table_wise"}
    assert set(two_ranks.run(plan_of, pretrain)[0].values()) == {"data_parallel"}


def test_one_rank_cuts_nothing_and_sends_nothing_that_is_frozen(one_rank: RankPool) -> None:
    automatic = EmbeddingConfig(DIM, "rowwise_adagrad")
    chosen = [one_rank.run(plan_of, replace(job, embeddings=automatic))[0] for job in jobs(METHOD, "mlp")]
    assert [set(types.values()) for types in chosen] == [{"table_wise"}, {"data_parallel"}]
    asked = replace(jobs(METHOD, "mlp")[1], embeddings=EmbeddingConfig(DIM, "rowwise_adagrad", "row_wise"))
    assert set(one_rank.run(plan_of, asked)[0].values()) == {"row_wise"}


def storage_of(job: Job, local_world_size: int) -> tuple[dict[str, list[int]], list[bool]]:
    """Bytes of each table's shards as the planner sees them and its topology's facts; tables with a mark left."""
    seen: dict[str, list[int]] = {}

    class Planner(sharding.EmbeddingShardingPlanner):  # type: ignore[misc]
        def __init__(self, topology: Topology, **options: Any) -> None:
            super().__init__(topology=topology, **options)
            seen["machine"] = [topology.local_world_size, topology.devices[0].storage.ddr]

        def plan(self, module: nn.Module, sharders: Any) -> Any:
            for option in self._enumerator.enumerate(module, sharders):
                seen[option.name] = [shard.storage.ddr for shard in option.shards]
            return super().plan(module, sharders)

    before, sharding.EmbeddingShardingPlanner = sharding.EmbeddingShardingPlanner, Planner  # type: ignore[misc]
    try:
        where = replace(environment(), local_world_size=local_world_size)
        model = MultiDomainModel(build_backbone(job.backbone), job.method, job.divisions)
        runtime = StageRuntime(model, job.stage, job.settings, job.embeddings, None, 7, where)
    finally:
        sharding.EmbeddingShardingPlanner = before  # type: ignore[misc]
    return seen, [hasattr(parameter, "_optimizer_classes") for parameter in runtime.model.parameters()]


def test_the_planner_knows_the_machine_and_the_optimizers_state(one_rank: RankPool) -> None:
    job = jobs(METHOD, "mlp")[0]
    found = {
        name: one_rank.run(storage_of, replace(job, embeddings=EmbeddingConfig(DIM, name, "table_wise")), 4)[0]
        for name in ("sgd", "rowwise_adagrad", "adagrad")
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for seen, marks in found.values():
        assert seen["machine"][1] <= memory // 4 and not any(marks)
    sgd, rowwise, adagrad = (found[name][0]["t_a"][0] for name in ("sgd", "rowwise_adagrad", "adagrad"))
    weights = 4 * 50 * DIM
    assert adagrad - sgd == weights and rowwise - sgd == weights // DIM


def test_tables_that_fit_nowhere_are_refused_in_a_sentence(one_rank: RankPool) -> None:
    with pytest.raises(ValueError, match="finds no way to place the embedding tables on 1 ranks"):
        one_rank.run(huge)


def huge() -> None:
    schema = Schema("d", "label", (SparseFeature("a", 2**31 - 1),), (), (Division("d", 2),), {})
    model = MultiDomainModel(BACKBONES["mlp"](hidden=(4,)).build(schema, 4096), METHOD, schema.divisions)
    config = EmbeddingConfig(4096, "sgd", "table_wise")
    StageRuntime(model, pretrain_stage(), StageConfig(), config, None, 0, environment())
