"""A backbone, wrapped so that it serves many domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.bank import Bank, LayerAdapter, banks_for_tables
from torchrec_mdr.adapters.bank_tables import BankTables
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.adapters.gate import GateModule
from torchrec_mdr.adapters.merging import AdaptedLayer
from torchrec_mdr.adapters.norm import DomainNorm, NormBank
from torchrec_mdr.adapters.top_k import TopKAdapter
from torchrec_mdr.backbones import adapter_targets
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method
from torchrec_mdr.ops.groups import BatchDomains


class DomainRouter(nn.Module):
    """Turns a batch's domain ids into the state that adapters read. Holds no tensor.

    A child module of its own, since the train pipeline's tracer takes it as a leaf: only here may data be looked at.

    Args:
        sizes (Sequence[int]): number of domains of each division.
        route (Route): see :class:`DomainState`.
    """

    def __init__(self, sizes: Sequence[int], route: Route) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.route = route
        self.grouped = True  # whether adapters ask for groups by all domains, and not by those of the batch alone
        self.division = 0
        self.expert_index = 0
        self.checked: set[bool] = set()  # modes, of which a pass has come through all adapted layers

    def forward(self, domain_ids: Tensor | BatchDomains) -> DomainState:
        """Domain ids int64 [B, V] ([B] where V = 1), or rows that the loader has grouped -> the state of the pass."""
        traced = torch.compiler.is_compiling() or isinstance(domain_ids, torch.fx.Proxy)
        called: set[int] | None = None if traced or self.training in self.checked else set()
        if not isinstance(domain_ids, BatchDomains):
            # on the BASE route nobody asks for groups, as a rule
            grouped = self.grouped and self.route is not Route.BASE
            domain_ids = BatchDomains.from_ids(domain_ids, self.sizes, grouped=grouped)
        return DomainState(self.route, domain_ids, self.division, self.expert_index, called=called)


@dataclass(frozen=True)
class FrozenParts:
    """What stays as it is in a stage that does not train it.

    Args:
        backbone (bool): whether the dense part of the backbone is frozen.
        noise (bool): whether its dropout acts nevertheless, and domain norms go by the statistics of the batch.
        lookups (tuple[str, ...]): names, below the backbone, of collections of embedding tables that are frozen.
    """

    backbone: bool
    noise: bool
    lookups: tuple[str, ...]


class MultiDomainModel(nn.Module):
    """A CTR model whose hidden layers carry adapters for the domains of the rows.

    Wraps an unmodified TorchRec DLRM, DLRM_DCN, one of this package's backbones, or any model with
    ``forward(dense_features, sparse_features) -> logits``; of a DLRMTrain, the model in it. Parameters of the backbone
    keep their names below ``backbone.``; logits have the shape the backbone gives, and equal its own until adapters are
    trained.

    Args:
        backbone (nn.Module): the model to adapt; changed in place.
        method (Method): MLoRA, MultiLoRA, MoEMLoRA, ...
        divisions (Sequence[Division]): the natural one first.
        target_modules (Sequence[str] | None): fnmatch patterns over module names of the layers to adapt; by default
            what the backbone says of itself, for DLRM the hidden layers of the over arch.
        banks (str): `replicated`: parameters, which every rank holds; `sharded`: rows of embedding tables on the meta
            device, for very many domains, see :class:`BankTables`.
        bank_type (DataType): of the tables of sharded banks.

    Raises:
        ValueError: no division, a target that matches nothing, a method that does not fit, or not with sharded banks,
            or a backbone that is wrapped already.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec_mdr.methods import MLoRA
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=8), divisions=[Division("scenario", 12)])
        >>> items = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([7, 9]), torch.tensor([1, 1]))
        >>> model(torch.rand(2, 4), items, torch.tensor([3, 11])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: Method,
        divisions: Sequence[Division],
        target_modules: Sequence[str] | None = None,
        banks: Literal["replicated", "sharded"] = "replicated",
        bank_type: DataType = DataType.FP32,
    ) -> None:
        super().__init__()
        if not divisions:
            raise ValueError("a MultiDomainModel needs at least one division")
        method.check_divisions(divisions)
        if isinstance(backbone, DLRMTrain):  # whose loss MultiDomainTrain has
            backbone = backbone.model
        if any(isinstance(module, DomainModule) for module in backbone.modules()):
            raise ValueError("the backbone has parts for domains already; wrap a new one, or load its state into one")
        if target_modules and not method.needs_backbone_targets:
            raise ValueError(f"{type(method).__name__} takes the backbone as a whole; leave out --target_modules")
        self.method = method
        self.frozen: FrozenParts | None = None  # what prepare_stage froze
        self.divisions = tuple(divisions)
        self.context = DomainContext()
        self.router = DomainRouter([division.num_domains for division in divisions], method.route)
        targets = list(target_modules) if target_modules is not None else []
        if target_modules is None and method.needs_backbone_targets:
            targets = list(adapter_targets(backbone))
        with banks_for_tables() if banks == "sharded" else nullcontext():
            self.backbone = method.wrap(backbone, targets, self.divisions, self.context)
        self.bank_tables: BankTables | None = None
        if banks == "sharded":
            gates = [m for m in self.backbone.modules() if isinstance(m, TopKAdapter) and m.chooses_before]
            choose = gates[0].choose_rows if gates else None
            banks_by_name = _banks_for_tables(self.backbone, method)
            self.bank_tables = BankTables(banks_by_name, self.router.sizes, bank_type, choose)
            self.router.grouped = False

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        domain_ids: Tensor | BatchDomains | None = None,
    ) -> Tensor:
        """Logits for rows of any mix of domains.

        Args:
            dense_features (Tensor): [B, num_dense_features].
            sparse_features (KeyedJaggedTensor): B rows.
            domain_ids (Tensor | BatchDomains): int64 [B, V], one column a division, or [B] where there is one.

        Returns:
            Tensor: the backbone's logits, [B, 1] for DLRM.

        Raises:
            ValueError: no ids, a domain outside its division (checked on CPU), ids of a wrong shape, or, in the first
                pass, an adapted layer that the backbone does not call.
        """
        if domain_ids is None:
            raise ValueError(
                "domain_ids is None; give the domain of each row, -1 where it is unknown (in a training loop, put "
                "MultiDomainTrain in place of DLRMTrain)"
            )
        state = self.router(domain_ids)
        if self.bank_tables is not None and self.router.route is not Route.BASE:
            state = self.bank_tables(state)
        with self.context.open(state):
            logits: Tensor = self.backbone(dense_features=dense_features, sparse_features=sparse_features)
        if isinstance(state, DomainState):  # and no proxy of the pipeline's tracer
            self.context.keep_for_backward(state, logits)
            if state.called is not None:
                self._check_called(state.called)
        return logits

    def train(self, mode: bool = True) -> MultiDomainModel:
        """As of any module; but what a stage has frozen stays in evaluation mode, and what it trains begins to."""
        super().train(mode)
        if mode and self.frozen is not None and self.frozen.backbone:
            _freeze_modes(self.backbone, self.frozen.noise)
        if mode and self.frozen is not None:
            self.leave_start()
        return self

    def _check_called(self, called: set[int]) -> None:
        layers = {name: module for name, module in self.backbone.named_modules() if isinstance(module, AdaptedLayer)}
        missed = [name for name, module in layers.items() if id(module) not in called]
        if missed:
            raise ValueError(
                f"the backbone has adapters beside {', '.join(missed)}, but its forward pass never calls them (as an "
                "attention reads the weights of its out_proj), so they would do nothing; leave them out of "
                "target_modules (or, where they are layers of nn.TransformerEncoderLayer, turn its fast path off by "
                "torch.backends.mha.set_fastpath_enabled(False))"
            )
        self.router.checked.add(self.training)

    def set_route(self, route: Route, division: int = 0, expert_index: int = 0) -> None:
        """Chooses the way of the passes to come; see :class:`DomainState`."""
        self.router.route, self.router.division, self.router.expert_index = route, division, expert_index

    @contextmanager
    def routed(self, route: Route, division: int = 0, expert_index: int = 0) -> Iterator[None]:
        """Sends the passes of a while on another way, see :class:`DomainState`; afterwards the one before is back."""
        router = self.router
        before = router.route, router.division, router.expert_index
        self.set_route(route, division, expert_index)
        try:
            yield
        finally:
            self.set_route(*before)

    def start_stage(self, route: Route, division: int, domains: Sequence[int] | None = None) -> None:
        """Gives modules whose start depends on an earlier stage's result that start, see :class:`DomainModule`.

        Args:
            route (Route): of the stage that begins.
            division (int): whose adapters it trains, on the DOMAIN route.
            domains (Sequence[int] | None): those of them that train; None for all.
        """
        own = None if domains is None else torch.tensor(list(domains))
        for module in self.modules():
            if isinstance(module, DomainModule):
                module.start_stage(route, division, own)

    def leave_start(self) -> None:
        """Takes modules from their start to where training begins, where that is another place."""
        for module in self.modules():
            if isinstance(module, DomainModule):
                module.leave_start()


def parameter_groups(model: nn.Module) -> dict[str, ParameterGroup]:
    """The group of every parameter and buffer, by the type of the module that holds it.

    Example::

        >>> from torchrec_mdr.adapters import LoRABank
        >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 2), LoRABank(3, 2, 2, 1)))
        >>> groups["0.weight"].value, groups["1.lora_A"].value
        ('backbone', 'adapters')
    """
    groups: dict[str, ParameterGroup] = {}

    def visit(module: nn.Module, prefix: str, inherited: ParameterGroup) -> None:
        if is_lookup(module):
            own = inherited if inherited is ParameterGroup.ADAPTERS else ParameterGroup.EMBEDDINGS
            for name, _ in [*module.named_parameters(), *module.named_buffers()]:  # a sharded one's, by table
                groups[prefix + name] = own
            return
        group = getattr(module, "parameter_group", inherited)
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            groups[prefix + name] = group
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", group)

    visit(get_unwrapped_module(model), "", ParameterGroup.BACKBONE)
    return groups


def _banks_for_tables(backbone: nn.Module, method: Method) -> dict[str, Bank]:
    """The banks of a backbone, by name, all of which fit into tables."""
    title = type(method).__name__
    banks: dict[str, Bank] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, Bank) and module.fits_table:
            banks[name] = module
        elif isinstance(module, DomainModule) and not isinstance(module, GateModule):
            what = "norms per domain" if isinstance(module, NormBank | DomainNorm) else f"a {type(module).__name__}"
            raise ValueError(
                f"{title} with sharded banks: '{name}' has {what}, which no table can hold; take replicated banks, or "
                "a backbone without batch norm, or another method"
            )
    if not banks:
        raise ValueError(f"{title} has no banks of adapters that tables could hold; take replicated banks")
    return banks


def is_lookup(module: nn.Module) -> bool:
    """Whether a module is a collection of embedding tables, sharded or not."""
    kinds = EmbeddingBagCollectionInterface, EmbeddingCollectionInterface, ShardedEmbeddingModule
    return isinstance(module, kinds)


def _freeze_modes(module: nn.Module, noise: bool) -> None:
    """Puts a frozen backbone's norms into evaluation mode and, without noise, all of it but what trains."""
    if is_lookup(module):
        return
    norm = isinstance(module, _BatchNorm) and not isinstance(module, DomainNorm)
    trains = isinstance(module, Bank | LayerAdapter | GateModule) and not isinstance(module, NormBank)
    if norm or not (noise or trains):
        module.training = False
    for child in module.children():
        _freeze_modes(child, noise or (trains and not isinstance(child, NormBank)))
