"""Adam of banks on CUDA: what launches its kernels."""

from __future__ import annotations

import math
import sys
from typing import Any

import triton
from torch import Tensor

from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.triton import adam_kernels, sizes
from torchrec_mdr.ops.triton.products import new_parts, on_device_of, pointer
from torchrec_mdr.ops.triton.tile_map import Layout

_BLOCK = 1024  # numbers that a program moves
_PART_BLOCK = 256

State = dict[str, Tensor]  # `step` [N]; `exp_avg` and `exp_avg_sq`, like the parameter


def mark_rows(grad: Tensor, present: Tensor) -> None:
    """Sets present, bool [N], where a row of a gradient [N, ...] is not zero."""
    own = _in_rows(grad, like=grad)
    _, rank, width = own.shape
    with on_device_of(grad):
        grid = (grad.shape[0] * triton.cdiv(rank * width, _BLOCK),)
        adam_kernels.mark_rows[grid](own, present, rank, width, *own.stride(), BLOCK=_BLOCK)


def update(param: Tensor, grad: Tensor, state: State, group: dict[str, Any], present: Tensor) -> None:
    """A step of the rows that are present.

    Args:
        param (Tensor): float32 [N, ...], of at most three dimensions.
        grad (Tensor): the same shape, of any type and strides.
        state (State): moments that lie as the parameter does, and step counts.
        group (dict): lr, betas, eps and weight_decay.
        present (Tensor): bool [N].
    """
    own, moments = _in_rows(param), [_in_rows(state[name]) for name in ("exp_avg", "exp_avg_sq")]
    steepest = _in_rows(grad, like=param)
    _, rank, width = own.shape
    with on_device_of(param):
        grid = (param.shape[0] * triton.cdiv(rank * width, _BLOCK),)
        adam_kernels.adam[grid](
            *(steepest, own, *moments, state["step"], present, *_rates(group), rank, width),
            *(*steepest.stride(), *own.stride()),
            **_constants(group),
            BLOCK=_BLOCK,
        )
        state["step"].add_(present)


def update_from_factors(
    table: Tensor,
    state: State,
    bias: Tensor | None,
    bias_state: State | None,
    factors: tuple[Tensor, Tensor, DomainGroups],
    group: dict[str, Any],
    present: Tensor,
) -> None:
    """A step of a table and its bias, whose gradient ``outer(*factors)`` is never written.

    Args:
        table (Tensor): float32 [N, r, width] or, where there is a bias, [N, width, r].
        state (State): the table's.
        bias (Tensor | None): float32 [N, width], whose gradient is the last vector of the product.
        bias_state (State | None): its.
        factors (tuple): z [B, r], or [B, r + 1]; x [B, width]; the rows' groups, which are the adapters.
        group (dict): lr, betas, eps and weight_decay.
        present (Tensor): bool [N].
    """
    z, x, groups = factors
    moved = [table, state["exp_avg"], state["exp_avg_sq"]]
    moved = moved if bias is None else [tensor.mT for tensor in moved]
    biases = moved + [state["step"]]  # not followed
    if bias is not None and bias_state is not None:
        biases = [bias, bias_state["exp_avg"], bias_state["exp_avg_sq"], bias_state["step"]]
        assert all(tensor.is_contiguous() for tensor in biases)
    rank, width = z.shape[1], x.shape[1]
    constants = {**_constants(group), "BIAS": bias is not None}
    targets = *moved, state["step"], *biases
    strides = *moved[0].stride(), 0 if bias is None else bias.stride(0)
    rates = _rates(group)
    with on_device_of(x):
        layout = Layout.of(groups)
        size = sizes.rows_of_sum(layout)
        tiles = layout.tiles(size, owners=True)
        parts = new_parts(x, layout.num_rows, size, rank * width)
        many = sizes.vectors(rank)
        columns = 64 if many > 16 else 128  # moments take registers, too
        permutation = pointer(layout.permutation, z)
        adam_kernels.adam_outer[tiles.num_tiles * triton.cdiv(width, columns), triton.cdiv(rank, many)](
            *(z, x, parts, tiles.tiles, permutation, layout.offsets, present, *rates, *targets),
            *(tiles.num_tiles, layout.num_groups, rank, width, *z.stride(), *x.stride(), *strides),
            PRECISION=sizes.precision(x),
            PERMUTED=layout.permutation is not None,
            SIZE=size,
            **constants,
            BM=128 // x.element_size(),
            BR=many,
            BN=columns,
        )
        if parts.shape[0]:
            adam_kernels.adam_parts[tiles.owners.numel(), triton.cdiv(rank * width, _PART_BLOCK)](
                *(parts, tiles.owners, layout.offsets, present, *rates, *targets, rank, width, *strides),
                SIZE=size,
                **constants,
                BLOCK=_PART_BLOCK,
                PARTS=32,
                num_warps=8,
            )
        for own in (state, bias_state):
            if own is not None:
                own["step"].add_(present)


def _rates(group: dict[str, Any]) -> tuple[float, float]:
    return float(group["lr"]), float(group["weight_decay"])


def _constants(group: dict[str, Any]) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    logs = {"LOG_BETA1": _log(beta1), "LOG_BETA2": _log(beta2)}
    return {"BETA1": beta1, "BETA2": beta2, **logs, "EPS": group["eps"]}


def _log(beta: float) -> float:
    return math.log(max(beta, sys.float_info.min))


def _in_rows(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """[N, ...] as [N, rank, width], columns of what lies in memory as ``like`` does next to each other."""
    like = tensor if like is None else like
    if tensor.dim() == 3:
        return tensor if like.is_contiguous() else tensor.mT
    return tensor.reshape(tensor.shape[0], 1, -1)
