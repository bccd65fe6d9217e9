"""STAR: star topology adaptive recommender (Sheng et al., CIKM 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.layer_bank import BackboneNormBank, LinearBank
from torchrec_mdr.baselines.over_arch import HiddenLayerInfo, OverArchInfo, over_arch_info
from torchrec_mdr.baselines.towers import DomainHiddenLayer
from torchrec_mdr.data.schema import Division
from torchrec_mdr.ops.grouped_linear import grouped_linear
from torchrec_mdr.ops.groups import DomainGroups

DOMAIN_DIM = 8  # width of the auxiliary network's domain indicator (docs/departures.md)


class StarBank(LinearBank):
    """What every domain multiplies the shared layer by, and adds to its bias."""

    step_tensors: ClassVar[int] = 2  # its products with the shared layer, and their gradients

    def reset_parameters(self) -> None:
        """Sets weights to one and biases to zero, so that domains start from the shared layer."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StarLinear(nn.Module):
    """``W = W_shared * W_d`` elementwise, ``b = b_shared + b_d`` (Sheng et al.: the star topology).

    A domain's own weights start at one and its bias at zero, so that all domains start from the shared layer, see
    docs/departures.md.

    Args:
        num_domains (int): N.
        shared (nn.Linear): the centre of the star.
    """

    def __init__(self, num_domains: int, shared: nn.Linear) -> None:
        super().__init__()
        self.shared = shared
        self.domains = StarBank(num_domains, shared.in_features, shared.out_features)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        own = self.domains
        bias: Tensor | None = own.bias
        if own.bias is not None and self.shared.bias is not None:
            bias = self.shared.bias + own.bias
        return grouped_linear(x, self.shared.weight * own.weight, bias, groups)


class StarNorm(nn.Module):
    """Partitioned norm: the domain's own statistics, scale ``gamma * gamma_d``, shift ``beta + beta_d``.

    Args:
        num_domains (int): N.
        num_features (int): width.
    """

    def __init__(self, num_domains: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()
        self.domains = BackboneNormBank(num_domains, num_features)

    def reset_parameters(self) -> None:
        """Sets the shared scale to one and the shared shift to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, groups: DomainGroups, relu: bool = False) -> Tensor:
        """[B, num_features] -> [B, num_features], with a ReLU behind if wanted."""
        own = self.domains
        return own.normalise(x, groups, self.weight * own.weight, self.bias + own.bias, relu)


class AuxiliaryNetwork(nn.Module):
    """A small network that sees the domain and the features, and adds its logit.

    Args:
        num_domains (int): N.
        in_features (int): width of the features.
        hidden (int): width of its hidden layer.
    """

    def __init__(self, num_domains: int, in_features: int, hidden: int) -> None:
        super().__init__()
        self.domains = nn.Parameter(torch.empty(num_domains, DOMAIN_DIM))
        self.reset_parameters()
        self.hidden = nn.Linear(DOMAIN_DIM + in_features, hidden)
        self.output = nn.Linear(hidden, 1)

    def reset_parameters(self) -> None:
        """Draws the domains' indicators anew."""
        nn.init.normal_(self.domains)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Features [B, in_features] and domains int64 [B] -> logits [B, 1]."""
        x = torch.cat([self.domains.index_select(0, ids), features], dim=1)
        logits: Tensor = self.output(torch.relu(self.hidden(x)))
        return logits


class StarOverArch(nn.Module):
    """Takes an over arch's place: partitioned norm, star-shaped layers, and the auxiliary network beside them.

    Args:
        num_domains (int): N.
        info (OverArchInfo): the backbone's layers, the centres of the stars.
        auxiliary_hidden (int): width of the auxiliary network.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, num_domains: int, info: OverArchInfo, auxiliary_hidden: int, context: DomainContext) -> None:
        super().__init__()
        self.norm = StarNorm(num_domains, info.in_features)
        self.hidden = nn.ModuleList(_hidden_layer(num_domains, layer) for layer in info.hidden)
        self.output = StarLinear(num_domains, info.output)
        self.auxiliary = AuxiliaryNetwork(num_domains, info.in_features, auxiliary_hidden)
        self.context = context

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        groups = self.context.state.groups(0)
        x = self.norm(features, groups)
        for layer in self.hidden:
            x = layer(x, groups)
        logits: Tensor = self.output(x, groups) + self.auxiliary(features, groups.ids)
        return logits


@dataclass(frozen=True)
class Star(Baseline):
    """Every layer is a shared one times a domain's own, the input is normalised per domain.

    Where the backbone has batch norms, they are partitioned too (docs/departures.md; the paper has one on the input).

    Args:
        auxiliary_hidden (int): width of the auxiliary network's hidden layer.

    Example::

        >>> [stage.name for stage in Star().stages([Division("scenario", 3)])]
        ['train']
    """

    auxiliary_hidden: int = 32

    def __post_init__(self) -> None:
        if self.auxiliary_hidden < 1:
            raise ValueError(f"auxiliary_hidden must be at least 1, not {self.auxiliary_hidden}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        info = over_arch_info(backbone, targets, type(self).__name__)
        backbone.over_arch = StarOverArch(num_domains, info, self.auxiliary_hidden, context)
        return backbone


def _hidden_layer(num_domains: int, info: HiddenLayerInfo) -> DomainHiddenLayer:
    """A star around a backbone's layer, with a partitioned norm where that has a norm."""
    norm = StarNorm(num_domains, info.linear.out_features) if info.norm is not None else None
    return DomainHiddenLayer(StarLinear(num_domains, info.linear), info.dropout, norm)
