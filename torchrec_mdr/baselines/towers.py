"""Hidden layers and scoring layers that every domain has for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.baselines.layer_bank import BackboneNormBank, LinearBank
from torchrec_mdr.baselines.over_arch import HiddenLayerInfo
from torchrec_mdr.ops.groups import DomainGroups


class DomainHiddenLayer(nn.Module):
    """One hidden layer per domain: linear, dropout, norm, ReLU, in the backbone's order.

    Args:
        num_domains (int): N.
        in_features (int): width of the input.
        like (HiddenLayerInfo): the backbone's layer, whose width, dropout and norm the domains' have.
        copies (int): such layers a domain has, side by side; their outputs are one after the other.
    """

    def __init__(self, num_domains: int, in_features: int, like: HiddenLayerInfo, copies: int = 1) -> None:
        super().__init__()
        width = copies * like.linear.out_features
        self.linear = LinearBank(num_domains, in_features, width)
        self.dropout = FastDropout(like.dropout)
        norm = like.norm
        self.norm = (
            BackboneNormBank(num_domains, width, 0, norm.eps, norm.momentum or 0.1) if norm is not None else None
        )

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, in_features] -> [B, copies * out_features]."""
        hidden = self.dropout(self.linear(x, groups))
        if self.norm is None:
            return torch.relu(hidden)
        normed: Tensor = self.norm(hidden, groups, relu=True)
        return normed


class Towers(nn.Module):
    """Hidden layers and a scoring layer per domain.

    Args:
        num_domains (int): N.
        in_features (int): width of the input.
        like (Sequence[HiddenLayerInfo]): the backbone's layers that the towers are modelled on; may be none.
    """

    def __init__(self, num_domains: int, in_features: int, like: Sequence[HiddenLayerInfo]) -> None:
        super().__init__()
        widths = [in_features, *(layer.linear.out_features for layer in like)]
        self.hidden = nn.ModuleList(
            DomainHiddenLayer(num_domains, width, layer) for width, layer in zip(widths[:-1], like, strict=True)
        )
        self.output = LinearBank(num_domains, widths[-1], 1)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        for layer in self.hidden:
            x = layer(x, groups)
        logits: Tensor = self.output(x, groups)
        return logits
