"""A trained model as it serves: evaluation only, folded, for rows of any domain, in any number of threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.merging import AdaptedLayer
from torchrec_mdr.adapters.served import ServedBank, ServingPass, combination_rows
from torchrec_mdr.data.schema import Division
from torchrec_mdr.inference.tables import ServedTables
from torchrec_mdr.methods.base import Method
from torchrec_mdr.model import MultiDomainModel

CALIBRATION = "calibration.affine"  # the table of calibrations, which the logits do not depend on


def freeze(
    model: MultiDomainModel,
    features: Sequence[str] | None = None,
    unknown_ids: Mapping[str, int] | None = None,
    mean_ids: Mapping[str, int] | None = None,
    like: ServingModel | None = None,
) -> ServingModel:
    """A model for evaluation alone, with nothing shared with the one it is made from.

    What does not depend on the row is computed once; norms become a product and a sum; tables lie in one matrix.

    Args:
        model (MultiDomainModel): trained, with its tables in this process.
        features (Sequence[str] | None): the sparse features in the order of the batches to come; that of the tables
            where left out.
        unknown_ids (Mapping[str, int] | None): see :class:`ServedTables`.
        mean_ids (Mapping[str, int] | None): the same.
        like (ServingModel | None): what was made of the model with other adapters: its tables are taken, not copied.

    Returns:
        ServingModel: its logits are those of the model in evaluation mode.

    Raises:
        ValueError: a part of the method does not say how it serves.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec_mdr.methods import MLoRA
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=8), divisions=[Division("scenario", 12)])
        >>> items = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([7, 10**6]), torch.tensor([1, 1]))
        >>> freeze(model)(torch.rand(2, 4), items, torch.tensor([3, 10**9])).shape
        torch.Size([2, 1])
    """
    check_banks(model)
    backbone = model.backbone
    collections = [module for module in backbone.modules() if isinstance(module, EmbeddingBagCollection)]
    if features is None:
        names = [name for ebc in collections for config in ebc.embedding_bag_configs() for name in config.feature_names]
        features = list(dict.fromkeys(names))
    served: dict[int, nn.Module] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, EmbeddingBagCollection) and like is not None:
            served[id(module)] = like.backbone.get_submodule(name)
        elif isinstance(module, EmbeddingBagCollection):
            served[id(module)] = ServedTables(module, features, unknown_ids, mean_ids)
        elif isinstance(module, AdaptedLayer):
            assert isinstance(module, nn.Module)
            served[id(module)] = module.freeze(model.method.route)
    frozen = replaced(backbone, served)
    check_plain(frozen, model.method)
    return ServingModel(frozen, model.divisions, features, has_backbone(model)).eval().requires_grad_(False)


def replaced(backbone: nn.Module, others: dict[int, nn.Module]) -> nn.Module:
    """A copy of a model in which some modules, by their id, are others, wherever they are referred to."""
    copied: nn.Module = copy.deepcopy(backbone, memo=dict(others))  # what the memo has is taken for copied
    return copied


def check_banks(model: MultiDomainModel) -> None:
    """Raises ValueError where a model's adapters lie in tables."""
    if model.bank_tables is not None:
        raise ValueError(
            "a model with sharded banks cannot be served or merged as it is; build it with banks='replicated', and "
            "load its checkpoint into that"
        )


def check_plain(backbone: nn.Module, method: Method) -> None:
    """Raises ValueError where a part of a model still asks a context for the rows' domains."""
    for name, module in backbone.named_modules():
        if any(isinstance(value, DomainContext) for value in vars(module).values()):
            raise ValueError(
                f"{type(method).__name__} cannot be served or merged: its {type(module).__name__} ('{name}') has no "
                "adapters beside a backbone of its own that rows of unknown domains could go by"
            )


def has_backbone(model: MultiDomainModel) -> bool:
    """Whether rows of unknown domains have a model: one was trained for all, or domains have nothing of their own."""
    if not any(isinstance(module, AdaptedLayer) for module in model.modules()):
        return True
    return any(stage.route is Route.BASE for stage in model.method.stages(model.divisions))


class ServingModel(nn.Module):
    """What :func:`freeze` makes. Any number of threads may call it.

    Args:
        backbone (nn.Module): the model, with served layers and tables.
        divisions (Sequence[Division]): the natural one first.
        features (Sequence[str]): the sparse features in the order of the batches.
        has_backbone (bool): whether rows of unknown domains can be scored.

    Attributes:
        calibration (ServedBank): scale and bias of each domain of the natural division, for who makes probabilities.
    """

    def __init__(
        self, backbone: nn.Module, divisions: Sequence[Division], features: Sequence[str], has_backbone: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.divisions = tuple(divisions)
        self.features = tuple(features)
        self.has_backbone = has_backbone
        identity = torch.tensor([1.0, 0.0], dtype=torch.float64)
        own = {"affine": identity.expand(self.divisions[0].num_domains, 2)}
        self.calibration = ServedBank(0, own, {"affine": identity})

    @property
    def sizes(self) -> list[int]:
        """Number of domains of each division."""
        return [division.num_domains for division in self.divisions]

    def banks(self) -> Iterator[tuple[str, ServedBank]]:
        """The tables of adapters, by name."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, ServedBank))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor, domain_ids: Tensor) -> Tensor:
        """Logits for rows of any mix of domains.

        Args:
            dense_features (Tensor): [B, num_dense_features].
            sparse_features (KeyedJaggedTensor): B rows; an id that its table does not have is an unknown one.
            domain_ids (Tensor): int64 [B, V], or [B] where there is one division. An id outside its division is that of
                an unknown domain: such a row is the backbone's, or goes by the divisions that know it.

        Returns:
            Tensor: the backbone's logits, [B, 1] for DLRM.

        Raises:
            ValueError: a row's domain is unknown, and the method has no backbone of its own.
        """
        ids = known_ids(domain_ids, self.sizes)
        if not (self.has_backbone or torch.compiler.is_compiling()) and bool((ids < 0).any()):
            raise ValueError("a row's domain is unknown, and the method was trained without a backbone of its own")
        return self.score(dense_features, sparse_features, self.places(ids))

    def places(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, V], -1 for unknown -> places in the tables where each domain has its own, see :meth:`score`."""
        rows = ids + 1
        if len(self.sizes) == 1:
            return rows
        return torch.cat([rows, combination_rows(rows[:, 0], ids[:, 1:], self.sizes[1:]).unsqueeze(1)], 1)

    def score(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor, places: Tensor) -> Tensor:
        """Logits for rows whose domains have been found in the tables.

        Args:
            dense_features (Tensor): [B, num_dense_features].
            sparse_features (KeyedJaggedTensor): B rows.
            places (Tensor): int64 [B, V] and, where there are several divisions, one more column, that of combinations;
                see :class:`ServingPass`.
        """
        count = len(self.divisions)
        with ServingPass(places[:, :count], places[:, count] if count > 1 else None).open():
            logits: Tensor = self.backbone(dense_features=dense_features, sparse_features=sparse_features)
        return logits


def known_ids(domain_ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Domain ids as int64 [B, V], those outside their division -1.

    Example::

        >>> known_ids(torch.tensor([0, 2, 3, 10**9, -7]), [3]).tolist()
        [[0], [2], [-1], [-1], [-1]]
    """
    ids = domain_ids.unsqueeze(1) if domain_ids.dim() == 1 else domain_ids
    if ids.shape[1] != len(sizes):
        raise ValueError(f"domain_ids has {ids.shape[1]} columns, but the model works along {len(sizes)} divisions")
    ids = ids.long()
    most = torch.tensor(list(sizes), device=ids.device)
    return torch.where((ids >= 0) & (ids < most), ids, -1)


class FlatModel(nn.Module):
    """A serving model that takes tensors alone: what is exported, compiled and called from C++.

    Args:
        model (ServingModel): the model.
    """

    def __init__(self, model: ServingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
        """Logits [B] of B rows.

        Args:
            dense (Tensor): float32 [B, num_dense_features].
            ids (Tensor): int64 [T], of all sparse features in their order, each row by row.
            lengths (Tensor): int64 [F * B], how many ids each feature of each row has.
            places (Tensor): int64 [B, V], see :meth:`ServingModel.score`.
        """
        features = KeyedJaggedTensor(list(self.model.features), ids, lengths=lengths, stride=dense.shape[0])
        return self.model.score(dense, features, places).reshape(-1)
