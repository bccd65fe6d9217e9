"""How adapters learn the domains of the rows in front of them."""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchrec_mdr.ops.groups import BatchDomains, DomainGroups


class Route(enum.Enum):
    """The way a forward pass takes through adapted layers."""

    BASE = "base"  # the backbone alone
    DOMAIN = "domain"  # backbone and, per row, the one adapter of its domain under the active division
    FUSED = "fused"  # backbone and all adapters, combined by the method's fusion or gate


@dataclass(frozen=True, eq=False)
class DomainState:
    """What one forward pass is about.

    Args:
        route (Route): the way through adapted layers.
        domains (BatchDomains): ids and groups of the rows.
        division (int): the division whose adapters work on the DOMAIN route.
        expert_index (int): which of a domain's experts works on the DOMAIN route (MoE-MLoRA).
        positions (int): rows of a layer's input that one row of the batch stands for, see :meth:`spread`.
        cache (dict[Any, Any]): what layers share within this pass, such as a common gate's output.
        called (set[int] | None): ids of the adapted layers that the pass has come through, where that is asked for.
    """

    route: Route
    domains: BatchDomains
    division: int = 0
    expert_index: int = 0
    positions: int = 1
    cache: dict[Any, Any] = field(default_factory=dict)
    called: set[int] | None = None

    def groups(self, division: int) -> DomainGroups:
        """Groups of the rows under a division."""
        if self.domains.groups:
            return self.domains.groups[division]
        key = "groups", division, self.positions
        if key not in self.cache:
            self.cache[key] = DomainGroups.from_ids(self.domains.ids[:, division], self.domains.sizes[division])
        groups: DomainGroups = self.cache[key]
        return groups

    def present_groups(self, division: int) -> DomainGroups:
        """Groups of the rows by the domains of a division that are in this pass, see :class:`BankTables`."""
        key = "present", division, self.positions
        if key not in self.cache:
            self.cache[key] = self.cache["present", division, 1].repeat_interleave(self.positions)
        groups: DomainGroups = self.cache[key]
        return groups

    def spread(self, positions: int) -> DomainState:
        """The state for an input with some positions a row, all of the row's domain; what is shared stays so."""
        if positions == self.positions:
            return self
        key = "positions", positions
        if key not in self.cache:
            self.cache[key] = self.domains.repeat_interleave(positions)
        return replace(self, domains=self.cache[key], positions=positions)


class DomainContext:
    """Holds the state of the forward pass under way; one object shared by all adapters of a model.

    Every thread has passes of its own. They may be nested, and a backward pass that computes a part of a forward pass
    again (activation checkpointing) finds that pass's state. Copies and saved models start without one.

    Example::

        >>> DomainContext().state
        Traceback (most recent call last):
        ...
        RuntimeError: an adapted layer was called outside its MultiDomainModel, which alone knows the rows' domains
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[DomainContext], tuple[()]]:
        return DomainContext, ()

    @property
    def state(self) -> DomainState:
        """The state of the forward pass under way.

        Raises:
            RuntimeError: no forward pass is under way.
        """
        state: DomainState | None = getattr(self._local, "state", None)
        if state is None:
            state = self._recomputed()
        if state is None:
            raise RuntimeError(
                "an adapted layer was called outside its MultiDomainModel, which alone knows the rows' domains"
            )
        return state

    @contextmanager
    def open(self, state: DomainState) -> Iterator[None]:
        """Makes a state visible to the adapters for one forward pass; afterwards the one before is back."""
        before = getattr(self._local, "state", None)
        self._local.state = state
        try:
            yield
        finally:
            self._local.state = before

    def keep_for_backward(self, state: DomainState, output: object) -> None:
        """Has the backward pass through a forward pass's output find that pass's state.

        The output's node comes before all others of its pass, and runs in the thread that recomputes them.
        """
        if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.grad_fn is None:
            return
        local = self._local

        def begin(gradients: object) -> None:
            local.backward = weakref.ref(state)  # the graph holds the state, and nothing else shall

        output.grad_fn.register_prehook(begin)

    def _recomputed(self) -> DomainState | None:
        """The state of the pass whose backward pass is under way in this thread."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None
        reference = getattr(self._local, "backward", None)
        return None if reference is None else reference()
