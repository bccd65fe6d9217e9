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

    def leave_start(self) -> None:
        """Goes to where training begins, if that is not the start; called where a prepared stage begins to train."""

    def follows_domains(self, name: str) -> bool:
        """Whether a tensor, by its name below this module, has rows that belong to domains of the natural division."""
        return False

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, sources: Tensor) -> None:
        """Fills a tensor of a model that has other domains than the checkpoint its old rows come from.

        Args:
            name (str): the tensor's, below this module.
            old (Tensor): as the checkpoint has it.
            new (Tensor): to fill in place; rows of new domains hold initial values. Here they get the mean of old ones.
            sources (Tensor): int64 [N], for each domain of the new model's natural division, which one it was in the
                checkpoint; -1 for new ones.
        """
        new.copy_(old.mean(0).expand_as(new))
        new[sources >= 0] = old[sources[sources >= 0]]

    def owned_tables(self) -> dict[str, OwnedRows]:
        """This rank's shares of embedding tables that hold a copy per domain, by names no other share has."""
        return {}


class AllDomainsModule:
    """Mixed into a module that sends each row through the parts of all domains."""

    def row_numbers(self, route: Route) -> int:
        """Numbers that a pass on a route makes for each row at least."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a row takes")
