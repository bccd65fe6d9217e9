"""Banks as embedding tables: where there are very many domains, a domain's adapters are rows like any others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.types import LazyAwaitable
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.bank_rows import RowLayout, reset_rows
from torchrec_mdr.adapters.context import DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.ops.groups import DomainGroups

Chooser = Callable[[DomainState], tuple[Tensor, DomainGroups]]


class BankTables(nn.Module, DomainModule):
    """The rows of a model's banks in TorchRec's EmbeddingCollections, in place of parameters that every rank holds.

    A table has one row a domain, with all that one layer's adapter of it consists of (see :class:`RowLayout`); tables
    of one width are a collection. In a pass, the batch's distinct domains are looked up once, and the banks work on the
    rows that come back. So TorchRec's sharding, fused optimizers and checkpoints serve adapters as they serve
    embeddings: what is moved, sent and updated are the rows of domains that are there.

    Args:
        banks (Mapping[str, Bank]): by their names in the model; each gives up its parameters.
        sizes (Sequence[int]): number of domains of each division.
        data_type (DataType): of the tables; rows come out in float32.
        choose (Callable | None): for the FUSED route of a method whose rows go through other domains' adapters: the
            rows int64 [U] that a pass needs, and its groups by them.

    Example::

        >>> from torchrec_mdr.adapters.bank import LoRABank, banks_for_tables
        >>> with banks_for_tables():
        ...     bank = LoRABank(num_adapters=1_000_000, in_features=8, out_features=4, rank=2)
        >>> tables = BankTables({"over_arch.0.adapter": bank}, [1_000_000])
        >>> {name: (tuple(table.shape), table.is_meta) for name, table in tables.named_parameters()}
        {'collections.width_28.embeddings.over_arch/0/adapter.weight': ((1000000, 28), True)}
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS

    def __init__(
        self,
        banks: Mapping[str, Bank],
        sizes: Sequence[int],
        data_type: DataType = DataType.FP32,
        choose: Chooser | None = None,
    ) -> None:
        super().__init__()
        self.layouts: dict[str, RowLayout] = {}
        self.divisions: dict[str, int] = {}
        configs: dict[int, list[EmbeddingConfig]] = {}
        for name, bank in banks.items():
            table, layout = table_of(name), RowLayout.of(bank)
            self.layouts[table], self.divisions[table] = layout, bank.division
            bank._parameters.clear()
            bank.table = table
            config = EmbeddingConfig(
                name=table,
                embedding_dim=layout.width,
                num_embeddings=bank.num_adapters,
                feature_names=[_key(bank.division)],
                init_fn=partial(reset_rows, bank, layout),
                data_type=data_type,
            )
            configs.setdefault(layout.width, []).append(config)
        meta = torch.device("meta")
        self.collections = nn.ModuleDict(
            {f"width_{width}": EmbeddingCollection(tables=own, device=meta) for width, own in configs.items()}
        )
        self.distinct = DistinctDomains(sizes, choose)
        self.rows_of_pass = RowsOfPass(banks, self.layouts, list(configs.values()))

    def forward(self, state: DomainState) -> DomainState:
        """The state of a pass -> the same, with the rows of its domains; all ranks come here together."""
        features = self.distinct(state)
        found = [collection(features) for collection in self.collections.values()]
        out: DomainState = self.rows_of_pass(state, *found)
        return out

    def train_tables(self, trains: bool) -> None:
        """Whether gradients reach the tables in the passes to come."""
        self.rows_of_pass.trains = trains

    def trains_on(self, name: str, route: Route, division: int) -> bool:
        """Whether a stage on this route may train a table, by its tensor's name; see :meth:`Bank.trains_on`."""
        return route is not Route.DOMAIN or self.divisions[name.split(".")[-2]] == division

    def freeze_domains(self, division: int, frozen: Tensor) -> None:
        """Leaves domains, bool [N], out of training passes: neither their rows nor their optimizer's state move."""
        self.distinct.frozen[division] = frozen

    def local_rows(self, route: Route, division: int) -> dict[str, list[tuple[int, Tensor]]]:
        """This rank's rows of each table that a stage trains, by the tensor's name: the first one's number, and all."""
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for name, value in self.state_dict().items():
            if not self.trains_on(name, route, division):
                continue
            if isinstance(value, ShardedTensor):
                found[name] = [(shard.metadata.shard_offsets[0], shard.tensor) for shard in value.local_shards()]
            else:
                found[name] = [(0, value)]
        return found

    def rows_of_domains(self, domains: Tensor, first: int, count: int, expert_index: int = 0) -> Tensor:
        """Bool [count], which rows from a first one on are those of one expert of some domains, bool [N]."""
        rows = torch.arange(first, first + count) - expert_index * len(domains)
        inside = (rows >= 0) & (rows < len(domains))
        return inside & domains[rows.clamp(0, len(domains) - 1)]

    def follows_domains(self, name: str) -> bool:
        """See :class:`DomainModule`."""
        return self.divisions[name.split(".")[-2]] == 0


class DistinctDomains(nn.Module):
    """Finds the distinct domains of a pass. Holds no tensor: a leaf for the pipeline's tracer, since it looks at data.

    Args:
        sizes (Sequence[int]): number of domains of each division.
        choose (Callable | None): see :class:`BankTables`.
    """

    def __init__(self, sizes: Sequence[int], choose: Chooser | None = None) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.choose = choose
        self.frozen: dict[int, Tensor] = {}  # bool [N] by division

    def forward(self, state: DomainState) -> KeyedJaggedTensor:
        """The state, whose groups by the domains present are kept -> these domains' rows in tables, by division."""
        ids: list[Tensor] = []
        for division, size in enumerate(self.sizes):
            own = state.domains.ids[:, division]
            if state.route is Route.FUSED and self.choose is not None:
                distinct, state.cache["present", division, 1] = self.choose(state)
                ids.append(distinct)
                continue
            if state.route is not Route.FUSED and division != state.division:
                ids.append(own[:0])
                continue
            frozen = self.frozen.get(division) if self.training else None
            if frozen is not None:
                own = torch.where(frozen.to(own.device)[own.clamp(min=0)], -1, own)
            distinct, state.cache["present", division, 1] = distinct_domains(own)
            ids.append(distinct + state.expert_index * size)
        return KeyedJaggedTensor(
            keys=[_key(division) for division in range(len(self.sizes))],
            values=torch.cat(ids),
            lengths=torch.tensor([len(own) for own in ids], dtype=torch.int32, device=ids[0].device),
            stride=1,  # one list of ids a rank, as long as it has domains
        )


class RowsOfPass(nn.Module):
    """Hands the rows that were looked up to the banks. Holds no tensor: a leaf for the pipeline's tracer.

    Args:
        banks (Mapping[str, Bank]): by their names in the model.
        layouts (Mapping[str, RowLayout]): of rows, by table.
        configs (Sequence[Sequence[EmbeddingConfig]]): the tables of each collection.
    """

    def __init__(
        self, banks: Mapping[str, Bank], layouts: Mapping[str, RowLayout], configs: Sequence[Sequence[EmbeddingConfig]]
    ) -> None:
        super().__init__()
        self.trains = True
        by_table = {table_of(name): bank for name, bank in banks.items()}
        self.places: list[tuple[int, str, Bank, RowLayout]] = []  # of a collection's output, and what becomes of it
        for number, tables in enumerate(configs):
            keys = [config.feature_names[0] for config in tables]
            for config in tables:
                (key,) = config.feature_names
                name = key if keys.count(key) == 1 else f"{key}@{config.name}"  # as TorchRec names what it looks up
                self.places.append((number, name, by_table[config.name], layouts[config.name]))

    def forward(self, state: DomainState, *found: Any) -> DomainState:
        """Rows by table, one mapping a collection -> the state, whose banks find their rows there."""
        outputs = [one.wait() if isinstance(one, LazyAwaitable) else one for one in found]
        for number, name, bank, layout in self.places:
            if ("present", bank.division, 1) not in state.cache:
                continue  # of a division that does not work on this route
            rows = outputs[number][name].values()
            parts = layout.cut(rows if self.trains else rows.detach())
            turned = zip(parts.items(), layout.transposed, strict=True)
            # each by itself in memory, as products want it
            tensors = {role: part.mT.contiguous().mT if turn else part.contiguous() for (role, part), turn in turned}
            state.cache["rows", bank.table] = bank.over(tensors)
        return state


def distinct_domains(ids: Tensor) -> tuple[Tensor, DomainGroups]:
    """The distinct domains among rows, and the rows' groups by them.

    Args:
        ids (Tensor): int64 [B], -1 for rows without a domain.

    Returns:
        tuple: int64 [U], ascending; groups of U adapters, domain i of the first being adapter i of the second.

    Example::

        >>> domains, groups = distinct_domains(torch.tensor([70_000, 3, -1, 3]))
        >>> domains.tolist(), groups.ids.tolist()
        ([3, 70000], [1, 0, -1, 0])
    """
    domains, local = torch.unique(ids, return_inverse=True)
    if domains.numel() and domains[0] < 0:
        domains, local = domains[1:], local - 1
    elif (local[1:] >= local[:-1]).all():  # the loader's rows are sorted
        return domains, DomainGroups.from_sorted_ids(local, domains.numel())
    return domains, DomainGroups.from_ids(local, domains.numel())


def table_of(bank: str) -> str:
    """The name of a bank's table; dots would part names of modules."""
    return bank.replace(".", "/")


def _key(division: int) -> str:
    return f"domain_{division}"
