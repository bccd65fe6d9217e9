"""The grouped low-rank product, the one primitive behind every adapter."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from torchrec_mdr.ops import products
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, autocast_dtype, flat, is_direct


class GradientFactors(NamedTuple):
    """A table's gradient before it is computed: ``products.outer(*factors)``, of groups that are the adapters.

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
        """Has backward passes leave a table's factors here, and no gradient.

        Those of a ``lora_B`` hold its bias's, too: z has a last column of ones.
        """
        _asked_for[table] = weakref.ref(self)


_asked_for: MutableMapping[Tensor, weakref.ref[FactorList]] = WeakTensorKeyDictionary()


class LinearWeights(NamedTuple):
    """A linear layer that adapters stand beside: weight [out_features, in_features] and bias [out_features]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        return F.linear(x, self.weight, self.bias)


Base = Tensor | LinearWeights | None  # what adapters add to: a layer's output, the layer itself, or nothing


def grouped_low_rank(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, groups: DomainGroups, base: Base = None
) -> Tensor:
    """``y_i = base_i + lora_B[d_i] lora_A[d_i] x_i + bias[d_i]`` for rows i with adapters d_i.

    No loop over adapters and no copy of weights per row; :mod:`torchrec_mdr.ops.products` says what computes it. Where
    base is a linear layer, its product and the adapters' share one buffer, forward and backward; the result equals that
    with the layer's output as base, bitwise so where lora_B and bias are zero. Under autocast everything has the type
    that autocast gives a plain layer.

    Args:
        x (Tensor): [B, in_features].
        lora_A (Tensor): [N, r, in_features].
        lora_B (Tensor): [N, out_features, r]; read fastest where its transpose is contiguous.
        bias (Tensor): [N, out_features].
        groups (DomainGroups): the adapter of each row, N = groups.num_adapters.
        base (Tensor | LinearWeights | None): [B, out_features], or a layer of x's type; zero where left out.

    Returns:
        Tensor: [B, out_features], rows in x's order.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
        >>> lora_B, bias = torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[0.0], [0.5]])
        >>> grouped_low_rank(torch.eye(2), torch.ones(2, 1, 2), lora_B, bias, groups).tolist()
        [[5.5], [1.0]]
    """
    added, weight, own_bias = (None, *base) if isinstance(base, LinearWeights) else (base, None, None)
    dtype = autocast_dtype(x)
    x, *tables = (tensor.to(dtype) for tensor in (x, lora_A, lora_B, bias))
    added, weight, own_bias = (None if tensor is None else tensor.to(dtype) for tensor in (added, weight, own_bias))
    if is_direct(x):
        y: Tensor = _GroupedLowRank.apply(x, *tables, added, weight, own_bias, groups)
    else:
        y, _ = OPS.low_rank(x, *tables, added, weight, own_bias, *flat(groups))
    return y


class _GroupedLowRank(torch.autograd.Function):
    """The whole product as one node, on top of a base [B, out] or of a layer with weight [out, in] and bias [out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        linear_bias: Tensor | None,
        groups: DomainGroups,
    ) -> Tensor:
        y, z = products.low_rank(x, lora_A, lora_B, bias, base, weight, linear_bias, groups)
        ctx.save_for_backward(x, lora_A, lora_B, z, weight)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, z, weight = ctx.saved_tensors
        groups, wanted = ctx.groups, ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_bias = grad_weight = grad_linear_bias = None
        if wanted[2] or wanted[3]:
            total = table_gradient(lora_B, z, grad, groups)
            if total is not None:
                grad_B, grad_bias = total[:, :-1].mT, total[:, -1]
        in_one_call = wanted[0] and products.in_one_call(grad)
        if in_one_call:
            layer = None if weight is None else weight.mT
            grad_x, grad_z = products.low_rank(grad, lora_B.mT, lora_A.mT, None, None, layer, None, groups, exact=False)
        elif wanted[0] or wanted[1]:
            grad_z = products.down(grad, lora_B.mT, groups)  # what reads the same rows comes in a row
        if wanted[1]:
            grad_A = table_gradient(lora_A, grad_z, x, groups)
        if wanted[0] and not in_one_call:
            grad_x = products.up(grad_z, lora_A, groups)
            if weight is not None:
                grad_x.addmm_(grad, weight)
        if wanted[5]:
            grad_weight = grad.mT @ x
        if wanted[6]:
            grad_linear_bias = grad.sum(0)
        return grad_x, grad_A, grad_B, grad_bias, grad if wanted[4] else None, grad_weight, grad_linear_bias, None


def table_gradient(table: Tensor, z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor | None:
    """A table's gradient, :func:`products.outer`; None where its optimizer takes the factors, which it is left."""
    factors = FactorList.of(table)
    if factors is None or groups.adapter_ids is not None:
        return products.outer(z, x, groups)
    factors.append(GradientFactors(z, x, groups))
    return None
