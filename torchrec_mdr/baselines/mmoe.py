"""MMoE: multi-gate mixture of experts (Ma et al., KDD 2018), with domains for tasks as in MultiLoRA's Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.experts import ExpertLayer, mix_experts
from torchrec_mdr.baselines.layer_bank import LinearBank
from torchrec_mdr.baselines.over_arch import HiddenLayerInfo, check_depth, over_arch_info
from torchrec_mdr.baselines.towers import Towers
from torchrec_mdr.data.schema import Division


class MMoEOverArch(nn.Module):
    """Takes an over arch's place: experts, a gate per domain, a tower per domain.

    Args:
        num_domains (int): N.
        num_experts (int): E.
        in_features (int): width of the input.
        below (Sequence[HiddenLayerInfo]): the backbone's layers that the experts are modelled on, at least one.
        above (Sequence[HiddenLayerInfo]): those that the towers are modelled on.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(
        self,
        num_domains: int,
        num_experts: int,
        in_features: int,
        below: Sequence[HiddenLayerInfo],
        above: Sequence[HiddenLayerInfo],
        context: DomainContext,
    ) -> None:
        super().__init__()
        widths = [in_features, *(layer.linear.out_features for layer in below)]
        self.experts = nn.Sequential(
            *(ExpertLayer(num_experts, width, layer) for width, layer in zip(widths[:-1], below, strict=True))
        )
        self.gate = LinearBank(num_domains, in_features, num_experts, bias=False)
        self.towers = Towers(num_domains, widths[-1], above)
        self.context = context

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        groups = self.context.state.groups(0)
        mixed = mix_experts(self.gate(features, groups), self.experts(features))
        logits: Tensor = self.towers(mixed, groups)
        return logits


@dataclass(frozen=True)
class MMoE(Baseline):
    """Every row goes through all experts; its domain's gate weighs them and its domain's tower scores.

    Widths are the backbone's: its first hidden layers make an expert, the others and the score a tower.

    Args:
        num_experts (int | None): E; one per domain where left out, as in MultiLoRA's comparison.
        num_expert_layers (int): hidden layers of an expert, at least 1.

    Example::

        >>> [stage.name for stage in MMoE(num_experts=4).stages([Division("scenario", 3)])]
        ['train']
    """

    num_experts: int | None = None
    num_expert_layers: int = 1

    def __post_init__(self) -> None:
        if self.num_experts is not None and self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {self.num_experts}")
        if self.num_expert_layers < 1:
            raise ValueError(f"num_expert_layers must be at least 1, not {self.num_expert_layers}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        info = over_arch_info(backbone, targets, type(self).__name__)
        check_depth("num_expert_layers", self.num_expert_layers, info)
        below, above = info.hidden[: self.num_expert_layers], info.hidden[self.num_expert_layers :]
        backbone.over_arch = MMoEOverArch(
            num_domains, self.num_experts or num_domains, info.in_features, below, above, context
        )
        return backbone
