"""Single: a model of its own for every domain (the lower baseline of MultiLoRA's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.domain_tables import give_domains_tables
from torchrec_mdr.baselines.layer_bank import domain_layer, replace_layers
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import Stage, train_stage


@dataclass(frozen=True)
class Single(Baseline):
    """Every domain has the whole backbone for itself, embeddings included, and learns from its own rows alone.

    The domains' models train side by side: a step costs what a step of one model on the whole batch costs. Each stops
    by its own validation AUC and keeps its own best state, embeddings included. Where tables train with Adam, a domain
    that is absent from a step has its embeddings move by momentum, unlike in a run of its own; with thousands of rows a
    step that is rare.

    Example::

        >>> [stage.per_domain for stage in Single().stages([Division("scenario", 3)])]
        [True]
    """

    needs_backbone_targets: ClassVar[bool] = False

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        give_domains_tables(backbone, num_domains, False, context)
        replace_layers(backbone, lambda layer: domain_layer(layer, num_domains, context))
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """The one stage."""
        return [train_stage(per_domain=True)]
