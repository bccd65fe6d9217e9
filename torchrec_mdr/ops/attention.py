"""Attention over the adapters that a row has, one a bank (MultiLoRA, Eq. 6 to 8), as one operator.

A query times a key is ``(table[d_i]^T q_i) . z_i``: queries meet the banks' tables, and keys are never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_mdr.ops import products
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, is_direct, register

UNKNOWN = -6e4  # a score that has no weight beside any other, in float16, too


def attention_weights(
    queries: Tensor, inner: Tensor, tables: Sequence[Tensor], groups: Sequence[DomainGroups]
) -> tuple[Tensor, Tensor]:
    """Weighs a row's banks by how well their keys ``table[d_i] z_i`` meet its query: the softmax of their products.

    Args:
        queries (Tensor): [B, q].
        inner (Tensor): z [B, V, r + 1].
        tables (Sequence[Tensor]): [N, q, r + 1] of each bank.
        groups (Sequence[DomainGroups]): the rows' adapters in each bank.

    Returns:
        tuple: z times its weight [B, V, r + 1]; the weights [B, V], which no gradient flows through.
    """
    queries, tables = queries.to(inner.dtype), [table.to(inner.dtype) for table in tables]
    if is_direct(inner):
        weighed, weights = _AttentionWeights.apply(queries, inner, tuple(groups), *tables)
        return weighed, weights
    weighed, weights, _ = OPS.attention(queries, inner, tables, *_flat(groups))
    return weighed, weights.detach()


def _forward(
    queries: Tensor, inner: Tensor, tables: Sequence[Tensor], groups: Sequence[DomainGroups]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`attention_weights` gives, and what the queries' meeting with the tables gave [B, V, r + 1]."""
    met = inner.new_empty(inner.shape)
    for t, table, own in zip(met.unbind(1), tables, groups, strict=True):
        products.up(queries, table, own, out=t)
    scores = (inner * met).sum(2)
    if not any(own.may_miss for own in groups):
        weights = torch.softmax(scores, dim=1)
    else:  # over the banks that have an adapter for the row; zero where none has
        known = torch.stack([own.ids >= 0 for own in groups], 1)
        weights = torch.softmax(torch.where(known, scores, UNKNOWN), dim=1) * known
    return inner * weights.unsqueeze(2), weights, met


def _backward(
    grad: Tensor,
    queries: Tensor,
    inner: Tensor,
    met: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    groups: Sequence[DomainGroups],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of queries, of inner and of each table, as far as they are wanted."""
    of_weights = (grad * inner).sum(2)
    of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, 1, weights.dtype).unsqueeze(2)
    grad_inner = torch.addcmul(grad * weights.unsqueeze(2), met, of_scores) if wanted[1] else None
    grad_queries: Tensor | None = None
    grad_tables: list[Tensor | None] = [None] * len(tables)
    for place, z in enumerate((inner * of_scores).unbind(1)):
        table, own = tables[place], groups[place]
        if wanted[0]:
            grad_queries = products.up(z, table.mT, own, start=grad_queries, out=grad_queries)
        if wanted[2 + place]:
            grad_tables[place] = products.outer(queries, z, own)
    return grad_queries, grad_inner, grad_tables


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, inner: Tensor, groups: tuple[DomainGroups, ...], *tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        weighed, weights, met = _forward(queries, inner, tables, groups)
        ctx.save_for_backward(queries, inner, met, weights, *tables)
        ctx.groups = groups
        ctx.mark_non_differentiable(weights)
        return weighed, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, inner, met, weights, *tables = ctx.saved_tensors
        of_queries, of_inner, _, *of_tables = ctx.needs_input_grad
        wanted = of_queries, of_inner, *of_tables
        grads = _backward(grad, queries, inner, met, weights, tables, ctx.groups, wanted)
        return grads[0], grads[1], None, *grads[2]


# The same as an operator

_GROUPS = "Tensor[] ids, Tensor[] offsets, Tensor?[] adapter_ids, Tensor?[] permutations, SymInt[] num_adapters"
SCHEMAS = {
    "attention": (
        f"(Tensor queries, Tensor inner, Tensor[] tables, {_GROUPS}) -> (Tensor weighed, Tensor weights, Tensor met)"
    ),
    "attention_backward": (
        "(Tensor grad, Tensor queries, Tensor inner, Tensor met, Tensor weights, Tensor[] tables, "
        f"{_GROUPS}) -> (Tensor grad_queries, Tensor grad_inner, Tensor[] grad_tables)"
    ),
}


def _flat(groups: Sequence[DomainGroups]) -> tuple[list[Any], ...]:
    return (
        [own.ids for own in groups],
        [own.offsets for own in groups],
        [own.adapter_ids for own in groups],
        [own.permutation for own in groups],
        [own.num_adapters for own in groups],
    )


def _groups(*arguments: Sequence[Any]) -> list[DomainGroups]:
    return [
        DomainGroups(ids, offsets, size, owners, permutation, may_miss=True)
        for ids, offsets, owners, permutation, size in zip(*arguments, strict=True)
    ]


def _attention(queries: Tensor, inner: Tensor, tables: list[Tensor], *groups: Any) -> tuple[Tensor, ...]:
    return _forward(queries, inner, tables, _groups(*groups))


def _attention_backward(
    grad: Tensor, queries: Tensor, inner: Tensor, met: Tensor, weights: Tensor, tables: list[Tensor], *groups: Any
) -> tuple[Any, ...]:
    wanted = [True] * (2 + len(tables))
    return _backward(grad, queries, inner, met, weights, tables, _groups(*groups), wanted)


def _fake_attention(queries: Tensor, inner: Tensor, tables: list[Tensor], *groups: Any) -> tuple[Tensor, ...]:
    return inner.new_empty(inner.shape), inner.new_empty(inner.shape[:2]), inner.new_empty(inner.shape)


def _fake_attention_backward(
    grad: Tensor, queries: Tensor, inner: Tensor, met: Tensor, weights: Tensor, tables: list[Tensor], *groups: Any
) -> tuple[Any, ...]:
    return queries.new_empty(queries.shape), inner.new_empty(inner.shape), [t.new_empty(t.shape) for t in tables]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, inner, tables, *tensors, sizes = inputs
    _, weights, met = output
    lists = [tables, *tensors]
    ctx.save_for_backward(queries, inner, met, weights, *(tensor for items in lists for tensor in items))
    ctx.sizes = sizes
    ctx.are_lists = [all(isinstance(tensor, Tensor) for tensor in items) for items in tensors]
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    count = len(ctx.sizes)
    # torch.library wants lists where inputs are lists of tensors, and None where a list holds None
    rest = *([None] * count if is_list else None for is_list in ctx.are_lists), None
    if grad is None:
        return None, None, [None] * count, *rest
    queries, inner, met, weights, *flat = ctx.saved_tensors
    tables, *groups = (list(flat[place : place + count]) for place in range(0, len(flat), count))
    grads = OPS.attention_backward(grad, queries, inner, met, weights, tables, *groups, ctx.sizes)
    return *grads, *rest


register("attention", SCHEMAS["attention"], _attention, _fake_attention, _keep, _formula)
register("attention_backward", SCHEMAS["attention_backward"], _attention_backward, _fake_attention_backward)
