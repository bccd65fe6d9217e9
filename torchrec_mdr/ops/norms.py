"""Normalisation of rows by the statistics of their own domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_mdr.ops import statistics
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, flat, is_direct


def normalise_by_domain(
    x: Tensor,
    groups: DomainGroups,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    training: bool,
    relu: bool = False,
) -> Tensor:
    """``weight_d (x_i - mean_d) / sqrt(var_d + eps) + bias_d`` for rows i of domains d.

    In training, mean and variance are those of the domain's rows in the global batch, and the running ones move; a
    domain with fewer than two rows keeps to the running ones.

    Args:
        x (Tensor): [B, F].
        groups (DomainGroups): d_i.
        weight (Tensor): [N, F].
        bias (Tensor): [N, F].
        running_mean (Tensor): [N, F], moved in training.
        running_var (Tensor): [N, F], moved in training.
        eps (float): added to variances.
        momentum (float): share of the batch in the running statistics.
        training (bool): whether to go by the batch.
        relu (bool): whether a ReLU follows, which then costs nothing.

    Returns:
        Tensor: [B, F].
    """
    options = eps, momentum, training, relu
    if not isinstance(x, torch.fx.Proxy) and x.dtype != running_mean.dtype:  # as in PyTorch, statistics keep their type
        statistics_of = x.to(running_mean.dtype), groups, weight, bias, running_mean, running_var
        return normalise_by_domain(*statistics_of, *options).to(x.dtype)
    if is_direct(x):
        y: Tensor = _NormaliseByDomain.apply(x, weight, bias, running_mean, running_var, *options, groups)
        return y
    outputs = OPS.normalise(x, weight, bias, running_mean, running_var, *options, *flat(groups))
    if training:
        with torch.no_grad():
            running_mean.copy_(outputs[1])
            running_var.copy_(outputs[2])
    y = outputs[0]
    return y


class _NormaliseByDomain(torch.autograd.Function):
    """:func:`normalise_by_domain` as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y, *kept = statistics.normalise(x, *arguments)
        *_, relu, ctx.groups = arguments
        ctx.save_for_backward(x, *kept, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted, (*kept, gate) = ctx.needs_input_grad, ctx.saved_tensors
        if not any(wanted[1:3]) and not kept[-1].numel():  # frozen
            _, _, scale, *_ = kept
            return statistics.frozen_backward(grad, scale, gate, ctx.groups), *(None,) * 9
        x, centre, scale, rstd, offset, share = kept
        moved = centre, scale, rstd, offset, share
        gradients = statistics.normalise_backward(grad, x, *moved, gate, wanted[0], ctx.groups)
        return *gradients, *(None,) * 7
