"""What a module with something of its own for each domain says of itself, so that nothing else has to know its type."""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple

from torch import Tensor

from torchrec_mdr.adapters.context import Route


class ParameterGroup(enum.Enum):
    """The groups of parameters a stage can train; every parameter is in exactly one, by the type of its module."""

    EMBEDDINGS = "embeddings"
    BACKBONE = "backbone"
    ADAPTERS = "adapters"
    GATE = "gate"


class OwnedRows(NamedTuple):
    """Rows of a tensor, each of which belongs to one domain.

    Args:
        tensor (Tensor): [R, ...], what trains, not a copy.
        owners (Tensor): int64 [R], the domains; -1 for rows of none, which keep their start.
    """

    tensor: Tensor
    owners: Tensor


class DomainModule:
    """Mixed into a module: what becomes of its domains' parts where a stage begins, or where domains are added.

    Every method has an answer for modules that need none of their own.
    """

    widens_tables: ClassVar[bool] = False  # whether its embedding tables hold copies that a plain checkpoint lacks

    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """Takes up what an earlier stage has come to, once its tensors are loaded.

        Args:
            route (Route): of the stage that begins.
            division (int): whose adapters it trains, on the DOMAIN route.
            domains (Tensor | None): int64, the domains that train; all others, and what domains share, stay.
        """

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, num_domains: int) -> None:
        """Fills a tensor of a model that has more domains than the checkpoint its old rows come from.

        Args:
            name (str): the tensor's, below this module.
            old (Tensor): as the checkpoint has it, with fewer rows.
            new (Tensor): to fill in place; new rows hold their initial values. Here they get the mean of the old ones.
            num_domains (int): of the new model's natural division, whose first domains are the old ones.
        """
        new.copy_(old.mean(0).expand_as(new))
        new[: len(old)].copy_(old)

    def owned_tables(self) -> dict[str, OwnedRows]:
        """This rank's shares of embedding tables that hold a copy per domain, by names no other share has."""
        return {}
