"""Sharded banks in a training loop of somebody else: their planner, fused optimizers, pipeline and checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from tests.loop.foreign import CPU, DOMAINS, TABLES, build_dlrm, clicks, differing, fit, whole
from tests.ranks import RankPool
from torchrec_mdr import Division, MLoRA, MultiDomainModel, MultiDomainTrain, Route, prepare_stage
from torchrec_mdr.distributed.bank_sharding import BankSharder, BankTraining, bank_constraints

State = dict[str, Tensor]


def build(rate: float = 0.1) -> tuple[MultiDomainModel, DistributedModelParallel, object]:
    """A model whose adapters are sharded, and the loop's own sharding of it."""
    torch.manual_seed(3)  # all ranks build the same dense part
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)], banks="sharded")
    stage = prepare_stage(model, "adapt")
    train_model = MultiDomainTrain(model, "scenario")
    sharders = [s for s in get_default_sharders() if s.module_type is not BankSharder().module_type]
    sharders.append(BankSharder(BankTraining("rowwise_adagrad", rate)))
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in TABLES}
    constraints |= bank_constraints(train_model, dist.get_world_size())
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(train_model, sharders, dist.group.WORLD)
    # nothing dense trains in this stage, so that ranks have no gradients to share
    dmp = DistributedModelParallel(train_model, device=CPU, plan=plan, sharders=sharders, init_data_parallel=False)
    dmp.to(CPU)
    return model, dmp, stage.optimizer(dmp, lr=1e-3)


def loop(folder: str) -> tuple[State, State, State, State, list[bool]]:
    """Tensors before and after training, as a checkpoint gives them to another model, and that one's before."""
    model, dmp, optimizer = build()
    before = whole(dmp.state_dict())
    logits = []
    for route in (Route.DOMAIN, Route.BASE):
        with model.routed(route), torch.no_grad():
            logits.append(dmp(clicks(0))[1][1])
    fit(dmp, optimizer, [clicks(step) for step in range(3)])
    after = whole(dmp.state_dict())
    dcp.save({"model": dmp.state_dict()}, checkpoint_id=folder)
    torch.manual_seed(99)
    _, other, _ = build()
    start = whole(other.state_dict())
    dcp.load({"model": other.state_dict()}, checkpoint_id=folder)
    return before, after, whole(other.state_dict()), start, [torch.equal(*logits), bool(logits[0].any())]


def test_a_foreign_loop_trains_and_saves_sharded_banks(tmp_path: Path, two_ranks: RankPool) -> None:
    for rank, (before, after, loaded, start, equal) in enumerate(two_ranks.run(loop, str(tmp_path))):
        assert equal == [True, True]  # new adapters add exactly zero
        banks = {name for name in before if "bank_tables" in name}
        assert differing(before, after) == banks and len(banks) == 2  # this rank's shards of both layers' tables
        assert not differing(after, loaded) and differing(after, start) >= banks
        for name in banks:
            moved = (before[name] != after[name]).any(1)
            assert moved.tolist() == [True, True] if rank == 0 else [True, False], name  # the last scenario never comes
