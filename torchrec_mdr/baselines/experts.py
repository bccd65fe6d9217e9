"""Hidden layers of several experts that see all rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import AllDomainsModule
from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.adapters.norm import GlobalBatchNorm1d
from torchrec_mdr.baselines.over_arch import HiddenLayerInfo


class ExpertLinear(nn.Module):
    """The linear layers of E experts, stacked, so that all of them are one dense product.

    Args:
        num_experts (int): E.
        in_features (int): width of the input.
        out_features (int): width of each expert's output.
        bias (bool): whether they have one.

    Example::

        >>> layer = ExpertLinear(3, 8, 4)
        >>> layer(torch.rand(5, 8)).shape, layer(torch.rand(5, 3, 8)).shape
        (torch.Size([5, 3, 4]), torch.Size([5, 3, 4]))
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as `nn.Linear` does."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """One input for all experts [B, in_features], or each its own [B, E, in_features] -> [B, E, out_features]."""
        if x.dim() == 2:
            bias = None if self.bias is None else self.bias.flatten()
            return F.linear(x, self.weight.flatten(0, 1), bias).unflatten(1, self.weight.shape[:2])
        y = torch.bmm(x.transpose(0, 1), self.weight.mT).transpose(0, 1)
        return y if self.bias is None else y + self.bias


class ExpertLayer(nn.Module, AllDomainsModule):
    """One hidden layer of each expert: linear, dropout, norm, ReLU, in the backbone's order.

    Args:
        num_experts (int): E.
        in_features (int): width of the input.
        like (HiddenLayerInfo): the backbone's layer, whose width, dropout and norm each expert's has.
        copies (int): such layers an expert has, side by side; their outputs are one after the other.
    """

    def __init__(self, num_experts: int, in_features: int, like: HiddenLayerInfo, copies: int = 1) -> None:
        super().__init__()
        width = copies * like.linear.out_features
        self.linear = ExpertLinear(num_experts, in_features, width)
        self.dropout = FastDropout(like.dropout)
        norm = like.norm
        self.norm = GlobalBatchNorm1d(num_experts * width, norm.eps, norm.momentum) if norm is not None else None

    def row_numbers(self, route: Route) -> int:
        """See :class:`AllDomainsModule`: before the ReLU and behind it."""
        return 2 * self.linear.weight.shape[0] * self.linear.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] or [B, E, in_features] -> [B, E, copies * out_features]."""
        hidden = self.dropout(self.linear(x))
        if self.norm is None:
            return torch.relu(hidden)
        return self.norm(hidden.flatten(1), relu=True).view_as(hidden)


def mix_experts(scores: Tensor, outputs: Tensor) -> Tensor:
    """The experts' outputs weighed by the softmax of a gate's scores.

    Args:
        scores (Tensor): [B, E].
        outputs (Tensor): [B, E, width].

    Returns:
        Tensor: [B, width].
    """
    return torch.bmm(torch.softmax(scores, dim=1).unsqueeze(1), outputs).squeeze(1)
