"""What a normalisation by domain is computed with: sums of rows by domain, and affine maps of rows by domain."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_mdr.ops import cpu_kernels as compiled
from torchrec_mdr.ops import triton
from torchrec_mdr.ops.collectives import sum_over_ranks
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.products import count_rows, of_adapters, sum_rows


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    training: bool,
    relu: bool,
    groups: DomainGroups,
) -> tuple[Tensor, ...]:
    """:func:`torchrec_mdr.ops.norms.normalise_by_domain`, with what its backward pass needs.

    Returns:
        tuple: y [B, F]; centre, scale, reciprocal deviation and offset of the mean, [N, F] each; and what share a row
        has in its domain's statistics [N, 1], empty where the running ones rule.
    """
    offset, var, share = torch.zeros_like(running_mean), running_var, x.new_empty(0)
    centre = running_mean.clone()  # sums of rows less it are sums of small numbers
    if training:
        offset, var, share = batch_statistics(x, groups, running_mean, running_var, momentum)
    rstd = torch.rsqrt(var + eps)
    scale = weight * rstd
    y = affine_by_domain(None, x, torch.stack([scale, scale, centre, bias - offset * scale], 1), groups, relu=relu)
    return y, centre, scale, rstd, offset, share


def normalise_backward(
    grad: Tensor,
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    rstd: Tensor,
    offset: Tensor,
    share: Tensor,
    gate: Tensor | None,
    wants_x: bool,
    groups: DomainGroups,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x [B, F], where it is wanted, weight and bias [N, F]; gate is y where a ReLU follows."""
    grad_bias, grad_weight = centered_sums(grad, x, centre, groups, gate).unbind(1)
    grad_weight = torch.addcmul(grad_weight, offset, grad_bias, value=-1.0).mul_(rstd)
    if not wants_x:
        return None, grad_weight, grad_bias
    slope = constant = torch.zeros_like(scale)
    moves = share.numel() > 0  # rows move the statistics that all rows of their domain are normalised by
    if moves:
        total_bias, total_weight = sum_over_ranks(torch.stack([grad_bias, grad_weight])).unbind()
        slope = -scale * rstd * total_weight * share
        constant = -slope * offset - scale * total_bias * share
    table = torch.stack([scale, slope, centre, constant], 1)
    return affine_by_domain(grad, x if moves else None, table, groups, gate), grad_weight, grad_bias


def frozen_backward(grad: Tensor, scale: Tensor, gate: Tensor | None, groups: DomainGroups) -> Tensor:
    """The gradient of x where neither statistics nor affine parameters move."""
    zero = torch.zeros_like(scale)
    return affine_by_domain(grad, None, torch.stack([scale, zero, zero, zero], 1), groups, gate)


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
    if triton.is_supported(v):
        from torchrec_mdr.ops.triton import norms as triton_norms

        return triton_norms.centered_sums(u, v, centre, groups, gate)
    right = v - _own(centre, groups)
    left = right if u is None else _gated(u, gate)
    if groups.may_miss:
        left, groups = torch.where((groups.ids >= 0).unsqueeze(1), left, 0.0), groups.with_all_rows()
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
        Tensor: [B, F]; zero for rows without a domain.
    """
    if compiled.is_supported(table):
        return compiled.affine_by_domain(u, v, table, groups, gate, relu)
    if triton.is_supported(table):
        from torchrec_mdr.ops.triton import norms as triton_norms

        return triton_norms.affine_by_domain(u, v, table, groups, gate, relu)
    a, b, c, e = (_own(part, groups) for part in table.unbind(1))
    y = e if v is None else e + (v - c) * b
    y = y if u is None else y + _gated(u, gate) * a
    y = torch.where((groups.ids >= 0).unsqueeze(1), y, 0.0) if groups.may_miss else y
    return torch.relu_(y) if relu else y


def _own(table: Tensor, groups: DomainGroups) -> Tensor:
    """Each row's domain's row [B, F], or the one that there is [1, F]."""
    if table.shape[0] == 1:
        return table
    return table.index_select(0, groups.ids.clamp(min=0) if groups.may_miss else groups.ids)


def _gated(gradient: Tensor, result: Tensor | None) -> Tensor:
    """The gradient by what a ReLU was given."""
    return gradient if result is None else torch.ops.aten.threshold_backward(gradient, result, 0)


def batch_statistics(
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
