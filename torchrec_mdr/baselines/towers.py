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
    """One hidden layer of which every domain has its own: linear, dropout, norm, ReLU, in the backbones' order.

    Args:
        linear (nn.Module): linear(x, groups) -> [B, out_features], each row by its own domain's.
        dropout (float): share of its output that is dropped in training.
        norm (nn.Module | None): norm(x, groups, relu) -> [B, out_features], likewise.
    """

    def __init__(self, linear: nn.Module, dropout: float, norm: nn.Module | None) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = FastDropout(dropout)
        self.norm = norm

    @staticmethod
    def like(num_domains: int, in_features: int, info: HiddenLayerInfo, copies: int = 1) -> DomainHiddenLayer:
        """A layer of its own for every domain, modelled on one of the backbone's.

        Args:
            num_domains (int): N.
            in_features (int): width of the input.
            info (HiddenLayerInfo): the backbone's layer, whose width, dropout and norm the domains' have.
            copies (int): such layers a domain has, side by side; their outputs are one after the other.
        """
        width = copies * info.linear.out_features
        linear, norm = LinearBank(num_domains, in_features, width), info.norm
        bank = None if norm is None else BackboneNormBank(num_domains, width, 0, norm.eps, norm.momentum or 0.1)
        return DomainHiddenLayer(linear, info.dropout, bank)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
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
            DomainHiddenLayer.like(num_domains, width, layer) for width, layer in zip(widths[:-1], like, strict=True)
        )
        self.output = LinearBank(num_domains, widths[-1], 1)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        for layer in self.hidden:
            x = layer(x, groups)
        logits: Tensor = self.output(x, groups)
        return logits
