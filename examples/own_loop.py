"""A TorchRec loop with adapters: MLoRA, MultiLoRA with fusion, and a further domain on top of a plain DLRM.

`python examples/own_loop.py FOLDER`, or by torchrun with several ranks. It is examples/plain_loop.py and twenty lines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import torchrec_mdr as mdr

ITEMS, ROWS, STEPS = 500, 512, 100


@dataclass
class Clicks(Pipelineable):
    """A batch of clicks: dense features, an item, the scenario and the weekday it was shown in, a label."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    scenario: Tensor
    weekday: Tensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Clicks:
        """Copies to a device."""
        return Clicks(*(value.to(device, non_blocking=non_blocking) for value in vars(self).values()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator where the tensors are used."""
        for value in vars(self).values():
            value.record_stream(stream)


def clicks(steps: int, seed: int, scenarios: int) -> Iterator[Clicks]:
    """Random clicks, where every scenario has a taste of its own in items; each rank draws its own rows."""
    tastes = torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(0)).sign()
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(steps):
        items, scenario = (torch.randint(high, (ROWS,), generator=generator) for high in (ITEMS, scenarios))
        weekday, dense = torch.randint(7, (ROWS,), generator=generator), torch.rand(ROWS, 4, generator=generator)
        likes = torch.sigmoid(dense.sum(1) - 2 + tastes[items, 7] + 1.5 * tastes[items, scenario])
        features = KeyedJaggedTensor.from_lengths_sync(["item"], items, torch.ones(ROWS, dtype=torch.int64))
        yield Clicks(dense, features, scenario, weekday, torch.bernoulli(likes, generator=generator))


def build_dlrm() -> DLRM:
    """Tables on the meta device: they come into being where they are sharded."""
    item = EmbeddingBagConfig(name="t_item", embedding_dim=16, num_embeddings=ITEMS, feature_names=["item"])
    return DLRM(EmbeddingBagCollection(tables=[item], device=torch.device("meta")), 4, [32, 16], [64, 32, 1])


def shard(train_model: nn.Module, device: torch.device) -> DistributedModelParallel:
    """The planner's plan, and row-wise Adagrad in the tables' backward pass."""
    tables = [p for m in train_model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()]
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": 0.05})
    planner = EmbeddingShardingPlanner(topology=Topology(dist.get_world_size(), device.type))
    plan = planner.collective_plan(train_model)
    return DistributedModelParallel(train_model, device=device, plan=plan)


def fit(dmp: DistributedModelParallel, optimizer: CombinedOptimizer, folder: str, scenarios: int) -> None:
    """Trains, saves, and prints the mean log loss on other clicks, those of all ranks."""
    pipeline = TrainPipelineSparseDist(dmp, optimizer, dmp.device, execute_all_batches=True)
    dmp.train()
    batches = clicks(STEPS, 1, scenarios)
    for _ in range(STEPS):
        pipeline.progress(batches)
    dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    dmp.eval()
    others = clicks(10, 2, scenarios)
    with torch.no_grad():
        loss = torch.stack([pipeline.progress(others)[0] for _ in range(10)]).mean()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"{folder}: log loss {loss / dist.get_world_size():.4f}")


def pretrain(folder: str, device: torch.device) -> None:
    """One DLRM for the clicks of five scenarios."""
    dmp = shard(DLRMTrain(build_dlrm()), device)
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    dense_optimizer = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    fit(dmp, CombinedOptimizer([dmp.fused_optimizer, dense_optimizer]), f"{folder}/pretrain", 5)


def adapt(folder: str, before: str, name: str, method: mdr.Method, stage: str, size: int, device: torch.device) -> None:
    """A stage of a method, on the checkpoint of the one before."""
    divisions = [mdr.Division("scenario", size), mdr.Division("weekday", 7)][: method.min_divisions]
    model = mdr.MultiDomainModel(build_dlrm(), method, divisions)
    prepared = mdr.prepare_stage(model, stage)
    ids = lambda batch: torch.stack([getattr(batch, division.name) for division in divisions], 1)  # noqa: E731
    dmp = shard(mdr.MultiDomainTrain(model, domain_ids=ids), device)
    if before == "pretrain":
        with mdr.backbone_state(dmp) as state:
            dcp.load(state, checkpoint_id=f"{folder}/pretrain")
    else:
        mdr.load_with_new_domains(dmp, f"{folder}/{before}", prefix="model.")
    fit(dmp, CombinedOptimizer([dmp.fused_optimizer, prepared.optimizer(dmp, lr=1e-2)]), f"{folder}/{name}", size)


def main(folder: str) -> None:
    """All jobs; as a rule each is a process of its own."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pretrain(folder, device)
    mlora, multilora = mdr.MLoRA(rank=4), mdr.MultiLoRA(rank=4)
    adapt(folder, "pretrain", "mlora", mlora, "adapt", 5, device)
    adapt(folder, "pretrain", "by_scenario", multilora, "adapt_scenario", 5, device)
    adapt(folder, "by_scenario", "by_weekday", multilora, "adapt_weekday", 5, device)
    adapt(folder, "by_weekday", "fused", multilora, "fuse", 5, device)
    adapt(folder, "mlora", "further", mlora, "adapt", 6, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
