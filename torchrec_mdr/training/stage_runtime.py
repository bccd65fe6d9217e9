"""A stage's model, sharded and with its optimizers, behind TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.adapters.norm import DomainNorm, NormBank
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.pipeline import (
    EmbeddingPenalty,
    LossArch,
    PassHook,
    StepOutput,
    TrainModule,
    progress_all,
)
from torchrec_mdr.distributed.sharding import EmbeddingConfig, freeze_lookup, init_embeddings, shard
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.optim.stage_optimizer import StageOptimizer
from torchrec_mdr.registry import HOOKS
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.hooks import StageHook


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
    ) -> None:
        self.model = model
        self.stage = stage
        self.environment = environment
        self.settings = settings
        self.groups = parameter_groups(model)
        self.parameter_counts = count_parameters(model, self.groups)
        self._choose_trainable()
        self.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        archs = _sparse_archs(model)
        around: list[PassHook] = []
        if not stage.trains_embeddings:
            for arch in archs:
                freeze_lookup(arch)
        elif settings.embedding_l2:
            around.append(EmbeddingPenalty(settings.embedding_l2, archs))
        kinds: list[type[StageHook]] = [_hook(name) for name in settings.hooks]
        self.hooks = [kind(model, archs, pretrained_l2) for kind in kinds if kind.applies(stage.trains_embeddings)]
        if domain_weights is not None:
            domain_weights = domain_weights.to(environment.device)
        module = TrainModule(model, LossArch(stage.division, domain_weights), [*around, *self.hooks])
        self.sharded = shard(
            module,
            embeddings,
            settings.embedding_learning_rate,
            settings.weight_decay,
            frozen=not stage.trains_embeddings,
            environment=environment,
        )
        init_embeddings(self.sharded, seed)
        self.banks = {
            name: bank
            for name, bank in model.named_modules()
            if isinstance(bank, Bank) and any(p.requires_grad for p in bank.parameters(recurse=False))
        }
        self.optimizer = self._make_optimizer(settings)
        self.pipeline = TrainPipelineSparseDist(self.sharded, self.optimizer, environment.device)
        model.set_route(stage.route, stage.division)

    def train(self, batches: Iterator[DomainBatch]) -> Iterator[StepOutput]:
        """Trains on all batches, yielding after each step."""
        self.sharded.train()
        if not self.stage.trains_backbone:
            for module in self.model.modules():
                # domain norms train; the backbone's own statistics stand still
                norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, DomainNorm)
                noise = isinstance(module, nn.Dropout | NormBank)
                if norm or (noise and not self.settings.backbone_noise):
                    module.eval()
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

    def freeze_rows(self, frozen: Tensor, expert_index: int) -> None:
        """Keeps domains, bool [N], of one expert of each from moving, and all other experts."""
        banks = self.optimizer.optimizers.get("banks")
        assert isinstance(banks, BankAdam)
        for bank in self.banks.values():
            rows = torch.ones(bank.num_adapters, dtype=torch.bool)
            rows[bank.rows_of_expert(expert_index, frozen.numel())] = frozen
            banks.freeze(bank, rows.to(self.environment.device))

    def owned_rows(self, num_domains: int, expert_index: int) -> dict[str, OwnedRows]:
        """Rows that train and belong to one domain each: one expert of each in the banks, and domains' own tables."""
        owned = {
            f"{name}.{role}": rows
            for name, bank in self.banks.items()
            for role, rows in bank.owned_rows(expert_index, num_domains).items()
        }
        for name, module in self.model.named_modules():
            if self.stage.trains_embeddings and isinstance(module, DomainModule):
                owned |= {f"{name}.{title}": rows for title, rows in module.owned_tables().items()}
        return owned

    def state(self, groups: frozenset[ParameterGroup]) -> checkpoint.State:
        """Tensors of some groups of parameters and buffers, by name."""
        return {
            name: tensor for name, tensor in checkpoint.model_state(self.sharded).items() if self.groups[name] in groups
        }

    def _choose_trainable(self) -> None:
        other_division = {
            id(parameter)
            for bank in self.model.modules()
            if isinstance(bank, Bank) and not bank.trains_on(self.stage.route, self.stage.division)
            for parameter in bank.parameters()
        }
        for name, parameter in self.model.named_parameters():
            trains = self.groups[name] in self.stage.trains and id(parameter) not in other_division
            parameter.requires_grad_(trains)

    def _make_optimizer(self, settings: StageConfig) -> StageOptimizer:
        in_banks = {id(parameter) for bank in self.banks.values() for parameter in bank.parameters(recurse=False)}
        data_parallel = self._data_parallel_tables()
        dense, tables, names = [], [], {}
        for full_name, parameter in self.sharded.named_parameters():
            name = full_name.removeprefix("model.")
            if self.groups[name] is ParameterGroup.EMBEDDINGS:
                if self.stage.trains_embeddings and name.split(".")[-2] in data_parallel:
                    tables.append(parameter)
                    names[parameter] = name
            elif parameter.requires_grad:
                names[parameter] = name
                if id(parameter) not in in_banks:
                    dense.append(parameter)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        decay = settings.weight_decay
        if tables:
            optimizers["tables"] = torch.optim.Adam(
                tables, lr=settings.embedding_learning_rate, weight_decay=decay, fused=True
            )
        if dense:
            optimizers["dense"] = torch.optim.Adam(dense, lr=settings.learning_rate, weight_decay=decay, fused=True)
        if self.banks:
            banks = self.banks.values()
            optimizers["banks"] = BankAdam(banks, lr=settings.learning_rate, weight_decay=decay, fused=True)
        fused = self.sharded.fused_optimizer if self.stage.trains_embeddings else None
        return StageOptimizer(optimizers, names, fused)

    def _data_parallel_tables(self) -> set[str]:
        return {
            table
            for plan in self.sharded.plan.plan.values()
            if isinstance(plan, EmbeddingModuleShardingPlan)
            for table, sharding in plan.items()
            if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        }


def _hook(name: str) -> type[StageHook]:
    HOOKS.check(name, "the hook")
    hook: type[StageHook] = HOOKS[name]
    return hook


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
