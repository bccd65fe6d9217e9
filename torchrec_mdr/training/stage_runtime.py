"""A stage's model, sharded and with its optimizers, behind TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.adapters.bank import Bank, ParameterGroup
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.norm import DomainNorm, NormBank
from torchrec_mdr.baselines.domain_tables import DomainSparseArch
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.pipeline import EmbeddingPenalty, LossArch, StepOutput, TrainModule, progress_all
from torchrec_mdr.distributed.sharding import freeze_lookup, init_embeddings, shard
from torchrec_mdr.experiments.leave_one_out.left_out import LeaveOneOut
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.optim.stage_optimizer import StageOptimizer
from torchrec_mdr.training.config import EmbeddingConfig, StageConfig
from torchrec_mdr.training.early_stopping import OwnedRows


class StageRuntime:
    """One stage's model on this rank.

    What the stage does not train is out of reach of every optimizer: it has no gradient and no optimizer state.

    Args:
        model (MultiDomainModel): a new model; its embedding tables may lie on the meta device.
        stage (Stage): what trains, on which route.
        settings (StageConfig): learning rates and penalties.
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
        penalty = EmbeddingPenalty(settings.embedding_l2) if settings.embedding_l2 else None
        self.left_out: LeaveOneOut | None = None
        for arch in _sparse_archs(model):
            if not stage.trains_embeddings:
                freeze_lookup(arch)
            elif penalty is not None:
                penalty.watch(arch)
        if settings.rows == "left_out" and not stage.trains_embeddings:
            self.left_out = LeaveOneOut(model, _sparse_archs(model), pretrained_l2)
        if domain_weights is not None:
            domain_weights = domain_weights.to(environment.device)
        module = TrainModule(model, LossArch(stage.division, domain_weights), penalty, self.left_out)
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
        self.set_route(stage.route, stage.division)

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

    def leave_rows_out(
        self,
        rows: Callable[[], Iterator[DomainBatch]],
        tried: Iterator[DomainBatch],
        num_resident_rows: int | None,
        target: float,
    ) -> float:
        """Prepares training on embeddings without the rows' own share, and keeps what rows see where it fits.

        Args:
            rows (Callable): gives all rows to learn from.
            tried (Iterator[DomainBatch]): some of them, to set the strength by.
            num_resident_rows (int | None): rows that this rank's loader keeps in memory.
            target (float): the backbone's log loss on rows it has not learned from.

        Returns:
            float: the strength.

        Raises:
            ValueError: a table whose ids are not in the data.
        """
        left_out, device = self.left_out, self.environment.device
        assert left_out is not None
        self.sharded.eval()
        measured = rows()
        first = next(measured)
        left_out.start_measuring(first, device)
        self._pass(chain([first], measured))
        left_out.finish_measuring()
        left_out.start_calibration(device)
        self._pass(tried)
        left_out.finish_calibration(target)
        if left_out.start_keeping(num_resident_rows, device):
            self._pass(rows())
            left_out.finish_keeping()
        return left_out.strength

    def _pass(self, batches: Iterator[DomainBatch]) -> None:
        for _ in progress_all(self.pipeline, batches):
            pass

    def set_route(self, route: Route, division: int = 0, expert_index: int = 0) -> None:
        """Chooses the way of the passes to come."""
        self.model.set_route(route, division, expert_index)

    def freeze_rows(self, frozen: Tensor, expert_index: int) -> None:
        """Keeps domains, bool [N], of one expert_index of experts from moving, and all other slots."""
        banks = self.optimizer.optimizers.get("banks")
        assert isinstance(banks, BankAdam)
        for bank in self.banks.values():
            rows = torch.ones(bank.num_adapters, dtype=torch.bool)
            rows[expert_index * frozen.numel() : (expert_index + 1) * frozen.numel()] = frozen
            banks.freeze(bank, rows.to(self.environment.device))

    def owned_rows(self, num_domains: int, expert_index: int) -> dict[str, OwnedRows]:
        """Rows that train and belong to one domain each: one expert_index of the banks, and the domains' own tables."""
        part = slice(expert_index * num_domains, (expert_index + 1) * num_domains)
        domains = torch.arange(num_domains, device=self.environment.device)
        owned = {
            f"{name}.{role}": OwnedRows(tensor.detach()[part], domains)
            for name, bank in self.banks.items()
            for role, tensor in bank.row_tensors().items()
        }
        return owned | self.owned_tables()

    def owned_tables(self) -> dict[str, OwnedRows]:
        """This rank's shares of the tables that hold a part per domain, where tables train."""
        archs = [(n, m) for n, m in self.model.named_modules() if isinstance(m, DomainSparseArch)]
        return {
            f"{name}.{title}": OwnedRows(tensor, owners)
            for name, arch in (archs if self.stage.trains_embeddings else [])
            for title, (tensor, owners) in arch.rows_of_domains().items()
        }

    def state(self, groups: frozenset[ParameterGroup]) -> checkpoint.State:
        """Tensors of some groups of parameters and buffers, by name."""
        return {
            name: tensor for name, tensor in checkpoint.model_state(self.sharded).items() if self.groups[name] in groups
        }

    def _choose_trainable(self) -> None:
        other_division = {
            id(parameter)
            for bank in self.model.modules()
            if isinstance(bank, Bank) and self.stage.route is Route.DOMAIN and bank.division != self.stage.division
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
            optimizers["banks"] = BankAdam(
                banks, self.model.rows_present, lr=settings.learning_rate, weight_decay=decay
            )
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
