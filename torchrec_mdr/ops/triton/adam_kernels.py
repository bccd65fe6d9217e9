"""Adam on the rows of a bank that are present, as kernels, see :class:`torchrec_mdr.optim.bank_adam.BankAdam`.

Parameters and moments are float32 and lie alike. A row's step count is read, and moved afterwards by who launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchrec_mdr.ops.triton.kernels import COUNTS, bounds_of, sum_of_products, sum_parts


@triton.jit
def corrections(steps, row, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """What a row's moments are divided by, ``1 - beta^step``: in float64, since a beta is all but 1."""
    step = (tl.load(steps + row) + 1.0).to(tl.float64)
    first = 1.0 - tl.exp(step * LOG_BETA1)
    second = 1.0 - tl.exp(step * LOG_BETA2)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def move(
    grad, param, exp_avg, exp_avg_sq, places, mask, lr, decay, first_correction, second_correction,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One step of some numbers from their gradients."""
    value = tl.load(param + places, mask=mask, other=0.0)
    first = tl.load(exp_avg + places, mask=mask, other=0.0)
    second = tl.load(exp_avg_sq + places, mask=mask, other=0.0)
    grad += decay * value
    first += (grad - first) * (1.0 - BETA1)
    second += (grad * grad - second) * (1.0 - BETA2)
    update = (first / first_correction) / (tl.sqrt(second / second_correction) + EPS)
    tl.store(param + places, value - lr * update, mask=mask)
    tl.store(exp_avg + places, first, mask=mask)
    tl.store(exp_avg_sq + places, second, mask=mask)


@triton.jit
def adam(
    grad, param, exp_avg, exp_avg_sq, steps, present, lr, decay, rank, width,
    g_row, g_rank, g_col, p_row, p_rank, p_col,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of a parameter [N, rank, width] from its gradient: programs (row times blocks, these first)."""
    blocks = tl.cdiv(rank * width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(present + row) == 0:
        return
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    r = place // width
    n = place % width
    mask = place < rank * width
    first, second = corrections(steps, row, LOG_BETA1, LOG_BETA2)
    own = tl.load(grad + row * g_row + r * g_rank + n * g_col, mask=mask, other=0.0).to(tl.float32)
    places = row * p_row + r * p_rank + n * p_col
    move(own, param, exp_avg, exp_avg_sq, places, mask, lr, decay, first, second, BETA1, BETA2, EPS)


@triton.jit
def move_both(
    total, r, n, mask, rank, width, group, lr, decay,
    table, table_avg, table_sq, table_steps, bias, bias_avg, bias_sq, bias_steps, t_row, t_rank, t_col, b_row,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """A step of a group's vectors, of which the last is the bias if there is one."""
    vectors = rank - 1 if BIAS else rank
    first, second = corrections(table_steps, group, LOG_BETA1, LOG_BETA2)
    row = group.to(tl.int64)
    places = row * t_row + r * t_rank + n * t_col
    own = mask & (r < vectors)
    move(total, table, table_avg, table_sq, places, own, lr, decay, first, second, BETA1, BETA2, EPS)
    if BIAS:
        first, second = corrections(bias_steps, group, LOG_BETA1, LOG_BETA2)
        places = row * b_row + r * 0 + n
        own = mask & (r == vectors)
        move(total, bias, bias_avg, bias_sq, places, own, lr, decay, first, second, BETA1, BETA2, EPS)


@triton.jit(do_not_specialize=COUNTS)
def adam_outer(
    z, x, parts, tiles, permutation, offsets, present, lr, decay,
    table, table_avg, table_sq, table_steps, bias, bias_avg, bias_sq, bias_steps,
    num_tiles, num_groups, rank, width, z_row, z_col, x_row, x_col, t_row, t_rank, t_col, b_row,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """:func:`torchrec_mdr.ops.triton.kernels.outer`, with a step in place of writing the gradient."""
    blocks = tl.cdiv(width, BN)
    t = tl.program_id(0) // blocks
    group = tl.load(tiles + t)
    if (group < 0) | (group == num_groups):
        return
    if tl.load(present + group) == 0:
        return
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    total = sum_of_products(z, x, tiles, permutation, num_tiles, t, r, n, rank, width, z_row, z_col, x_row, x_col,
                            PRECISION, PERMUTED, BM, BR, BN)  # fmt: skip
    start, end = bounds_of(offsets, group)
    mask = (r < rank)[:, None] & (n < width)[None, :]
    if end - start <= SIZE:
        move_both(total, r[:, None], n[None, :], mask, rank, width, group, lr, decay,
                  table, table_avg, table_sq, table_steps, bias, bias_avg, bias_sq, bias_steps,
                  t_row, t_rank, t_col, b_row, BETA1, BETA2, LOG_BETA1, LOG_BETA2, EPS, BIAS)  # fmt: skip
    else:
        part = 2 * start // SIZE + (tl.load(tiles + num_tiles + t) - start) // SIZE
        tl.store(parts + part.to(tl.int64) * rank * width + r[:, None] * width + n[None, :], total, mask=mask)


@triton.jit
def adam_parts(
    parts, owners, offsets, present, lr, decay,
    table, table_avg, table_sq, table_steps, bias, bias_avg, bias_sq, bias_steps,
    rank, width, t_row, t_rank, t_col, b_row,
    SIZE: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """:func:`torchrec_mdr.ops.triton.kernels.add_parts`, with a step in place of writing the sums."""
    group = tl.load(owners + tl.program_id(0))
    if group < 0:
        return
    if tl.load(present + group) == 0:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < rank * width
    total = sum_parts(parts, offsets, group, place, mask, rank * width, SIZE, BLOCK, PARTS)
    move_both(total, place // width, place % width, mask, rank, width, group, lr, decay,
              table, table_avg, table_sq, table_steps, bias, bias_avg, bias_sq, bias_steps,
              t_row, t_rank, t_col, b_row, BETA1, BETA2, LOG_BETA1, LOG_BETA2, EPS, BIAS)  # fmt: skip


@triton.jit
def mark_rows(grad, present, rank, width, g_row, g_rank, g_col, BLOCK: tl.constexpr):
    """Sets present where a row of a gradient is not zero: programs as of :func:`adam`; those that write agree."""
    blocks = tl.cdiv(rank * width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    own = grad + row * g_row + (place // width) * g_rank + (place % width) * g_col
    moved = tl.load(own, mask=place < rank * width, other=0.0).to(tl.float32) != 0.0
    if tl.max(moved.to(tl.int32), 0) > 0:
        tl.store(present + row, True)
