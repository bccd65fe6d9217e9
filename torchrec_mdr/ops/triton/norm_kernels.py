"""What :mod:`torchrec_mdr.ops.statistics` is computed with, as kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from torchrec_mdr.ops.triton.kernels import COUNTS, bounds_of, load_rows, rows_of, store_rows


@triton.jit
def gated(u, gate, GATED: tl.constexpr):
    """A gradient by what a ReLU was given, as PyTorch has it: it counts unless the ReLU gave zero."""
    if GATED:
        u = tl.where(gate.to(tl.float32) <= 0.0, 0.0, u)
    return u


@triton.jit(do_not_specialize=COUNTS)
def centered_sums(
    u, v, centre, gate, out, parts, tiles, permutation, offsets, num_tiles, num_groups, width,
    u_row, u_col, v_row, v_col, c_row, c_col, g_row, g_col,
    LEFT: tl.constexpr, GATED: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``sum u_i`` and ``sum u_i (v_i - centre_d)``: programs (tile times columns, these first), as of `outer`.

    Without LEFT u is ``v - centre``.
    """
    blocks = tl.cdiv(width, BN)
    t = tl.program_id(0) // blocks
    group = tl.load(tiles + t)
    if (group < 0) | (group == num_groups):
        return
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    own = tl.load(centre + group.to(tl.int64) * c_row + n * c_col, mask=n < width, other=0.0).to(tl.float32)
    first = tl.zeros((BM, BN), dtype=tl.float32)
    second = tl.zeros((BM, BN), dtype=tl.float32)
    begin = tl.load(tiles + num_tiles + t)
    end = tl.load(tiles + 2 * num_tiles + t)
    for row in range(begin, end, BM):
        places = row + tl.arange(0, BM)
        live = places < end
        if PERMUTED:
            rows = tl.load(permutation + places, mask=live, other=0)
        else:
            rows = places.to(tl.int64)
        right = load_rows(v, rows, live, n, width, v_row, v_col, False).to(tl.float32) - own[None, :]
        right = tl.where(live[:, None], right, 0.0)
        left = right
        if LEFT:
            left = load_rows(u, rows, live, n, width, u_row, u_col, False).to(tl.float32)
            if GATED:
                left = gated(left, load_rows(gate, rows, live, n, width, g_row, g_col, False), GATED)
        first += left
        second += left * right
    start, stop = bounds_of(offsets, group)
    if stop - start <= SIZE:
        store_sums(out + group.to(tl.int64) * 2 * width, first, second, n, width)
    else:
        part = 2 * start // SIZE + (begin - start) // SIZE
        store_sums(parts + part.to(tl.int64) * 2 * width, first, second, n, width)


@triton.jit
def store_sums(to, first, second, n, width):
    """Both sums over rows [rows, n], the second behind the whole of the first."""
    tl.store(to + n, tl.sum(first, 0).to(to.dtype.element_ty), mask=n < width)
    tl.store(to + width + n, tl.sum(second, 0).to(to.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=COUNTS)
def affine_by_domain(
    u, v, table, gate, y, tiles, permutation, num_tiles, num_groups, width,
    u_row, u_col, v_row, v_col, t_adapter, t_part, t_col, g_row, g_col, y_row,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GATED: tl.constexpr, RELU: tl.constexpr, PERMUTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``a_d u_i + b_d (v_i - c_d) + e_d``, zero for rows without a domain: programs (tile times columns)."""
    blocks = tl.cdiv(width, BN)
    t = tl.program_id(0) // blocks
    group = tl.load(tiles + t)
    if tl.load(tiles + num_tiles + t) >= tl.load(tiles + 2 * num_tiles + t):
        return
    rows, live = rows_of(tiles, permutation, num_tiles, t, BM, PERMUTED)
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    own = table + tl.minimum(group, num_groups - 1).to(tl.int64) * t_adapter + n * t_col
    e = tl.load(own + 3 * t_part, mask=n < width, other=0.0).to(tl.float32)
    y_tile = tl.zeros((BM, BN), dtype=tl.float32) + e[None, :]
    if RIGHT:
        b = tl.load(own + t_part, mask=n < width, other=0.0).to(tl.float32)
        c = tl.load(own + 2 * t_part, mask=n < width, other=0.0).to(tl.float32)
        v_tile = load_rows(v, rows, live, n, width, v_row, v_col, False).to(tl.float32)
        y_tile += (v_tile - c[None, :]) * b[None, :]
    if LEFT:
        a = tl.load(own, mask=n < width, other=0.0).to(tl.float32)
        u_tile = load_rows(u, rows, live, n, width, u_row, u_col, False).to(tl.float32)
        if GATED:
            u_tile = gated(u_tile, load_rows(gate, rows, live, n, width, g_row, g_col, False), GATED)
        y_tile += u_tile * a[None, :]
    y_tile = tl.where(group < num_groups, y_tile, 0.0)
    if RELU:
        y_tile = tl.where(y_tile < 0.0, 0.0, y_tile)
    store_rows(y, y_tile, rows, live, n, width, y_row, 1)
