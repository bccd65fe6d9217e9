"""Embedding tables with a part of its own for every domain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows
from torchrec_mdr.ops.collectives import sum_over_ranks


class IdShift(nn.Module):
    """Moves the ids of a row into its domain's own part of the tables.

    Holds no parameter; a module of its own, since the train pipeline's tracer takes it as a leaf.

    Args:
        sizes (dict[str, int]): ids of each feature, the rows of a part.
        first (int): copies before the first domain's.
        context (DomainContext): where forward finds the rows' domains.
    """

    sizes: Tensor

    def __init__(self, sizes: dict[str, int], first: int, context: DomainContext) -> None:
        super().__init__()
        self.names = list(sizes)
        self.first = first
        self.rows = list(sizes.values())
        self.register_buffer("sizes", torch.tensor(self.rows, device="cpu"), persistent=False)
        self.context = context

    def reset_parameters(self) -> None:
        """Sets the sizes, in memory that may come from the meta device."""
        self.sizes.copy_(torch.tensor(self.rows, device="cpu"))

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same features with other ids; on the BASE route all rows use the first part."""
        state = self.context.state
        if state.route is Route.BASE:
            return features
        sizes = self.sizes
        if features.keys() != self.names:
            known = dict(zip(self.names, sizes.unbind(), strict=True))
            sizes = torch.stack([known.get(key, sizes.new_zeros(())) for key in features.keys()])
        values = features.values()
        steps = torch.outer(sizes, state.groups(0).ids + self.first).flatten()  # by feature, then row, like the lengths
        shift = torch.repeat_interleave(steps, features.lengths(), output_size=values.numel())
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=values + shift.to(values.dtype),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
        )


class DomainSparseArch(SparseArch, DomainModule):
    """A sparse arch whose tables hold one part per domain, one after the other, under the same names.

    The lookup stays TorchRec's, sharded like any other. The train pipeline does not overlap it with the step before,
    since the ids are computed in the forward pass.

    Args:
        arch (SparseArch): the backbone's; values that its tables have, all domains start from.
        num_domains (int): N.
        with_base (bool): whether another part comes first, that of the BASE route; domains start from it in a stage.
        context (DomainContext): where forward finds the rows' domains.

    Raises:
        ValueError: a feature is looked up in tables of several sizes.
    """

    widens_tables: ClassVar[bool] = True

    def __init__(self, arch: SparseArch, num_domains: int, with_base: bool, context: DomainContext) -> None:
        plain = arch.embedding_bag_collection
        sizes: dict[str, int] = {}
        for config in plain.embedding_bag_configs():
            for feature in config.feature_names:
                if sizes.setdefault(feature, config.num_embeddings) != config.num_embeddings:
                    raise ValueError(
                        f"feature '{feature}' is looked up in tables of several sizes, so its ids cannot be moved to a "
                        "domain's part of them; give it one table"
                    )
        self.num_copies = num_domains + with_base
        self.with_base = with_base
        super().__init__(_widened(plain, num_domains + with_base))
        self.shift = IdShift(sizes, int(with_base), context)
        self.train(arch.training)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Ids of B rows -> embeddings [B, F, D] of the rows' own domains."""
        embeddings: Tensor = super().forward(self.shift(features))
        return embeddings

    def owned_tables(self) -> dict[str, OwnedRows]:
        """See :class:`DomainModule`; the rows of the base copy are no domain's."""
        found: dict[str, OwnedRows] = {}
        for name, table in self._tables().items():
            for (row, column), values in _shares(table):
                rows = torch.arange(row, row + values.shape[0], device=values.device)
                title = f"{name}@{row}.{column}" if isinstance(table, ShardedTensor) else name
                found[title] = OwnedRows(values, rows // (table.size(0) // self.num_copies) - int(self.with_base))
        return found

    @torch.no_grad()
    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """See :class:`DomainModule`: domains take the values of the base copy, where there is one."""
        if route is Route.BASE or not self.with_base:
            return
        for table in self._tables().values():
            size = table.size(0) // self.num_copies
            first = torch.zeros(size, table.size(1), device=self.shift.sizes.device)
            for (row, column), values in _shares(table):
                own = values[: max(size - row, 0)]
                first[row : row + own.shape[0], column : column + own.shape[1]] = own
            if isinstance(table, ShardedTensor):
                first = sum_over_ranks(first)
            for (row, column), values in _shares(table):
                rows = torch.arange(row, row + values.shape[0], device=values.device)
                start = first[rows % size, column : column + values.shape[1]]
                if domains is not None:
                    trains = torch.isin(rows // size - 1, domains.to(rows.device))
                    start = torch.where(trains.unsqueeze(1), start, values)
                values.copy_(start)

    def _tables(self) -> dict[str, Any]:
        tables: dict[str, Any] = self.embedding_bag_collection.state_dict()
        return tables


def give_domains_tables(backbone: nn.Module, num_domains: int, with_base: bool, context: DomainContext) -> None:
    """Replaces every sparse arch of a backbone by one with a part per domain, in place; see :class:`DomainSparseArch`.

    Raises:
        ValueError: embedding tables that are not in a `SparseArch`.
    """
    for name, module in list(backbone.named_modules()):
        for child_name, child in module.named_children():
            if isinstance(child, SparseArch):
                setattr(module, child_name, DomainSparseArch(child, num_domains, with_base, context))
            elif isinstance(child, EmbeddingBagCollection | EmbeddingCollection) and not isinstance(module, SparseArch):
                raise ValueError(
                    f"the tables in '{f'{name}.{child_name}'.lstrip('.')}' cannot be had once per domain, not being in "
                    "a torchrec.models.dlrm.SparseArch, whose lookup is known; put them into one"
                )


def _widened(plain: EmbeddingBagCollection, num_copies: int) -> EmbeddingBagCollection:
    """The same tables with num_copies times the rows, all copies with the values there are."""
    configs = plain.embedding_bag_configs()
    device = plain.embedding_bags[
        configs[0].name
    ].weight.device  # not the collection's, which may have been filled since
    collection = EmbeddingBagCollection(
        tables=[_widened_config(config, num_copies) for config in configs],
        device=device,
        is_weighted=plain.is_weighted(),
    )
    if device.type != "meta":
        with torch.no_grad():
            for name, bag in plain.embedding_bags.items():
                collection.embedding_bags[name].weight.copy_(bag.weight.repeat(num_copies, 1))
    return collection


def _widened_config(config: EmbeddingBagConfig, num_copies: int) -> EmbeddingBagConfig:
    # initial values are spread as in the table of one domain
    bounds = {"weight_init_min": config.get_weight_init_min(), "weight_init_max": config.get_weight_init_max()}
    init_fn = nn.init.zeros_ if config.init_fn is nn.init.zeros_ else None
    return replace(config, num_embeddings=config.num_embeddings * num_copies, init_fn=init_fn, **bounds)


def _shares(table: Any) -> list[tuple[tuple[int, int], Tensor]]:
    """This rank's shares of a table, each with its first row and column in it."""
    if not isinstance(table, ShardedTensor):
        return [((0, 0), table.detach())]
    return [
        ((shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]), shard.tensor.detach())
        for shard in table.local_shards()
    ]
