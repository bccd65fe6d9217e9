"""Sums over ranks, and normalisation of rows by the statistics of their own domain."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_mdr.ops import cpu_kernels as compiled
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.products import count_rows, of_adapters, sum_rows


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
        relu: bool,
    ) -> Tensor:
        offset, var, share = torch.zeros_like(running_mean), running_var, None
        centre = running_mean.clone()  # sums of rows less it are sums of small numbers
        if training:
            offset, var, share = _batch_statistics(x, groups, running_mean, running_var, momentum)
        rstd = torch.rsqrt(var + eps)
        scale = weight * rstd
        y = affine_by_domain(None, x, torch.stack([scale, scale, centre, bias - offset * scale], 1), groups, relu=relu)
        ctx.save_for_backward(x, centre, scale, rstd, offset, share, y if relu else None)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, centre, scale, rstd, offset, share, gate), groups = ctx.saved_tensors, ctx.groups
        if share is None and not any(ctx.needs_input_grad[2:4]):  # frozen
            zero = torch.zeros_like(scale)
            return affine_by_domain(grad, None, torch.stack([scale, zero, zero, zero], 1), groups, gate), *(None,) * 9
        grad_bias, grad_weight = centered_sums(grad, x, centre, groups, gate).unbind(1)
        grad_weight = torch.addcmul(grad_weight, offset, grad_bias, value=-1.0).mul_(rstd)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            slope = constant = torch.zeros_like(scale)
            if share is not None:  # rows move the statistics that all rows of their domain are normalised by
                total_bias, total_weight = sum_over_ranks(torch.stack([grad_bias, grad_weight])).unbind()
                slope = -scale * rstd * total_weight * share
                constant = -slope * offset - scale * total_bias * share
            moving = None if share is None else x
            grad_x = affine_by_domain(grad, moving, torch.stack([scale, slope, centre, constant], 1), groups, gate)
        return grad_x, None, grad_weight, grad_bias, *(None,) * 6


def centered_sums(
    u: Tensor | None, v: Tensor, centre: Tensor, groups: DomainGroups, gate: Tensor | None = None
) -> Tensor:
    """``sum u_i`` and ``sum u_i (v_i - centre_d)`` over the rows i of each domain d, by column.

    Args:
        u (Tensor | None): [B, F]; ``v - centre`` where left out.
        v (Tensor): [B, F].
        centre (Tensor): [N, F].
        groups (DomainGroups): the domain of each row.
        gate (Tensor | None): [B, F], what a ReLU gave; u is its gradient then, and counts where the ReLU has a slope.

    Returns:
        Tensor: [N, 2, F].
    """
    if compiled.is_supported(v):
        return of_adapters(compiled.centered_sums(u, v, centre, groups, gate), groups)
    right = v - _own(centre, groups)
    left = right if u is None else _gated(u, gate)
    return torch.stack([sum_rows(left, groups), sum_rows(left * right, groups)], 1)


def affine_by_domain(
    u: Tensor | None,
    v: Tensor | None,
    table: Tensor,
    groups: DomainGroups,
    gate: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``a_d u_i + b_d (v_i - c_d) + e_d`` for rows i of domains d, by column.

    Args:
        u (Tensor | None): [B, F]; no such term where left out.
        v (Tensor | None): [B, F]; no such term where left out.
        table (Tensor): [N, 4, F], each domain's a, b, c and e.
        groups (DomainGroups): d_i.
        gate (Tensor | None): [B, F], of u, as in :func:`centered_sums`.
        relu (bool): without u: whether a ReLU follows.

    Returns:
        Tensor: [B, F].
    """
    if compiled.is_supported(table):
        return compiled.affine_by_domain(u, v, table, groups, gate, relu)
    a, b, c, e = (_own(part, groups) for part in table.unbind(1))
    y = e if v is None else e + (v - c) * b
    y = y if u is None else y + _gated(u, gate) * a
    return torch.relu_(y) if relu else y


def _own(table: Tensor, groups: DomainGroups) -> Tensor:
    """Each row's domain's row [B, F], or the one that there is [1, F]."""
    return table if table.shape[0] == 1 else table.index_select(0, groups.ids)


def _gated(gradient: Tensor, result: Tensor | None) -> Tensor:
    """The gradient by what a ReLU was given."""
    return gradient if result is None else torch.ops.aten.threshold_backward(gradient, result, 0)


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
    statistics = running_mean, running_var, eps, momentum, training
    y: Tensor = _NormaliseByDomain.apply(x, groups, weight, bias, *statistics, relu)
    return y


def _batch_statistics(
    x: Tensor, groups: DomainGroups, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of rows less the running mean, variance, both [N, F], and what share a row has in them [N, 1].

    Moves the running statistics, but those of a domain with fewer than two rows: these rule there, and rows have no
    share in them.
    """
    sums = centered_sums(None, x, running_mean, groups).flatten(1)
    sums = sum_over_ranks(torch.cat([count_rows(groups).to(x.dtype).unsqueeze(1), sums], 1))
    count, first, second = sums.split([1, x.shape[1], x.shape[1]], 1)
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
