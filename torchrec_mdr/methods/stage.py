"""Stages as values: what a method's stage trains, on which route, and how it picks its result."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import ParameterGroup

EMBEDDINGS, BACKBONE = ParameterGroup.EMBEDDINGS, ParameterGroup.BACKBONE
ADAPTERS, GATE = ParameterGroup.ADAPTERS, ParameterGroup.GATE


@dataclass(frozen=True)
class Stage:
    """One stage of a method; the trainer runs it without knowing the method.

    Args:
        name (str): `pretrain`, `adapt`, `adapt_DIVISION`, `fuse`, `gate`, `joint` or `train`.
        settings (str): which of the run's stage settings apply: `pretrain`, `adapt`, `fuse`, `gate` or `joint`.
        trains (frozenset[ParameterGroup]): everything else is frozen, optimizer state included.
        route (Route): the way of the forward pass, in training and in the stage's validation.
        division (int): on the DOMAIN route, the division whose adapters work; only their banks train.
        per_domain (bool): domains train as if alone: rows weigh the inverse of their domain's share, each domain keeps
            its own best adapter, and a domain whose patience has run out is frozen (docs/departures.md, isolation).
        expert_passes (int): experts per domain, trained one pass after the other.
        begins_elsewhere (bool): whether its start, see `DomainModule.start_stage`, is a result that it falls back on,
            and not where training begins, see `DomainModule.leave_start`.

    Example::

        >>> Stage("pretrain", "pretrain", frozenset({EMBEDDINGS, BACKBONE}), Route.BASE).trains_embeddings
        True
    """

    name: str
    settings: str
    trains: frozenset[ParameterGroup]
    route: Route
    division: int = 0
    per_domain: bool = False
    expert_passes: int = 1
    begins_elsewhere: bool = False

    @property
    def trains_embeddings(self) -> bool:
        """Whether embedding tables train; where not, their lookup runs without gradients."""
        return EMBEDDINGS in self.trains

    @property
    def starts_from_result(self) -> bool:
        """Whether its start is a finished model, and so a candidate for its result: not where the backbone trains."""
        return not self.trains_backbone

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the pretrained model is still there afterwards: embeddings that train per domain are copies."""
        return not self.trains_backbone and (self.per_domain or not self.trains_embeddings)

    @property
    def trains_backbone(self) -> bool:
        """Whether the dense part of the backbone trains; where not, its normalisation runs in evaluation mode."""
        return BACKBONE in self.trains


def pretrain_stage() -> Stage:
    """The backbone on all domains together, without adapters."""
    return Stage("pretrain", "pretrain", frozenset({EMBEDDINGS, BACKBONE}), Route.BASE)


def adapt_stage(name: str = "adapt", division: int = 0, expert_passes: int = 1) -> Stage:
    """The adapters of one division, every domain as if alone."""
    return Stage(
        name, "adapt", frozenset({ADAPTERS}), Route.DOMAIN, division, per_domain=True, expert_passes=expert_passes
    )


def train_stage(route: Route = Route.DOMAIN, per_domain: bool = False) -> Stage:
    """The one stage of a model that is trained from scratch, with the settings of pretraining."""
    return Stage("train", "pretrain", frozenset({EMBEDDINGS, BACKBONE}), route, per_domain=per_domain)
