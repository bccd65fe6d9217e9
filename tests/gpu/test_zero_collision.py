"""TorchRec's zero-collision hashing, which learns on a GPU alone, in front of sharded banks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from tests.loop.foreign import TABLES, build_dlrm, clicks
from torchrec_mdr import Division, MLoRA, MultiDomainModel, MultiDomainTrain, prepare_stage
from torchrec_mdr.distributed.bank_sharding import BankSharder, BankTraining, bank_constraints
from torchrec_mdr.distributed.evicted_rows import reset_domains
from torchrec_mdr.distributed.zero_collision import ZeroCollisionDomains

CUDA = torch.device("cuda", 0)


def test_each_id_has_its_own_domain_and_the_least_recently_seen_goes() -> None:
    domains = ZeroCollisionDomains(64, CUDA, max_probe=64)
    evicted: list[int] = []
    domains.on_evicted(lambda gone: evicted.extend(gone.tolist()))
    first = torch.arange(10**15, 10**15 + 64, device=CUDA)
    found = domains(first)
    assert sorted(found.tolist()) == list(range(64)) and not evicted
    assert torch.equal(domains(first.flip(0)), found.flip(0))
    domains(first[:40])  # the others were seen a step before
    new = domains(torch.arange(10, device=CUDA))
    taken = new[new >= 0]
    assert len(taken) and evicted == taken.sort().values.tolist()
    assert set(evicted) <= set(found[40:].tolist())
    assert torch.equal(domains(first[:40]), found[:40])
    domains.eval()
    gone = torch.isin(found, taken)
    assert domains(first).tolist() == torch.where(gone, -1, found).tolist()
    assert domains(torch.tensor([-1, 77], device=CUDA)).tolist() == [-1, -1]
    copied = ZeroCollisionDomains(64, "cpu", read_only=True)
    copied.load_state_dict(domains.state_dict())
    assert torch.equal(copied(first.cpu()), domains(first).cpu())  # one hash function on both


def test_a_loop_whose_ids_come_and_go(alone: None) -> None:
    hashed = ZeroCollisionDomains(16, CUDA, max_probe=16)
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", 16)], banks="sharded")
    stage = prepare_stage(model, "adapt")
    train_model = MultiDomainTrain(model, lambda batch: hashed(batch.labels.long() * 1000 + batch.scenario))
    sharders = [s for s in get_default_sharders() if s.module_type is not BankSharder().module_type]
    sharders.append(BankSharder(BankTraining("adagrad", 0.1), CUDA))
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in TABLES}
    constraints |= bank_constraints(train_model, 1)
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cuda"), constraints=constraints)
    plan = planner.collective_plan(train_model, sharders, dist.group.WORLD)
    dmp = DistributedModelParallel(train_model, device=CUDA, plan=plan, sharders=sharders, init_data_parallel=False)
    dmp.to(CUDA)
    optimizer = stage.optimizer(dmp, lr=1e-3)
    evicted = []

    def begin_anew(gone: torch.Tensor) -> None:
        evicted.append(len(gone))
        reset_domains(dmp, gone, [dmp.fused_optimizer], seed=int(hashed.steps))
        rows = model.bank_tables.local_rows(model.router.route, 0).values()
        layouts = [model.bank_tables.layouts[name.split(".")[-2]] for name in model.bank_tables.state_dict()]
        for ((_, table),), layout in zip(rows, layouts, strict=True):
            parts = layout.cut(table[gone])
            assert not parts["lora_B"].any() and not parts["bias"].any() and parts["lora_A"].any()

    hashed.on_evicted(begin_anew)
    stage.train(dmp)
    for step in range(6):
        batch = clicks(step, domains=60).to(CUDA)
        optimizer.zero_grad()
        loss, _ = dmp(batch)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert sum(evicted) > 0
