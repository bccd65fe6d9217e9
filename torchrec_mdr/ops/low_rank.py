"""The grouped low-rank product, the one primitive behind every adapter."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from torchrec_mdr.ops import products as kernels
from torchrec_mdr.ops.groups import DomainGroups


class GradientFactors(NamedTuple):
    """A table's gradient before it is computed: ``kernels.outer(*factors)``, of groups that are the adapters.

    Where a thousand adapters move in every step, writing and reading their gradients would be a good part of it. An
    optimizer that can do without asks for the factors, see :class:`FactorList`.
    """

    z: Tensor
    x: Tensor
    groups: DomainGroups


class FactorList(list[GradientFactors]):
    """Where a backward pass leaves the factors of one table's gradient, as long as somebody holds the list."""

    @staticmethod
    def of(table: Tensor) -> FactorList | None:
        """The list that was asked for; None where there is none any more."""
        reference = _asked_for.get(table)
        return None if reference is None else reference()

    def ask_for(self, table: Tensor) -> None:
        """Has backward passes leave a table's factors here, and no gradient."""
        _asked_for[table] = weakref.ref(self)


_asked_for: MutableMapping[Tensor, weakref.ref[FactorList]] = WeakTensorKeyDictionary()


def grouped_low_rank(x: Tensor, down: Tensor, up: Tensor, groups: DomainGroups, base: Tensor | None = None) -> Tensor:
    """``y_i = base_i + up[d_i]^T [down[d_i] x_i, 1]`` for rows i with adapters d_i.

    No loop over adapters and no copy of weights per row; :mod:`torchrec_mdr.ops.products` says what computes it.

    Args:
        x (Tensor): [B, in_features].
        down (Tensor): [N, r, in_features].
        up (Tensor): [N, r + 1, out_features], each adapter's bias in its last row.
        groups (DomainGroups): the adapter of each row, N = groups.num_adapters.
        base (Tensor | None): [B, out_features], what the product is added to; zero where left out.

    Returns:
        Tensor: [B, out_features], rows in x's order.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
        >>> x, down, up = torch.eye(2), torch.ones(2, 1, 2), torch.tensor([[[1.0], [0.0]], [[5.0], [0.5]]])
        >>> grouped_low_rank(x, down, up, groups).tolist()
        [[5.5], [1.0]]
    """
    y: Tensor = _GroupedLowRank.apply(x, down.to(x.dtype), up.to(x.dtype), base, None, None, groups)
    return y


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, groups: DomainGroups
) -> Tensor:
    """:func:`grouped_low_rank` and a linear layer, both products in one buffer, forward and backward.

    Equals ``grouped_low_rank(x, down, up, groups, F.linear(x, weight, bias))``, bitwise so where up is zero.

    Args:
        x (Tensor): [B, in_features].
        weight (Tensor): [out_features, in_features], of the layer, of x's type.
        bias (Tensor | None): [out_features], of the layer.
        down (Tensor): [N, r, in_features].
        up (Tensor): [N, r + 1, out_features].
        groups (DomainGroups): the adapter of each row.

    Returns:
        Tensor: [B, out_features], rows in x's order.
    """
    y: Tensor = _GroupedLowRank.apply(x, down.to(x.dtype), up.to(x.dtype), None, weight, bias, groups)
    return y


class _GroupedLowRank(torch.autograd.Function):
    """The whole product as one node, on top of a base [B, out] or of a layer with weight [out, in] and bias [out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: DomainGroups,
    ) -> Tensor:
        z = x.new_ones(x.shape[0], down.shape[1] + 1)  # what a bias is multiplied by is one
        kernels.down(x, down, groups, out=z[:, :-1])
        ctx.save_for_backward(x, down, up, z, weight)
        ctx.groups = groups
        y = kernels.up(z, up, groups, bias if base is None else base)
        return y if weight is None else y.addmm_(x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, z, weight = ctx.saved_tensors
        groups, wanted = ctx.groups, ctx.needs_input_grad
        grad_x = grad_down = grad_up = grad_weight = grad_bias = None
        if wanted[2]:
            grad_up = table_gradient(up, z, grad, groups)
        if wanted[0] or wanted[1]:
            grad_z = kernels.down(grad, up[:, :-1], groups)  # what reads the same rows comes in a row
        if wanted[1]:
            grad_down = table_gradient(down, grad_z, x, groups)
        if wanted[0]:
            grad_x = kernels.up(grad_z, down, groups)
            if weight is not None:
                grad_x.addmm_(grad, weight)
        if wanted[4]:
            grad_weight = grad.mT @ x
        if wanted[5]:
            grad_bias = grad.sum(0)
        return grad_x, grad_down, grad_up, grad if wanted[3] else None, grad_weight, grad_bias, None


def table_gradient(table: Tensor, z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor | None:
    """A table's gradient, :func:`kernels.outer`; None where its optimizer takes the factors, which they are left to."""
    factors = FactorList.of(table)
    if factors is None or groups.adapter_ids is not None:
        return kernels.outer(z, x, groups)
    factors.append(GradientFactors(z, x, groups))
    return None
