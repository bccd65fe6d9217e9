"""Full-size layers per domain: the grouped linear product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, is_direct
from torchrec_mdr.ops.products import align, grouped_mm_supports, matmul, matmul_outer
from torchrec_mdr.ops.tiles import Tiles


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: DomainGroups) -> Tensor:
    """``y_i = weight[d_i] x_i + bias[d_i]`` for rows i with adapters d_i: a full-size linear layer per domain.

    Each group of rows is multiplied by its own matrix in one kernel over all groups: the cost is that of one linear
    layer over the batch, whatever the number of domains. Where the kernel does not serve the type (float64, and float32
    on CUDA) the rows are cut into tiles of one domain each, and the tiles multiplied as a batch.

    Args:
        x (Tensor): [B, ..., in_features]; a row's domain is that of its first index.
        weight (Tensor): [N, out_features, in_features].
        bias (Tensor | None): [N, out_features].
        groups (DomainGroups): the adapter of each row, N = groups.num_adapters.

    Returns:
        Tensor: [B, ..., out_features], rows in x's order.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
        >>> weight = torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]])
        >>> grouped_linear(torch.eye(2), weight, torch.tensor([[0.0], [0.5]]), groups).tolist()
        [[5.5], [1.0]]
    """
    if groups.adapter_ids is not None:  # the weights follow the groups, so that no activation has to move
        weight = weight.index_select(0, groups.adapter_ids)
    inner = x.shape[1:-1]
    rows, offsets = groups.group(x).flatten(0, -2), groups.offsets * inner.numel()
    weight = weight.to(x.dtype)
    if grouped_mm_supports(x) and x.shape[-1]:
        y: Tensor = (_GroupedLinear.apply if is_direct(x) else OPS.matmul)(rows, weight, offsets)
    else:
        tiles = Tiles.of(offsets, rows.shape[0])
        y = tiles.collect(torch.bmm(tiles.spread(rows), weight.index_select(0, tiles.groups).mT))
    y = groups.ungroup(y.view(x.shape[0], *inner, weight.shape[1]))
    if bias is None:
        return y
    own = bias.to(x.dtype).index_select(0, groups.ids)
    return y + own.view(own.shape[0], *(1 for _ in inner), own.shape[1])


class _GroupedLinear(torch.autograd.Function):
    """The product of grouped rows [R, in] and matrices [G, out, in], on operands padded to the kernel's alignment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.sizes = weight.shape[1:]
        x, weight = align(x), align(align(weight), -2)  # once, for the backward pass, too
        ctx.save_for_backward(x, weight, offsets)
        return matmul(x, weight, offsets)[:, : ctx.sizes[0]].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        out_features, in_features = ctx.sizes
        grad = align(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad, weight.mT, offsets)[:, :in_features]
        if ctx.needs_input_grad[1]:
            grad_weight = matmul_outer(grad, x, offsets)[:, :out_features, :in_features]
        return grad_x, grad_weight, None
