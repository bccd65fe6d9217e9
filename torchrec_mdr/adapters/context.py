"""How adapters learn the domains of the rows in front of them."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torchrec_mdr.ops.groups import BatchDomains, DomainGroups


class Route(enum.Enum):
    """The way a forward pass takes through adapted layers."""

    BASE = "base"  # the backbone alone
    DOMAIN = "domain"  # backbone and, per row, the one adapter of its domain under the active division
    FUSED = "fused"  # backbone and all adapters, combined by the method's fusion or gate


@dataclass(frozen=True)
class DomainState:
    """What one forward pass is about.

    Args:
        route (Route): the way through adapted layers.
        domains (BatchDomains): ids and groups of the rows.
        division (int): the division whose adapters work on the DOMAIN route.
        expert_index (int): which of a domain's experts works on the DOMAIN route (MoE-MLoRA).
        cache (dict[str, Any]): what layers share within this pass, such as a common gate's output.
    """

    route: Route
    domains: BatchDomains
    division: int = 0
    expert_index: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def groups(self, division: int) -> DomainGroups:
        """Groups of the rows under a division."""
        return self.domains.groups[division]


class DomainContext:
    """Holds the state of the forward pass under way; one object shared by all adapters of a model.

    Example::

        >>> DomainContext().state
        Traceback (most recent call last):
        ...
        RuntimeError: an adapted layer was called outside its MultiDomainModel, which alone knows the rows' domains
    """

    def __init__(self) -> None:
        self._state: DomainState | None = None

    @property
    def state(self) -> DomainState:
        """The state of the forward pass under way.

        Raises:
            RuntimeError: no forward pass is under way.
        """
        if self._state is None:
            raise RuntimeError(
                "an adapted layer was called outside its MultiDomainModel, which alone knows the rows' domains"
            )
        return self._state

    @contextmanager
    def open(self, state: DomainState) -> Iterator[None]:
        """Makes a state visible to the adapters for one forward pass.

        Raises:
            RuntimeError: another forward pass is under way.
        """
        if self._state is not None:
            raise RuntimeError("a MultiDomainModel's forward cannot be nested in another one's")
        self._state = state
        try:
            yield
        finally:
            self._state = None
