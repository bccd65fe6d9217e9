"""A stage of a method in a training loop, ours or anybody's: what it freezes, and what trains the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.distributed.frozen_lookup import freeze_lookups, lookup_paths
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import FrozenParts, MultiDomainModel, is_lookup, parameter_groups
from torchrec_mdr.optim import momentum_warning
from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.optim.clipping import DomainClipping
from torchrec_mdr.optim.stage_optimizer import StageOptimizer


class PreparedStage:
    """A stage that a model has been prepared for, see :func:`prepare_stage`.

    Args:
        model (MultiDomainModel): prepared.
        stage (Stage): what trains, on which route.
    """

    def __init__(self, model: MultiDomainModel, stage: Stage) -> None:
        self.model = model
        self.stage = stage
        self.groups = parameter_groups(model)
        self.banks = {
            name: bank
            for name, bank in model.named_modules()
            if isinstance(bank, Bank) and any(p.requires_grad for p in bank.parameters(recurse=False))
        }
        tables = model.bank_tables
        self._bank_tables = {} if tables is None else {f"bank_tables.{n}": n for n, _ in tables.named_parameters()}
        self.trainable_parameters = sum(p.numel() for n, p in model.named_parameters() if self._trains(n, p))
        self._bank_adams: list[BankAdam] = []

    def optimizer(
        self,
        dmp: nn.Module,
        lr: float,
        *,
        table_lr: float | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        fused: bool = False,
    ) -> StageOptimizer:
        """The optimizer of all that the stage trains, but of sharded tables, which their fused optimizer trains.

        Banks get :class:`BankAdam`, with which domains are isolated, everything else Adam.

        Args:
            dmp (nn.Module): the model, or what is around it: a MultiDomainTrain, a DistributedModelParallel. Its
                parameters' names are the optimizer's keys.
            lr (float): learning rate.
            table_lr (float | None): of embedding tables without a fused optimizer; lr where left out.
            weight_decay (float): L2 added to gradients.
            max_norm (float | None): clips each domain's gradients by a norm of their own, and so keeps domains
                isolated, which one norm over all gradients does not.
            fused (bool): take the banks' gradients as factors, see :class:`BankAdam`; faster, but parameters have no
                ``.grad`` then, so that nothing can clip it.

        Raises:
            ValueError: max_norm together with fused, or a model that is not in dmp.
        """
        if fused and max_norm is not None:
            raise ValueError("max_norm needs gradients, which fused does not write; leave one of them out")
        in_banks = {id(parameter) for bank in self.banks.values() for parameter in bank.parameters(recurse=False)}
        elsewhere = set(getattr(getattr(dmp, "fused_optimizer", None), "params", {}))
        prefix = prefix_in(dmp, self.model)
        self._watch()
        dense: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        names: dict[nn.Parameter, str] = {}
        for full_name, parameter in dmp.named_parameters():
            name = full_name.removeprefix(prefix)
            if name not in self.groups or not self._trains(name, parameter):
                continue
            if full_name in elsewhere or hasattr(parameter, "_in_backward_optimizers"):
                continue  # which TorchRec trains in the backward pass
            if name in self._bank_tables:
                raise ValueError(
                    f"'{full_name}' is a table of sharded banks, which a fused optimizer trains: put the model into "
                    "DistributedModelParallel with a BankSharder, or give its tables to apply_optimizer_in_backward"
                )
            names[parameter] = full_name
            if self.groups[name] is ParameterGroup.EMBEDDINGS:
                tables.append(parameter)
            elif id(parameter) not in in_banks:
                dense.append(parameter)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        if tables:
            table_lr = lr if table_lr is None else table_lr
            optimizers["tables"] = torch.optim.Adam(tables, lr=table_lr, weight_decay=weight_decay, fused=True)
        if dense:
            optimizers["dense"] = torch.optim.Adam(dense, lr=lr, weight_decay=weight_decay, fused=True)
        if self.banks:
            banks = BankAdam(self.banks.values(), lr=lr, weight_decay=weight_decay, fused=fused)
            optimizers["banks"] = banks
            self._bank_adams.append(banks)
        clipping = None
        if max_norm is not None:
            sizes = [division.num_domains for division in self.model.divisions]
            clipping = DomainClipping(self.banks.values(), dense, sizes, max_norm)
        return StageOptimizer(optimizers, names, clipping)

    def train(self, dmp: nn.Module) -> None:
        """Puts the model into training mode, in place of ``dmp.train()``; what is frozen stays in evaluation mode.

        A gate that started with each row's own experts, see :meth:`start`, leaves them for its softmax.

        Args:
            dmp (nn.Module): the model, or what is around it.
        """
        prefix_in(dmp, self.model)
        self._watch()
        dmp.train()

    def start(self, domains: Sequence[int] | None = None) -> None:
        """Takes up what an earlier stage has come to, once its tensors are loaded: norms per domain start from it.

        So does a gate of ``MoEMLoRA(gate_start="own")``. Until training mode is set, it gives each row its domain's own
        experts: to be evaluated, and kept where what is trained does no better.

        Args:
            domains (Sequence[int] | None): those that start; None for all.
        """
        self.model.start_stage(self.stage.route, self.stage.division, domains)

    def choose_expert(self, expert_index: int) -> None:
        """Trains another expert of each domain from now on, of MoE-MLoRA's ``stage.expert_passes``."""
        if not 0 <= expert_index < self.stage.expert_passes:
            last = self.stage.expert_passes - 1
            raise ValueError(f"stage '{self.stage.name}' has experts 0 to {last} of a domain, not {expert_index}")
        self.model.set_route(self.stage.route, self.stage.division, expert_index)

    def freeze_domains(self, frozen: Tensor, expert_index: int = 0) -> None:
        """Keeps adapters from moving in the steps to come, of every optimizer made here.

        Args:
            frozen (Tensor): bool [N], domains of the stage's division.
            expert_index (int): of which expert; no other one moves.
        """
        for bank in self.banks.values():
            rows = torch.ones(bank.num_adapters, dtype=torch.bool)
            rows[bank.rows_of_expert(expert_index, frozen.numel())] = frozen
            for optimizer in self._bank_adams:
                optimizer.freeze(bank, rows.to(next(bank.parameters()).device))
        if self.model.bank_tables is not None:
            self.model.bank_tables.freeze_domains(self.stage.division, frozen)

    def owned_rows(self, num_domains: int, expert_index: int = 0) -> dict[str, OwnedRows]:
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

    def _trains(self, name: str, parameter: nn.Parameter) -> bool:
        group = self.groups[name]
        if group is ParameterGroup.EMBEDDINGS:  # of which requires_grad says nothing once they are sharded
            return self.stage.trains_embeddings
        if name in self._bank_tables:
            tables = self.model.bank_tables
            return (
                tables is not None
                and ParameterGroup.ADAPTERS in self.stage.trains
                and tables.trains_on(self._bank_tables[name], self.stage.route, self.stage.division)
            )
        return parameter.requires_grad

    def _watch(self) -> None:
        momentum_warning.watch(p for bank in self.banks.values() for p in bank.parameters(recurse=False))


def prepare_stage(
    model: MultiDomainModel, stage: str | Stage, *, backbone_noise: bool = False, expert_index: int = 0
) -> PreparedStage:
    """Makes a model ready for a stage of its method: freezes what the stage does not train, and sets the route.

    Embedding tables that do not train are looked up without gradients, so that neither they nor their fused optimizer's
    state move; parameters of the dense part require no gradient; in training mode, the frozen backbone's norms keep
    their statistics and its dropout does not act. To be called before the model is put into
    DistributedModelParallel, which looks once at what trains.

    Args:
        model (MultiDomainModel): not sharded yet; its tables, or all of it, may lie on the meta device.
        stage (str | Stage): a name of one of the method's stages, or a stage of one's own.
        backbone_noise (bool): whether a frozen backbone's dropout acts nevertheless, and norms per domain go by the
            statistics of the batch.
        expert_index (int): which expert of each domain trains; see :meth:`PreparedStage.choose_expert`.

    Returns:
        PreparedStage: gives the stage's optimizer, and training mode.

    Raises:
        ValueError: the method has no such stage, or the model is sharded already.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec_mdr import Division, MLoRA, Route
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=2), [Division("scenario", 3)])
        >>> stage = prepare_stage(model, "adapt")
        >>> sorted(stage.optimizer(model, lr=1e-3).params)[-1]
        'backbone.over_arch.model.0._mlp.1._linear.adapter.lora_B'
    """
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError(
            "the model is sharded: ranks would diverge if what trains changed in a live DistributedModelParallel; "
            "build the model anew, prepare the stage, shard it, and load a checkpoint"
        )
    if not isinstance(model, MultiDomainModel):
        raise ValueError(
            f"prepare_stage takes a MultiDomainModel, not a {type(model).__name__}; give it the model before it is "
            "put into a loss module or a DistributedDataParallel"
        )
    stage = _find(model, stage)
    groups = parameter_groups(model)
    other_division = {
        id(parameter)
        for bank in model.modules()
        if isinstance(bank, Bank) and not bank.trains_on(stage.route, stage.division)
        for parameter in bank.parameters()
    }
    in_tables = {id(table) for module in model.modules() if is_lookup(module) for table in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in in_tables:  # fused optimizers refuse tables without gradients
            parameter.requires_grad_(groups[name] in stage.trains and id(parameter) not in other_division)
    lookups = () if stage.trains_embeddings else lookup_paths(model.backbone)
    model.frozen = FrozenParts(not stage.trains_backbone, backbone_noise, lookups)
    freeze_lookups(model)
    if model.bank_tables is not None:
        model.bank_tables.train_tables(ParameterGroup.ADAPTERS in stage.trains)
    prepared = PreparedStage(model, stage)
    prepared.choose_expert(expert_index)
    return prepared


def prefix_in(outer: nn.Module, model: nn.Module) -> str:
    """How names of a model's parameters begin in what is around it.

    Raises:
        ValueError: the model is not in there.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in outer.named_parameters():
        if id(parameter) in own:
            return name.removesuffix(own[id(parameter)])
    raise ValueError(f"the stage's model is not in this {type(outer).__name__}; give the one that was built around it")


def _find(model: MultiDomainModel, stage: str | Stage) -> Stage:
    if isinstance(stage, Stage):
        return stage
    stages = {known.name: known for known in model.method.stages(model.divisions)}
    if stage not in stages:
        raise ValueError(f"{type(model.method).__name__} has no stage '{stage}'; its stages are {', '.join(stages)}")
    return stages[stage]
