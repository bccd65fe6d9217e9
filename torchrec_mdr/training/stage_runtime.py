"""A stage's model, sharded and with its optimizers, behind TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.bank_sharding import BankOptimizer, BankTraining, init_banks
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.execution import Precision, compile_dense
from torchrec_mdr.distributed.pipeline import (
    EmbeddingPenalty,
    LossArch,
    MultiDomainTrain,
    PassHook,
    StepOutput,
    progress_all,
)
from torchrec_mdr.distributed.sharding import EmbeddingConfig, init_embeddings, shard
from torchrec_mdr.methods.stage import ADAPTERS, Stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import HOOKS
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.hooks import StageHook
from torchrec_mdr.training.prepared_stage import prepare_stage


class StageRuntime:
    """One stage's model on this rank.

    What the stage does not train is out of reach of every optimizer: it has no gradient and no optimizer state.

    Args:
        model (MultiDomainModel): a new model; its embedding tables may lie on the meta device.
        stage (Stage): what trains, on which route.
        settings (StageConfig): learning rates, penalties and hooks.
        embeddings (EmbeddingConfig): optimizer and sharding of the tables.
        domain_weights (Tensor | None): float32 [N], the weight of a row of each domain in the loss.
        seed (int): of the tables' initial values.
        environment (Environment): rank, world size, device.
        pretrained_l2 (float): the penalty that frozen embeddings were trained with.
        precision (Precision): of the training steps.
        compiles (bool): whether what holds no table is compiled.
        bank_optimizer (BankOptimizer): of sharded banks, see :class:`BankTraining`.
    """

    def __init__(
        self,
        model: MultiDomainModel,
        stage: Stage,
        settings: StageConfig,
        embeddings: EmbeddingConfig,
        domain_weights: Tensor | None,
        seed: int,
        environment: Environment,
        pretrained_l2: float = 0.0,
        precision: Precision = "fp32",
        compiles: bool = False,
        bank_optimizer: BankOptimizer = "auto",
    ) -> None:
        self.model = model
        self.stage = stage
        self.environment = environment
        self.settings = settings
        self.prepared = prepare_stage(model, stage, backbone_noise=settings.backbone_noise)
        self.trainable_parameters = self.prepared.trainable_parameters
        self.groups = self.prepared.groups
        self.parameter_counts = count_parameters(model, self.groups)
        archs = _sparse_archs(model)
        around: list[PassHook] = []
        if stage.trains_embeddings and settings.embedding_l2:
            around.append(EmbeddingPenalty(settings.embedding_l2, archs))
        kinds: list[type[StageHook]] = [HOOKS[name] for name in settings.hooks]
        self.hooks = [kind(model, archs, pretrained_l2) for kind in kinds if kind.applies(stage.trains_embeddings)]
        if domain_weights is not None:
            domain_weights = domain_weights.to(environment.device)
        if compiles:
            compile_dense(model)
        banks = bank_training(model, stage, settings, bank_optimizer)
        loss = LossArch(stage.division, domain_weights)
        module = MultiDomainTrain(
            model, "domains", loss=loss, hooks=[*around, *self.hooks], precision=precision, device=environment.device
        )
        self.sharded = shard(
            module,
            embeddings,
            settings.embedding_learning_rate,
            settings.weight_decay,
            frozen=not stage.trains_embeddings,
            environment=environment,
            banks=banks,
        )
        init_embeddings(self.sharded, seed)
        init_banks(self.sharded, seed)
        self.stage_optimizer = self.prepared.optimizer(
            self.sharded,
            settings.learning_rate,
            table_lr=settings.embedding_learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        fused = stage.trains_embeddings or not banks.frozen
        self.fused_optimizer = self.sharded.fused_optimizer if fused else None
        # the fused optimizer steps in the backward pass, and its rate never changes
        self.pipeline = TrainPipelineSparseDist(self.sharded, self.stage_optimizer, environment.device)

    def train(self, batches: Iterator[DomainBatch]) -> Iterator[StepOutput]:
        """Trains on all batches, yielding after each step."""
        self.prepared.train(self.sharded)
        return progress_all(self.pipeline, batches)

    def evaluate(self, batches: Iterator[DomainBatch]) -> Iterator[StepOutput]:
        """Runs all batches without training, by the route that is set."""
        self.sharded.eval()
        with torch.no_grad():
            yield from progress_all(self.pipeline, batches)

    def forward_all(self, batches: Iterator[DomainBatch]) -> None:
        """Runs all batches for what hooks make of them, in evaluation mode but with gradients where they want them."""
        self.sharded.eval()
        for _ in progress_all(self.pipeline, batches):
            pass

    def optimizer_tensors(self) -> checkpoint.State:
        """The state of all optimizers, by name: `OPTIMIZER/PARAMETER/ROLE`, sharded as the tables are."""
        return {**self.stage_optimizer.tensors(), **self.fused_tensors()}

    def fused_tensors(self) -> checkpoint.State:
        """The state of the fused optimizer; loading into these tensors sets it."""
        if self.fused_optimizer is None:
            return {}
        state = self.fused_optimizer.state_dict()["state"]
        return {f"fused/{name}/{role}": value for name, roles in state.items() for role, value in roles.items()}

    def state(self, groups: frozenset[ParameterGroup]) -> checkpoint.State:
        """Tensors of some groups of parameters and buffers, by name."""
        return {
            name: tensor for name, tensor in checkpoint.model_state(self.sharded).items() if self.groups[name] in groups
        }


def bank_training(
    model: MultiDomainModel, stage: Stage, settings: StageConfig, optimizer: BankOptimizer
) -> BankTraining:
    """How a stage trains sharded banks; one that does not come to them does without their tables, which are large."""
    frozen = ADAPTERS not in stage.trains
    if stage.route is Route.BASE and frozen:
        model.bank_tables = None
    return BankTraining(optimizer, settings.learning_rate, settings.weight_decay, frozen)


def count_parameters(model: nn.Module, groups: dict[str, ParameterGroup]) -> dict[str, int]:
    """Number of parameters of each group, by the group's name."""
    counts = {group.value: 0 for group in ParameterGroup}
    for name, parameter in model.named_parameters():
        counts[groups[name].value] += parameter.numel()
    return counts


def _sparse_archs(model: nn.Module) -> list[nn.Module]:
    """The modules that hold an embedding collection."""
    return [
        module
        for module in model.modules()
        if any(isinstance(child, EmbeddingBagCollection) for child in module.children())
    ]
