"""A backbone, wrapped so that it serves many domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
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
        self.division = 0
        self.expert_index = 0

    def forward(self, domain_ids: Tensor | BatchDomains) -> DomainState:
        """Domain ids int64 [B, V] ([B] where V = 1), or rows that the loader has grouped -> the state of the pass."""
        if not isinstance(domain_ids, BatchDomains):
            domain_ids = BatchDomains.from_ids(domain_ids, self.sizes)
        return DomainState(self.route, domain_ids, self.division, self.expert_index)


class MultiDomainModel(nn.Module):
    """A CTR model whose hidden layers carry adapters for the domains of the rows.

    Wraps an unmodified TorchRec DLRM, DLRM_DCN, one of this package's backbones, or any model with
    ``forward(dense_features, sparse_features) -> logits``. Parameters of the backbone keep their names below
    ``backbone.``; logits have the shape the backbone gives, and equal its own until adapters are trained.

    Args:
        backbone (nn.Module): the model to adapt; changed in place.
        method (Method): MLoRA, MultiLoRA, MoEMLoRA, ...
        divisions (Sequence[Division]): the natural one first.
        target_modules (Sequence[str] | None): fnmatch patterns over module names of the layers to adapt; by default
            what the backbone says of itself, for DLRM the hidden layers of the over arch.

    Raises:
        ValueError: no division, a target that matches nothing, a method that does not fit, or a backbone that is
            wrapped already.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
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
    ) -> None:
        super().__init__()
        if not divisions:
            raise ValueError("a MultiDomainModel needs at least one division")
        method.check_divisions(divisions)
        if any(isinstance(module, DomainModule) for module in backbone.modules()):
            raise ValueError("the backbone has parts for domains already; wrap a new one, or load its state into one")
        if target_modules and not method.needs_backbone_targets:
            raise ValueError(f"{type(method).__name__} takes the backbone as a whole; leave out --target_modules")
        self.method = method
        self.divisions = tuple(divisions)
        self.context = DomainContext()
        self.router = DomainRouter([division.num_domains for division in divisions], method.route)
        targets = list(target_modules) if target_modules is not None else []
        if target_modules is None and method.needs_backbone_targets:
            targets = list(adapter_targets(backbone))
        self.backbone = method.wrap(backbone, targets, self.divisions, self.context)

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        domain_ids: Tensor | BatchDomains,
    ) -> Tensor:
        """Logits for rows of any mix of domains.

        Args:
            dense_features (Tensor): [B, num_dense_features].
            sparse_features (KeyedJaggedTensor): B rows.
            domain_ids (Tensor | BatchDomains): int64 [B, V], one column a division, or [B] where there is one.

        Returns:
            Tensor: the backbone's logits, [B, 1] for DLRM.

        Raises:
            ValueError: no ids, a domain outside its division (checked on CPU), or ids of a wrong shape.
        """
        if domain_ids is None:
            raise ValueError("domain_ids is None; give the domain of each row, -1 where it is unknown")
        with self.context.open(self.router(domain_ids)):
            logits: Tensor = self.backbone(dense_features=dense_features, sparse_features=sparse_features)
        return logits

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
        if isinstance(module, EmbeddingBagCollection):
            group = ParameterGroup.EMBEDDINGS
        else:
            group = getattr(module, "parameter_group", inherited)
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            groups[prefix + name] = group
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", group)

    visit(model, "", ParameterGroup.BACKBONE)
    return groups
