"""A layer beside which each row has several adapters, one a bank, as :mod:`torchrec_mdr.adapters.product` has one.

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

from torchrec_mdr.adapters import kernels
from torchrec_mdr.adapters.groups import DomainGroups
from torchrec_mdr.adapters.product import with_one


def project_all(
    x: Tensor,
    base: Tensor | None,
    linear: tuple[Tensor, Tensor | None] | None,
    query: Tensor | None,
    downs: Sequence[Tensor],
    groups: Sequence[DomainGroups],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The layer's output h0, queries ``W_Q h0``, and each bank's ``z_i = [down[d_i] x_i, 1]``.

    Args:
        x (Tensor): [B, in_features].
        base (Tensor | None): [B, out_features], h0; given exactly where linear is not.
        linear (tuple[Tensor, Tensor | None] | None): weight [out_features, in_features] and bias of the layer.
        query (Tensor | None): [q, out_features], W_Q; no queries where left out.
        downs (Sequence[Tensor]): [N, r, in_features] of each bank.
        groups (Sequence[DomainGroups]): the rows' adapters in each bank.

    Returns:
        tuple: h0 [B, out_features]; queries [B, q], or an empty tensor; z [B, r + 1] of each bank.
    """
    weight, bias = (None, None) if linear is None else linear
    downs = [down.to(x.dtype) for down in downs]
    query = None if query is None else query.to(x.dtype if base is None else base.dtype)
    base, queries, *inner = _ProjectAll.apply(x, base, weight, bias, query, tuple(groups), *downs)
    return base, queries, inner


def lift_all(
    base: Tensor | None, inner: Sequence[Tensor], ups: Sequence[Tensor], groups: Sequence[DomainGroups]
) -> Tensor:
    """``y_i = base_i + the sum over banks of up[d_i]^T z_i``.

    Args:
        base (Tensor | None): [B, out_features]; zero where left out.
        inner (Sequence[Tensor]): z [B, r + 1] of each bank.
        ups (Sequence[Tensor]): [N, r + 1, out_features] of each bank.
        groups (Sequence[DomainGroups]): the rows' adapters in each bank.

    Returns:
        Tensor: [B, out_features].
    """
    dtype = inner[0].dtype
    base = None if base is None else base.to(dtype)
    y: Tensor = _LiftAll.apply(base, tuple(groups), *inner, *(up.to(dtype) for up in ups))
    return y


class _ProjectAll(torch.autograd.Function):
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
    ) -> tuple[Tensor, ...]:
        if weight is not None:
            h0 = F.linear(x, weight, bias)
        else:
            assert base is not None, "either the layer or what it gave"
            h0 = base.view_as(base)
        ctx.save_for_backward(x, weight, query, h0 if query is not None else None, *downs)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        inner = [with_one(kernels.down(x, down, own)) for down, own in zip(downs, groups, strict=True)]
        wanted = ctx.needs_input_grad
        still = [] if any(wanted[:4]) else [h0]
        still += [z for z, of_down in zip(inner, wanted[6:], strict=True) if not (wanted[0] or of_down)]
        ctx.mark_non_differentiable(*still)  # or what lies between would compute gradients that nobody takes
        return h0, h0.new_empty(0) if query is None else h0 @ query.mT, *inner

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_queries: Tensor | None, *grad_inner: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, query, h0, *downs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_query = None
        if grad_queries is not None and query is not None:
            if wanted[4]:
                grad_query = grad_queries.mT @ h0
            if any(wanted[:4]):
                grad = grad_queries @ query if grad is None else torch.addmm(grad, grad_queries, query)
        if grad is not None and weight is not None:
            grad_weight = grad.mT @ x if wanted[2] else None
            grad_bias = grad.sum(0) if wanted[3] else None
            grad_x = grad @ weight if wanted[0] else None
        grad_downs: list[Tensor | None] = []
        for place, (own, down, groups) in enumerate(zip(grad_inner, downs, ctx.groups, strict=True)):
            grad_z = None if own is None else own[:, :-1]
            grad_downs.append(kernels.outer(grad_z, x, groups) if grad_z is not None and wanted[6 + place] else None)
            if grad_z is None or not wanted[0]:
                continue
            if grad_x is None:
                grad_x = kernels.up(grad_z, down, groups)
            else:
                kernels.add_up(grad_x, grad_z, down, groups)
        return grad_x, grad if wanted[1] else None, grad_weight, grad_bias, grad_query, None, *grad_downs


class _LiftAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor | None, groups: tuple[DomainGroups, ...], *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.groups = groups
        inner, ups = parts[: len(groups)], parts[len(groups) :]
        y = kernels.up(inner[0], ups[0], groups[0], base)
        for z, up, own in zip(inner[1:], ups[1:], groups[1:], strict=True):
            kernels.add_up(y, z, up, own)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, wanted = ctx.groups, ctx.needs_input_grad[2:]
        count = len(groups)
        inner, ups = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grads: list[Tensor | None] = [None] * (2 * count)
        for place, own in enumerate(groups):
            if wanted[place]:
                grads[place] = kernels.down(grad, ups[place], own)
            if wanted[count + place]:
                grads[count + place] = kernels.outer(inner[place], grad, own)
        return grad if ctx.needs_input_grad[0] else None, None, *grads
