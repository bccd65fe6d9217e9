"""Sums over ranks, and normalisation of rows by the statistics of their own domain."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_mdr.adapters.groups import DomainGroups
from torchrec_mdr.adapters.kernels import count_rows, sum_rows


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, differentiable; the values themselves without a process group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total: Tensor = _SumOverRanks.apply(values)
        return total
    return values


class _NormaliseByDomain(torch.autograd.Function):
    """:func:`normalise_by_domain` as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: DomainGroups,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
        training: bool,
    ) -> Tensor:
        ids = groups.ids
        offset, var, share = running_mean, running_var, None
        if training:
            x = x - running_mean.index_select(0, ids)  # sums of it are sums of small numbers
            offset, var, share = _batch_statistics(x, groups, running_mean, running_var, momentum)
        rstd = torch.rsqrt(var + eps)
        scale = weight * rstd
        ctx.save_for_backward(x, scale, rstd, offset, share)
        ctx.groups = groups
        shift = bias - offset * scale
        return shift.index_select(0, ids).addcmul_(x, scale.index_select(0, ids))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale, rstd, offset, share), groups = ctx.saved_tensors, ctx.groups
        ids = groups.ids
        grad_bias, grad_weight = sum_rows(grad, groups), sum_rows(grad * x, groups)
        grad_weight.addcmul_(offset, grad_bias, value=-1.0).mul_(rstd)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * scale.index_select(0, ids)
            if share is not None:  # rows move the statistics that all rows of their domain are normalised by
                total_bias, total_weight = sum_over_ranks(torch.stack([grad_bias, grad_weight])).unbind()
                slope = scale * rstd * total_weight * share
                constant = slope * offset - scale * total_bias * share
                grad_x.add_(constant.index_select(0, ids)).addcmul_(slope.index_select(0, ids), x, value=-1.0)
        return grad_x, None, grad_weight, grad_bias, *(None,) * 5


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

    Returns:
        Tensor: [B, F].
    """
    y: Tensor = _NormaliseByDomain.apply(x, groups, weight, bias, running_mean, running_var, eps, momentum, training)
    return y


def _batch_statistics(
    x: Tensor, groups: DomainGroups, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance per domain [N, F] of rows less the running mean, and what share a row has in them [N, 1].

    Moves the running statistics, but those of a domain with fewer than two rows: these rule there, and rows have no
    share in them.
    """
    sums = [count_rows(groups).to(x.dtype).unsqueeze(1), sum_rows(x, groups), sum_rows(x * x, groups)]
    count, first, second = sum_over_ranks(torch.cat(sums, 1)).split([1, x.shape[1], x.shape[1]], 1)
    enough = count > 1.5
    count = count.clamp(min=1.0)
    share = enough / count
    offset = first * share
    var = torch.where(enough, (second / count - offset * offset).clamp(min=0.0), running_var)
    unbiased = var * (count / (count - 1.0).clamp(min=1.0))
    moved = momentum * enough
    running_mean.add_(moved * offset)
    running_var.add_(moved * (unbiased - running_var))
    return offset, var, share
