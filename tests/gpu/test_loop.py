"""The pipelines of a loop of one's own on a GPU: frozen tables stay, adapters move."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist

from tests.loop.foreign import DOMAINS, build_dlrm, clicks, combined, differing, whole
from torchrec_mdr import Division, MLoRA, MultiDomainModel, MultiDomainTrain, prepare_stage


@pytest.mark.parametrize("prefetch", [False, True])
def test_frozen_tables_stay_in_the_pipelines(prefetch: bool, alone: None) -> None:
    device = torch.device("cuda", 0)
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)])
    stage = prepare_stage(model, "adapt")
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "prefetch_pipeline": prefetch}
    kernels = ["fused_uvm_caching"] if prefetch else ["fused"]
    tables = ("t_user", "t_item", "t_scenario")
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cuda"),
        constraints={table: ParameterConstraints(compute_kernels=kernels) for table in tables},
    )
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused)]
    train_model = MultiDomainTrain(model, "scenario")
    plan = planner.collective_plan(train_model, sharders, dist.group.WORLD)
    dmp = DistributedModelParallel(train_model, device=device, plan=plan, sharders=sharders)
    pipeline_of = PrefetchTrainPipelineSparseDist if prefetch else TrainPipelineSparseDist
    pipeline = pipeline_of(dmp, combined(dmp, stage.optimizer(dmp, lr=1e-2, max_norm=0.1)), device)
    stage.train(dmp)
    before, fused_before = whole(dmp.state_dict()), whole(dmp.fused_optimizer.state_dict()["state"])
    batches = iter([clicks(seed) for seed in range(6)])
    for _ in range(3):
        pipeline.progress(batches)
    moved = differing(before, whole(dmp.state_dict()))
    assert moved and all(".adapter" in name for name in moved)
    assert not differing(fused_before, whole(dmp.fused_optimizer.state_dict()["state"]))
