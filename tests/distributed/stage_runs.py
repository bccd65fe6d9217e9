"""Runs a stage's runtime on a rank of a test pool, and says what became of every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.helpers import DIM, DIVISIONS, Rows, build_backbone, random_rows, randomise
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.checkpoint import State
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.execution import Precision
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import Method, MultiLoRA
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.stage_runtime import StageRuntime

EVERYTHING = frozenset(ParameterGroup)
ADAM = EmbeddingConfig(dim=DIM, optimizer="adam")
ROWWISE = EmbeddingConfig(
    dim=DIM, optimizer="rowwise_adagrad", table_sharding={"a": "row_wise", "b": "column_wise", "c": "table_wise"}
)


@dataclass(frozen=True)
class Job:
    """A stage to train.

    Args:
        method (Method): whose stage it is.
        stage (Stage): the stage.
        backbone (str): a key of BACKBONES.
        embeddings (EmbeddingConfig): optimizer and sharding of the tables.
        settings (StageConfig): learning rates and penalties.
        domain_weights (Tensor | None): of rows in the loss.
        expert_index (int): of experts.
        divisions (tuple[Division, ...]): of the model.
        precision (Precision): of training.
        compiles (bool): whether what holds no table is compiled.
    """

    method: Method
    stage: Stage
    backbone: str = "mlp"
    embeddings: EmbeddingConfig = field(default_factory=lambda: ADAM)
    settings: StageConfig = field(default_factory=StageConfig)
    domain_weights: Tensor | None = None
    expert_index: int = 0
    divisions: tuple[Division, ...] = DIVISIONS
    precision: Precision = "fp32"
    compiles: bool = False

    @property
    def sizes(self) -> list[int]:
        """Number of domains of each division."""
        return [division.num_domains for division in self.divisions]


@dataclass
class Outcome:
    """What a rank saw of a job.

    Args:
        states (list[dict[str, Tensor]]): every tensor in whole, before the first step and after each.
        groups (dict[str, ParameterGroup]): of every tensor.
        optimizer (dict[str, Tensor]): its state after the last step, in whole.
        losses (list[float]): of each step, on this rank.
        logits (Tensor): of this rank's rows of the first batch, in evaluation mode after training.
        trainable (int): parameters that the runtime says it trains.
    """

    states: list[dict[str, Tensor]]
    groups: dict[str, ParameterGroup]
    optimizer: dict[str, Tensor]
    losses: list[float]
    logits: Tensor
    trainable: int

    @property
    def before(self) -> dict[str, Tensor]:
        """Every tensor before the first step."""
        return self.states[0]

    @property
    def after(self) -> dict[str, Tensor]:
        """Every tensor after the last step."""
        return self.states[-1]


def jobs(method: Method, backbone: str = "mlp", **options: object) -> list[Job]:
    """A job for each stage of a method."""
    divisions = DIVISIONS if isinstance(method, MultiLoRA) else DIVISIONS[:1]
    return [Job(method, stage, backbone, divisions=divisions, **options) for stage in method.stages(divisions)]


# weight decay gives a bias that a norm takes out again a gradient that is not noise, which Adam would blow up
SETTINGS = StageConfig(weight_decay=0.03)


def some_rows(steps: int = 4, num_rows: int = 48) -> list[Rows]:
    """Rows of some steps; in the first step alone are the last domains of both divisions there."""
    first, *others = [random_rows(num_rows, seed=step) for step in range(steps)]
    last = torch.tensor([division.num_domains - 1 for division in DIVISIONS])
    return [first, *(rows.pick((rows.domains < last).all(1)) for rows in others)]


def environment() -> Environment:
    """This rank."""
    return Environment(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def make_runtime(job: Job) -> StageRuntime:
    """The job's runtime, every dense tensor random by its name, the tables by theirs."""
    torch.manual_seed(1 + dist.get_rank())  # what is drawn from now on must not matter
    model = MultiDomainModel(build_backbone(job.backbone), job.method, job.divisions)
    runtime = StageRuntime(
        model,
        job.stage,
        job.settings,
        job.embeddings,
        job.domain_weights,
        seed=7,
        environment=environment(),
        precision=job.precision,
        compiles=job.compiles,
    )
    # from this start no gradient of a test is as small as rounding, which Adam would blow up
    randomise(runtime.state(EVERYTHING - {ParameterGroup.EMBEDDINGS}), seed=1)
    runtime.model.set_route(job.stage.route, job.stage.division, job.expert_index)
    return runtime


def batches(job: Job, steps: list[Rows]) -> Iterator[DomainBatch]:
    """This rank's share of each step's rows: with two ranks the first third, in which the last domains are absent."""
    for rows in steps:
        first = len(rows) // 3
        own = (
            rows
            if dist.get_world_size() == 1
            else rows.pick(slice(first) if dist.get_rank() == 0 else slice(first, None))
        )
        own = Rows(own.dense, own.sparse, own.labels, own.domains[:, : len(job.divisions)])
        yield own.batch(job.sizes, global_rows=len(rows))


def whole(state: State) -> dict[str, Tensor]:
    """Copies of all tensors, put together from the shards of all ranks."""
    tensors, pieces = {}, []
    for name, value in state.items():
        if not isinstance(value, ShardedTensor):
            tensors[name] = value.detach().clone()
            continue
        for shard in value.local_shards():
            place = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            slices = tuple(slice(start, start + size) for start, size in place)
            pieces.append((name, tuple(value.size()), slices, shard.tensor.detach().clone()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pieces)
    for name, size, slices, tensor in (piece for rank in gathered for piece in rank):
        tensors.setdefault(name, torch.full(size, torch.nan))[slices] = tensor
    return tensors


def train(job: Job, steps: list[Rows]) -> Outcome:
    """Trains a job from a random state."""
    runtime = make_runtime(job)
    states, losses = [whole(runtime.state(EVERYTHING))], []
    for output in runtime.train(batches(job, steps if runtime.stage_optimizer.by_name else [])):
        states.append(whole(runtime.state(EVERYTHING)))
        losses.append(float(output.loss))
    optimizer = whole(runtime.optimizer_tensors())
    (evaluated,) = runtime.evaluate(batches(job, steps[:1]))
    return Outcome(states, runtime.groups, optimizer, losses, evaluated.logits, runtime.trainable_parameters)


def train_all(all_jobs: list[Job], steps: list[Rows]) -> list[Outcome]:
    """Trains jobs one after the other, each from its own start."""
    return [train(job, steps) for job in all_jobs]


def evaluate(job: Job, steps: list[Rows]) -> list[Tensor]:
    """This rank's logits of each step's rows, from a random state."""
    return [output.logits for output in make_runtime(job).evaluate(batches(job, steps))]
