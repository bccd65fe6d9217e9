"""Sums over ranks, and normalisation of rows by the statistics of their own domain."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        ids: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
        training: bool,
    ) -> Tensor:
        shifted = x - running_mean.index_select(0, ids)  # sums of it are sums of small numbers
        offset, var, share = torch.zeros_like(running_mean), running_var, None
        if training:
            offset, var, share = _batch_statistics(shifted, ids, running_mean, running_var, momentum)
        rstd = torch.rsqrt(var + eps)
        scale = weight * rstd
        ctx.save_for_backward(shifted, ids, scale, rstd, offset, share)
        shift = bias - offset * scale
        return torch.addcmul(shift.index_select(0, ids), shifted, scale.index_select(0, ids))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shifted, ids, scale, rstd, offset, share = ctx.saved_tensors
        grad_bias = torch.zeros_like(scale).index_add_(0, ids, grad)
        grad_weight = torch.zeros_like(scale).index_add_(0, ids, grad * shifted)
        grad_weight.addcmul_(offset, grad_bias, value=-1.0).mul_(rstd)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * scale.index_select(0, ids)
            if share is not None:  # rows move the statistics that all rows of their domain are normalised by
                total_bias, total_weight = sum_over_ranks(torch.stack([grad_bias, grad_weight])).unbind()
                slope = scale * rstd * total_weight * share
                constant = slope * offset - scale * total_bias * share
                grad_x.add_(constant.index_select(0, ids)).addcmul_(slope.index_select(0, ids), shifted, value=-1.0)
        return grad_x, None, grad_weight, grad_bias, *(None,) * 5


def normalise_by_domain(
    x: Tensor,
    ids: Tensor,
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
        ids (Tensor): int64 [B], d_i.
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
    y: Tensor = _NormaliseByDomain.apply(x, ids, weight, bias, running_mean, running_var, eps, momentum, training)
    return y


def _batch_statistics(
    shifted: Tensor, ids: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (from the running one on) and variance per domain [N, F], and a row's share in them [N, 1]; moves the rest.

    A domain with fewer than two rows has the running statistics, which its rows have no share in.
    """
    num_domains, width = running_mean.shape
    sums = shifted.new_zeros(num_domains, 2 * width + 1)
    count, first, second = sums.split([1, width, width], 1)
    count.index_add_(0, ids, shifted.new_ones(ids.numel(), 1))
    first.index_add_(0, ids, shifted)
    second.index_add_(0, ids, shifted * shifted)
    count, first, second = sum_over_ranks(sums).split([1, width, width], 1)
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
