"""Banks from a checkpoint that holds them in the other form, or for fewer domains: as parameters, or as tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.bank_rows import RowLayout
from torchrec_mdr.adapters.bank_tables import table_of
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import on_every
from torchrec_mdr.distributed.stored_rows import StoredTensor
from torchrec_mdr.model import MultiDomainModel

BLOCK = 1 << 14  # rows read at once
_BACKBONE = "backbone."


class StoredBanks:
    """What a checkpoint holds of the banks of a model, whichever form either has.

    Args:
        folder (str): the checkpoint.
        model (MultiDomainModel): to be loaded.
        prefix (str): how names of tensors begin in the checkpoint, before those of the model.
    """

    def __init__(self, folder: str, model: MultiDomainModel, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        self.sizes = on_every(lambda: checkpoint.stored_sizes(folder))
        self.stored_tables = {
            name.split(".")[-2]: name
            for name in self.sizes
            if name.startswith(f"{prefix}bank_tables.") and name.endswith(".weight")
        }
        self.domains = [division.num_domains for division in model.divisions]
        tables = model.bank_tables
        self.layouts = {} if tables is None else dict(tables.layouts)
        self.divisions = {} if tables is None else dict(tables.divisions)
        modules: nn.Module = get_unwrapped_module(model).backbone
        self.banks = {n: b for n, b in modules.named_modules() if isinstance(b, Bank) and b.fits_table}
        for name, bank in self.banks.items():
            if bank.table is None:
                self.layouts[table_of(name)] = RowLayout.of(bank)
                self.divisions[table_of(name)] = bank.division

    def fills(self, name: str) -> bool:
        """Whether a tensor of the model is a bank's that has to be filled here: it cannot be loaded as it is."""
        table = self._table(name)
        if table is None or not (table in self.stored_tables or self._roles(table) is not None):
            return False
        if name.startswith("bank_tables."):
            stored = self.prefix + name
            return stored not in self.sizes or self.sizes[stored][0][0] != self._rows_here(table)
        return self.prefix + name not in self.sizes and table in self.stored_tables

    @torch.no_grad()
    def fill(self, name: str, target: Tensor | ShardedTensor, sources: Tensor | None) -> None:
        """Fills a tensor that :meth:`fills` names: rows of old domains; those of new ones keep what they have.

        Args:
            name (str): in the model.
            target (Tensor | ShardedTensor): in place; of a sharded table, this rank's rows.
            sources (Tensor | None): int64 [N], for each domain which one it was in the checkpoint, -1 for new ones;
                None where they are matched by place.

        Raises:
            ValueError: the checkpoint's adapters have another shape, or its table has more rows.
        """
        table = self._table(name)
        assert table is not None
        old = self._old_rows(table)
        origins = self._origins(table, old.count, sources if self.divisions[table] == 0 else None)
        if isinstance(target, ShardedTensor):
            pieces = [(shard.metadata.shard_offsets[0], shard.tensor) for shard in target.local_shards()]
        else:
            pieces = [(0, target)]
        role = None if name.startswith("bank_tables.") else name.rpartition(".")[2]
        for first, rows in pieces:
            for begin in range(0, len(rows), BLOCK):
                block = rows[begin : begin + BLOCK]
                own = origins[first + begin : first + begin + len(block)]
                known = own >= 0
                if not known.any():
                    continue
                found = old.at(own[known])
                part = found if role is None else self.layouts[table].cut(found)[role]
                block[known.to(block.device)] = part.to(block)

    def _table(self, name: str) -> str | None:
        """The table that a tensor of the model is, or would be a part of."""
        if name.startswith("bank_tables."):
            return name.split(".")[-2]
        bank, _, role = name.removeprefix(_BACKBONE).rpartition(".")
        own = self.banks.get(bank)
        return table_of(bank) if own is not None and own.table is None and role in own.row_tensors() else None

    def _rows_here(self, table: str) -> int:
        return next(bank.num_adapters for name, bank in self.banks.items() if table_of(name) == table)

    def _roles(self, table: str) -> list[str] | None:
        """Names of a replicated bank's tensors in the checkpoint; None where it does not have them."""
        path = f"{self.prefix}{_BACKBONE}{table.replace('/', '.')}"
        names = [f"{path}.{role}" for role in self.layouts[table].roles]
        return names if all(name in self.sizes for name in names) else None

    def _old_rows(self, table: str) -> _OldRows:
        layout = self.layouts[table]
        if table in self.stored_tables:
            stored = StoredTensor(self.folder, self.stored_tables[table])
            if stored.size[1] != layout.width:
                raise ValueError(
                    f"checkpoint {self.folder} is of another model: '{self.stored_tables[table]}' has rows of "
                    f"{stored.size[1]} numbers, not {layout.width}"
                )
            return _OldRows(stored.size[0], stored, None, layout)
        names = self._roles(table)
        assert names is not None
        tensors: checkpoint.State = {
            role: torch.empty(self.sizes[name][0], dtype=self.sizes[name][1])
            for role, name in zip(layout.roles, names, strict=True)
        }
        checkpoint.load(self.folder, {name: tensors[role] for role, name in zip(layout.roles, names, strict=True)})
        count = len(tensors[layout.roles[0]])
        wanted = {role: tuple(part.shape[1:]) for role, part in layout.cut(torch.empty(1, layout.width)).items()}
        for role, name in zip(layout.roles, names, strict=True):
            if tuple(tensors[role].shape[1:]) != wanted[role]:
                raise ValueError(
                    f"checkpoint {self.folder} is of another model: '{name}' is {list(tensors[role].shape)} there and "
                    f"{[count, *wanted[role]]} here"
                )
        return _OldRows(count, None, tensors, layout)

    def _origins(self, table: str, count: int, sources: Tensor | None) -> Tensor:
        """Int64 [rows], which row of the checkpoint each row was; -1 for new ones."""
        rows, domains = self._rows_here(table), self.domains[self.divisions[table]]
        experts = rows // domains
        old_domains = count // experts
        if old_domains > domains and sources is None:
            raise ValueError(
                f"checkpoint {self.folder} has {old_domains} domains in '{table}', this run has {domains}; none may go"
            )
        if sources is None:
            places = torch.arange(domains)
            sources = torch.where(places < old_domains, places, -1)
        offsets = torch.arange(experts).unsqueeze(1) * old_domains
        return torch.where(sources >= 0, sources + offsets, -1).flatten()


class _OldRows:
    """Rows of one bank in a checkpoint, as a table holds them."""

    def __init__(
        self, count: int, stored: StoredTensor | None, tensors: checkpoint.State | None, layout: RowLayout
    ) -> None:
        self.count, self._stored, self._tensors, self._layout = count, stored, tensors, layout

    def at(self, places: Tensor) -> Tensor:
        """Rows int64 [U]; of a table, no others are read."""
        low, high = int(places.min()), int(places.max()) + 1
        if self._stored is not None and high - low > len(places):
            return self._stored.at(places)
        if self._stored is not None:
            return self._stored.rows(low, high)[places - low]
        assert self._tensors is not None
        return self._layout.join({role: tensor[low:high] for role, tensor in self._tensors.items()})[places - low]


def has_tables(folder: str) -> bool:
    """Whether a checkpoint holds banks as tables."""
    return any(name.startswith("bank_tables.") for name in checkpoint.stored_sizes(folder))


def load_state(folder: str, model: MultiDomainModel, state: checkpoint.State, sources: Tensor | None = None) -> None:
    """Loads tensors of a model from a checkpoint, whether banks are parameters or tables there; called by all ranks.

    Args:
        folder (str): the checkpoint.
        model (MultiDomainModel): whose tensors they are.
        state (State): to load into, by name.
        sources (Tensor | None): where only banks that are tables there have domains, int64 [N], which one of the
            checkpoint each domain of the natural division is; None where they are the same.

    Raises:
        ValueError: see :func:`torchrec_mdr.distributed.checkpoint.load`.
    """
    banks = StoredBanks(folder, model)
    here = {name for name in state if banks.fills(name)}
    for name in sorted(here):
        banks.fill(name, state[name], sources)
    checkpoint.load(folder, {name: tensor for name, tensor in state.items() if name not in here})
