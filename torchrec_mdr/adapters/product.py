"""The grouped low-rank product, the one primitive behind every adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchrec_mdr.adapters.groups import DomainGroups

_ALIGNMENT_BYTES = 16  # of every stride that grouped_mm reads
KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def kernel_serves(x: Tensor) -> bool:
    """Whether grouped_mm takes this tensor's type on its device."""
    return x.dtype in KERNEL_DTYPES.get(x.device.type, ())


def grouped_low_rank(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor, groups: DomainGroups, base: Tensor | None = None
) -> Tensor:
    """``y_i = base_i + up[d_i] down[d_i] x_i + bias[d_i]`` for rows i with adapters d_i.

    Each group of rows is multiplied by its own two matrices in one kernel over all groups; there is no loop over
    adapters and no copy of weights per row. Where the kernel does not serve the type (float64, and float32 on CUDA) a
    dense product over all adapters takes its place.

    Args:
        x (Tensor): [B, in_features].
        down (Tensor): [N, r, in_features].
        up (Tensor): [N, out_features, r].
        bias (Tensor): [N, out_features].
        groups (DomainGroups): the adapter of each row, N = groups.num_adapters.
        base (Tensor | None): [B, out_features], what the product is added to; zero where left out.

    Returns:
        Tensor: [B, out_features], rows in x's order.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
        >>> x, down, up = torch.eye(2), torch.ones(2, 1, 2), torch.tensor([[[1.0]], [[5.0]]])
        >>> grouped_low_rank(x, down, up, torch.zeros(2, 1), groups).tolist()
        [[5.0], [1.0]]
    """
    if groups.adapter_ids is not None:  # the tiny weights follow the groups, so that no activation has to move
        down, up, bias = (weight.index_select(0, groups.adapter_ids) for weight in (down, up, bias))
    down, up, bias = (weight.to(x.dtype) for weight in (down, up, bias))
    if kernel_serves(x):
        y: Tensor = _GroupedLowRank.apply(x, down, up, bias, base, groups)
        return y
    y = groups.ungroup(_dense_low_rank(groups.group(x), down, up, bias, groups.offsets))
    return y if base is None else y + base


class _GroupedLowRank(torch.autograd.Function):
    """The whole product as one node; the bias rides in the second matrix, against a column of ones beside ``down x``.

    Letters: G groups, R the rank and W the rank + 1, both rounded up to the kernel's alignment.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias: Tensor, base: Tensor | None, groups: DomainGroups
    ) -> Tensor:
        rank, out_features = down.shape[1], up.shape[1]
        x_grouped = align(groups.group(x))
        down = align(align(down), -2)  # [G, R, in]
        up_bias = align(align(torch.cat([up, bias.unsqueeze(2)], 2)), -2)  # [G, out, W]
        z = F.pad(_mm(x_grouped, down.mT, groups)[:, :rank], (0, up_bias.shape[2] - rank))  # [B, W]
        z[:, rank] = 1.0
        y = groups.ungroup(_mm(z, up_bias.mT, groups).narrow(1, 0, out_features))
        ctx.save_for_backward(x_grouped, down, up_bias, z)
        ctx.groups, ctx.sizes = groups, (x.shape[1], rank, out_features)
        return y.contiguous() if base is None else torch.add(y, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up_bias, z = ctx.saved_tensors
        groups, (in_features, rank, out_features) = ctx.groups, ctx.sizes
        grad_y = align(groups.group(grad))
        grad_x = grad_down = grad_up = grad_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_z = _mm(grad_y, up_bias, groups)[:, : down.shape[1]]  # [B, R]
        if ctx.needs_input_grad[0]:
            grad_x = groups.ungroup(_mm(grad_z, down, groups)[:, :in_features])
        if ctx.needs_input_grad[1]:
            grad_down = _mm(grad_z.mT, x, groups)[:, :rank, :in_features]
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_up_bias = _mm(grad_y.mT, z, groups)[:, :out_features]  # [G, out, W]
            grad_up, grad_bias = grad_up_bias[:, :, :rank], grad_up_bias[:, :, rank]
        return grad_x, grad_down, grad_up, grad_bias, grad if ctx.needs_input_grad[4] else None, None


def _mm(left: Tensor, right: Tensor, groups: DomainGroups) -> Tensor:
    """[B, K] x [G, K, M] -> [B, M], or, where both are flat, [K, B] x [B, M] -> [G, K, M]."""
    return F.grouped_mm(left, right, offs=groups.offsets)


def align(tensor: Tensor, dim: int = -1) -> Tensor:
    """Zero-pads the last dimension, or the one before, to the kernel's alignment; contiguous."""
    step = _ALIGNMENT_BYTES // tensor.element_size()
    missing = -tensor.shape[dim] % step
    if missing == 0:
        return tensor.contiguous()
    return F.pad(tensor, (0, missing) if dim == -1 else (0, 0, 0, missing))


def _dense_low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """The same for rows in grouped order, with every row going through all groups and all but its own masked out."""
    rows = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(offsets, rows, right=True)
    own = x.new_zeros(x.shape[0], down.shape[0]).scatter_(1, group.unsqueeze(1), 1.0)
    z = torch.einsum("bi,gri->bgr", x, down) * own.unsqueeze(2)
    return torch.einsum("bgr,gor->bo", z, up) + bias.index_select(0, group)
