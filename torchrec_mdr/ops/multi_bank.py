"""A layer beside which each row has several adapters, one a bank, as :mod:`torchrec_mdr.ops.low_rank` has one.

The two halves of the product are apart here: what weighs the banks' parts stands between. All that is added up over
banks is added in one buffer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchrec_mdr.ops import products
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, autocast_dtype, flat, is_direct
from torchrec_mdr.ops.low_rank import LinearWeights


def down_project(
    x: Tensor,
    base: Tensor | LinearWeights,
    query: Tensor | None,
    downs: Sequence[Tensor],
    groups: Sequence[DomainGroups],
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output h0, queries ``W_Q h0``, and each bank's ``z_i = [down[d_i] x_i, 1]``.

    Args:
        x (Tensor): [B, in_features].
        base (Tensor | LinearWeights): h0 [B, out_features], or the layer that gives it.
        query (Tensor | None): [q, out_features], W_Q; no queries where left out.
        downs (Sequence[Tensor]): [N, r, in_features] of each of V banks, N its own and r that of all.
        groups (Sequence[DomainGroups]): the rows' adapters in each bank.

    Returns:
        tuple: h0 [B, out_features]; queries [B, q], or an empty tensor; z [B, V, r + 1].
    """
    output, weight, bias = (None, *base) if isinstance(base, LinearWeights) else (base, None, None)
    dtype = autocast_dtype(x)
    x, downs = x.to(dtype), [down.to(dtype) for down in downs]
    output, weight, bias, query = (
        None if tensor is None else tensor.to(dtype) for tensor in (output, weight, bias, query)
    )
    if is_direct(x):
        output, queries, inner = _DownProject.apply(x, output, weight, bias, query, tuple(groups), *downs)
        return output, queries, inner
    if output is None:
        assert weight is not None, "either the layer or what it gave"
        output = F.linear(x, weight, bias)
    queries = output.new_empty(0) if query is None else F.linear(output, query)
    ones = x.new_ones(x.shape[0], 1)
    parts = (OPS.down(x, down, *flat(own)) for down, own in zip(downs, groups, strict=True))
    return output, queries, torch.stack([torch.cat([z, ones], 1) for z in parts], 1)


def up_project(base: Tensor, inner: Tensor, ups: Sequence[Tensor], groups: Sequence[DomainGroups]) -> Tensor:
    """``y_i = base_i + the sum over banks of up[d_i]^T z_i``.

    Args:
        base (Tensor): [B, out_features].
        inner (Tensor): z [B, V, r + 1].
        ups (Sequence[Tensor]): [N, r + 1, out_features] of each bank.
        groups (Sequence[DomainGroups]): the rows' adapters in each bank.

    Returns:
        Tensor: [B, out_features].
    """
    dtype = inner.dtype
    y, ups = base.to(dtype), [up.to(dtype) for up in ups]
    if is_direct(inner):
        y = _UpProject.apply(y, inner, tuple(groups), *ups)
        return y
    for place, (up, own) in enumerate(zip(ups, groups, strict=True)):
        y = OPS.up(inner[:, place], up, y, None, *flat(own))
    return y


class _DownProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        query: Tensor | None,
        groups: tuple[DomainGroups, ...],
        *downs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight is not None:
            h0 = F.linear(x, weight, bias)
        else:
            assert base is not None, "either the layer or what it gave"
            h0 = base.view_as(base)
        inner = x.new_ones(x.shape[0], len(downs), downs[0].shape[1] + 1)
        for z, down, own in zip(inner.unbind(1), downs, groups, strict=True):
            products.down(x, down, own, out=z[:, :-1])
        ctx.save_for_backward(x, weight, query, h0 if query is not None else None, *downs)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        of_layer, of_inner = any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[0] or any(ctx.needs_input_grad[6:])
        # or what lies between would compute gradients that nobody takes
        ctx.mark_non_differentiable(*([] if of_layer else [h0]), *([] if of_inner else [inner]))
        queries = h0.new_empty(0)
        if query is not None:  # an adapter like the others, of all rows
            queries = products.down(h0, query.unsqueeze(0), DomainGroups.of_one(h0.shape[0], h0.device))
        return h0, queries, inner

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_queries: Tensor | None, grad_inner: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, query, h0, *downs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_query = None
        if grad_queries is not None and query is not None:
            all_rows = DomainGroups.of_one(x.shape[0], x.device)
            if wanted[4]:
                grad_query = products.outer(grad_queries, h0, all_rows)[0]
            if any(wanted[:4]):
                grad = products.up(grad_queries, query.unsqueeze(0), all_rows, start=grad)
        if grad is not None and weight is not None:
            grad_weight = grad.mT @ x if wanted[2] else None
            grad_bias = grad.sum(0) if wanted[3] else None
            grad_x = grad @ weight if wanted[0] else None
        grad_downs: list[Tensor | None] = [None] * len(downs)
        if grad_inner is not None:
            for place, grad_z in enumerate(grad_inner[:, :, :-1].unbind(1)):
                down, groups = downs[place], ctx.groups[place]
                if wanted[6 + place]:
                    grad_downs[place] = products.outer(grad_z, x, groups)
                if wanted[0]:
                    grad_x = products.up(grad_z, down, groups, start=grad_x, out=grad_x)
        return grad_x, grad if wanted[1] else None, grad_weight, grad_bias, grad_query, None, *grad_downs


class _UpProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, inner: Tensor, groups: tuple[DomainGroups, ...], *ups: Tensor) -> Tensor:
        ctx.save_for_backward(inner, *ups)
        ctx.groups = groups
        y: Tensor | None = None
        for z, up, own in zip(inner.unbind(1), ups, groups, strict=True):
            y = products.up(z, up, own, start=base if y is None else y, out=y)
        assert y is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        inner, *ups = ctx.saved_tensors
        grad_inner = torch.empty_like(inner) if wanted[1] else None
        grad_ups: list[Tensor | None] = [None] * len(ups)
        for place, (z, up, own) in enumerate(zip(inner.unbind(1), ups, ctx.groups, strict=True)):
            if grad_inner is not None:
                products.down(grad, up, own, out=grad_inner[:, place])
            if wanted[3 + place]:
                grad_ups[place] = products.outer(z, grad, own)
        return grad if wanted[0] else None, grad_inner, None, *grad_ups
