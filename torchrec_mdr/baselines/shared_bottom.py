"""Shared-Bottom: shared layers below, a tower per domain above (Caruana, 1997; a baseline of MultiLoRA's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.over_arch import check_depth, over_arch_info
from torchrec_mdr.baselines.towers import Towers
from torchrec_mdr.data.schema import Division


class SharedBottomOverArch(nn.Module):
    """Takes an over arch's place: shared hidden layers, then each row's own domain's tower.

    Args:
        bottom (nn.Sequential): the shared layers; may be empty.
        towers (Towers): the rest.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, bottom: nn.Sequential, towers: Towers, context: DomainContext) -> None:
        super().__init__()
        self.bottom = bottom
        self.towers = towers
        self.context = context

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        logits: Tensor = self.towers(self.bottom(features), self.context.state.groups(0))
        return logits


@dataclass(frozen=True)
class SharedBottom(Baseline):
    """Embeddings and the first hidden layers are shared, the other hidden layers and the score are the domain's own.

    Widths are the backbone's, so a row passes as many layers of the same sizes as in it. What stands beside the MLP in
    a backbone (linear part, cross net, ...) stays shared.

    Args:
        num_shared_layers (int): shared hidden layers. With 0 only the embeddings are shared, as MultiLoRA's authors
            have it (their section 4.1.2); 1 is what public implementations do with two layers.

    Example::

        >>> [stage.name for stage in SharedBottom().stages([Division("scenario", 3)])]
        ['train']
    """

    num_shared_layers: int = 1

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        info = over_arch_info(backbone, targets, type(self).__name__)
        check_depth("num_shared_layers", self.num_shared_layers, info)
        below, above = info.hidden[: self.num_shared_layers], info.hidden[self.num_shared_layers :]
        bottom = nn.Sequential(*(backbone.get_submodule(layer.name) for layer in below))
        width = below[-1].linear.out_features if below else info.in_features
        backbone.over_arch = SharedBottomOverArch(bottom, Towers(num_domains, width, above), context)
        return backbone
