"""The grouped products as kernels; :mod:`torchrec_mdr.ops.products` says what each gives.

A program takes a tile of rows of one adapter. All strides are given, so that nothing is copied: ``x_row`` is the
distance of two rows of x, ``x_col`` that of two columns, and so on. Sums are in float32 and in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("num_tiles", "num_groups")  # a kernel is not compiled anew for other values of these


@triton.jit
def rows_of(tiles, permutation, num_tiles, t, BM: tl.constexpr, PERMUTED: tl.constexpr):
    """A tile's batch rows, and which of them there are."""
    places = tl.load(tiles + num_tiles + t) + tl.arange(0, BM)
    live = places < tl.load(tiles + 2 * num_tiles + t)
    if PERMUTED:
        rows = tl.load(permutation + places, mask=live, other=0)
    else:
        rows = places.to(tl.int64)
    return rows, live


@triton.jit
def load_rows(x, rows, live, columns, width, x_row, x_col, EVEN: tl.constexpr):
    """Rows of x [rows, columns], zero where there is nothing."""
    mask = live[:, None] if EVEN else live[:, None] & (columns < width)[None, :]
    return tl.load(x + rows[:, None] * x_row + columns[None, :] * x_col, mask=mask, other=0.0)


@triton.jit
def load_across(table, r, columns, rank, width, t_rank, t_col):
    """A table [columns, r], the transpose of a part of one adapter's table."""
    mask = (columns < width)[:, None] & (r < rank)[None, :]
    return tl.load(table + columns[:, None] * t_col + r[None, :] * t_rank, mask=mask, other=0.0)


@triton.jit
def load_along(table, r, columns, rank, width, t_rank, t_col):
    """A table [r, columns], a part of one adapter's table."""
    mask = (r < rank)[:, None] & (columns < width)[None, :]
    return tl.load(table + r[:, None] * t_rank + columns[None, :] * t_col, mask=mask, other=0.0)


@triton.jit
def load_start(
    start, rows, live, columns, width, s_row, s_col, START: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """What a tile starts from, in float32: nothing (0), one row for all (1), or a row for each (2)."""
    y_tile = tl.zeros((BM, BN), dtype=tl.float32)
    if START == 1:
        y_tile += tl.load(start + columns * s_col, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if START == 2:
        y_tile = load_rows(start, rows, live, columns, width, s_row, s_col, False).to(tl.float32)
    return y_tile


@triton.jit
def load_last(last, columns, width, known, l_col):
    """A known adapter's own row [columns] in float32; zero for one that is not."""
    return tl.load(last + columns * l_col, mask=(columns < width) & known, other=0.0).to(tl.float32)


@triton.jit
def store_rows(y, y_tile, rows, live, columns, width, y_row, y_col):
    """Writes y [rows, columns]."""
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(y + rows[:, None] * y_row + columns[None, :] * y_col, y_tile.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def down(
    x, table, z, tiles, permutation, num_tiles, num_groups, rank, width,
    x_row, x_col, t_adapter, t_rank, t_col, z_row, z_col,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``z_ij = table[d_i, j] . x_i``: programs (tile, vectors)."""
    t = tl.program_id(0)
    group = tl.load(tiles + t)
    if tl.load(tiles + num_tiles + t) >= tl.load(tiles + 2 * num_tiles + t):
        return
    rows, live = rows_of(tiles, permutation, num_tiles, t, BM, PERMUTED)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    own = table + tl.minimum(group, num_groups - 1).to(tl.int64) * t_adapter
    z_tile = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        x_tile = load_rows(x, rows, live, k, width, x_row, x_col, EVEN)
        z_tile = tl.dot(x_tile, load_across(own, r, k, rank, width, t_rank, t_col), z_tile, input_precision=PRECISION)
    z_tile = tl.where(group < num_groups, z_tile, 0.0)
    store_rows(z, z_tile, rows, live, r, rank, z_row, z_col)


@triton.jit(do_not_specialize=COUNTS)
def up(
    z, table, start, last, y, tiles, permutation, num_tiles, num_groups, rank, width,
    z_row, z_col, t_adapter, t_rank, t_col, s_row, s_col, l_adapter, l_col, y_row, y_col,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, START: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y_i = start_i + sum_j z_ij table[d_i, j]``, and last for one more j: programs (tile, columns)."""
    t = tl.program_id(0)
    group = tl.load(tiles + t)
    if tl.load(tiles + num_tiles + t) >= tl.load(tiles + 2 * num_tiles + t):
        return
    rows, live = rows_of(tiles, permutation, num_tiles, t, BM, PERMUTED)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    adapter = tl.minimum(group, num_groups - 1).to(tl.int64)
    known = group < num_groups  # nothing of another adapter may come in, be it 0 times infinity
    y_tile = load_start(start, rows, live, n, width, s_row, s_col, START, BM, BN)
    if LAST:
        weight = tl.load(z + rows * z_row + rank * z_col, mask=live & known, other=0.0).to(tl.float32)
        y_tile += weight[:, None] * load_last(last + adapter * l_adapter, n, width, known, l_col)[None, :]
    for first in range(0, tl.where(known, rank, 0), BR):
        r = first + tl.arange(0, BR)
        z_tile = load_rows(z, rows, live, r, rank, z_row, z_col, False)
        own = load_along(table + adapter * t_adapter, r, n, rank, width, t_rank, t_col)
        y_tile = tl.dot(z_tile, own, y_tile, input_precision=PRECISION)
    store_rows(y, y_tile, rows, live, n, width, y_row, y_col)


@triton.jit(do_not_specialize=COUNTS)
def down_up(
    x, lower, upper, start, last, y, z, tiles, permutation, num_tiles, num_groups, rank, in_width, out_width,
    x_row, x_col, a_adapter, a_rank, a_col, b_adapter, b_rank, b_col, s_row, s_col, l_adapter, l_col,
    y_row, y_col, z_row,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, START: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Down, then up on top of start, with z, and a column of ones for last, on the way: programs (tile)."""
    t = tl.program_id(0)
    group = tl.load(tiles + t)
    if tl.load(tiles + num_tiles + t) >= tl.load(tiles + 2 * num_tiles + t):
        return
    rows, live = rows_of(tiles, permutation, num_tiles, t, BM, PERMUTED)
    r = tl.arange(0, BR)
    adapter = tl.minimum(group, num_groups - 1).to(tl.int64)
    known = group < num_groups
    z_tile = tl.zeros((BM, BR), dtype=tl.float32)
    own = lower + adapter * a_adapter
    for first in range(0, in_width, BK):
        k = first + tl.arange(0, BK)
        x_tile = load_rows(x, rows, live, k, in_width, x_row, x_col, EVEN)
        own_tile = load_across(own, r, k, rank, in_width, a_rank, a_col)
        z_tile = tl.dot(x_tile, own_tile, z_tile, input_precision=PRECISION)
    z_tile = tl.where(known, z_tile, 0.0)
    store_z(z, z_tile, rows, live, r, rank, z_row, LAST)
    z_tile = z_tile.to(x.dtype.element_ty)
    own = upper + adapter * b_adapter
    for first in range(0, out_width, BN):
        n = first + tl.arange(0, BN)
        y_tile = load_start(start, rows, live, n, out_width, s_row, s_col, START, BM, BN)
        if LAST:
            y_tile += load_last(last + adapter * l_adapter, n, out_width, known, l_col)[None, :]
        own_tile = load_along(own, r, n, tl.where(known, rank, 0), out_width, b_rank, b_col)
        y_tile = tl.dot(z_tile, own_tile, y_tile, input_precision=PRECISION)
        store_rows(y, y_tile, rows, live, n, out_width, y_row, y_col)


@triton.jit(do_not_specialize=COUNTS)
def layer(
    x, weight, lower, upper, start, last, y, z, tiles, permutation, num_tiles, num_groups, rank, in_width, out_width,
    x_row, x_col, w_out, w_in, a_adapter, a_rank, a_col, b_adapter, b_rank, b_col, s_col, l_adapter, l_col,
    y_row, y_col, z_row,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, START: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A layer's product and its adapters' in one pass over x and y: programs (tile times columns, these first)."""
    blocks = tl.cdiv(out_width, BN)
    t = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = tl.load(tiles + t)
    if tl.load(tiles + num_tiles + t) >= tl.load(tiles + 2 * num_tiles + t):
        return
    rows, live = rows_of(tiles, permutation, num_tiles, t, BM, PERMUTED)
    n = block * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    adapter = tl.minimum(group, num_groups - 1).to(tl.int64)
    known = group < num_groups
    own = lower + adapter * a_adapter
    y_tile = tl.zeros((BM, BN), dtype=tl.float32)
    z_tile = tl.zeros((BM, BR), dtype=tl.float32)
    for first in range(0, in_width, BK):
        k = first + tl.arange(0, BK)
        x_tile = load_rows(x, rows, live, k, in_width, x_row, x_col, EVEN)
        weight_tile = load_across(weight, n, k, out_width, in_width, w_out, w_in)
        own_tile = load_across(own, r, k, rank, in_width, a_rank, a_col)
        y_tile = tl.dot(x_tile, weight_tile, y_tile, input_precision=PRECISION)
        z_tile = tl.dot(x_tile, own_tile, z_tile, input_precision=PRECISION)
    z_tile = tl.where(known, z_tile, 0.0)
    if block == 0:
        store_z(z, z_tile, rows, live, r, rank, z_row, LAST)
    own_tile = load_along(upper + adapter * b_adapter, r, n, tl.where(known, rank, 0), out_width, b_rank, b_col)
    y_tile = tl.dot(z_tile.to(x.dtype.element_ty), own_tile, y_tile, input_precision=PRECISION)
    # in two halves: a whole row of biases would not fit into registers beside the tile
    left, right = tl.split(tl.permute(tl.reshape(y_tile, (BM, 2, BN // 2)), (0, 2, 1)))
    n = block * BN + tl.arange(0, BN // 2)
    last += adapter * l_adapter
    store_with_biases(left, start, last, y, rows, live, n, out_width, s_col, l_col, y_row, y_col, known, START, LAST)
    n += BN // 2
    store_with_biases(right, start, last, y, rows, live, n, out_width, s_col, l_col, y_row, y_col, known, START, LAST)


@triton.jit
def store_with_biases(
    y_tile, start, last, y, rows, live, n, width, s_col, l_col, y_row, y_col, known,
    START: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Writes y [rows, n], the layer's own bias and the adapter's added."""
    if LAST:
        y_tile += load_last(last, n, width, known, l_col)[None, :]
    if START:
        y_tile += load_last(start, n, width, n >= 0, s_col)[None, :]
    store_rows(y, y_tile, rows, live, n, width, y_row, y_col)


@triton.jit
def store_z(z, z_tile, rows, live, r, rank, z_row, LAST: tl.constexpr):
    """Writes z, and a column of ones after it."""
    store_rows(z, z_tile, rows, live, r, rank, z_row, 1)
    if LAST:
        tl.store(z + rows * z_row + rank, 1.0, mask=live)


@triton.jit
def sum_of_products(
    z, x, tiles, permutation, num_tiles, t, r, n, rank, width, z_row, z_col, x_row, x_col,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``sum of z_ij x_i`` over the rows of a tile, BM of them at a time: [r, n]."""
    total = tl.zeros((BR, BN), dtype=tl.float32)
    end = tl.load(tiles + 2 * num_tiles + t)
    for first in range(tl.load(tiles + num_tiles + t), end, BM):
        places = first + tl.arange(0, BM)
        live = places < end
        if PERMUTED:
            rows = tl.load(permutation + places, mask=live, other=0)
        else:
            rows = places.to(tl.int64)
        mask = (r < rank)[:, None] & live[None, :]
        across = tl.load(z + r[:, None] * z_col + rows[None, :] * z_row, mask=mask, other=0.0)
        x_tile = load_rows(x, rows, live, n, width, x_row, x_col, False)
        total = tl.dot(across, x_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def bounds_of(offsets, group):
    """Where a group starts and ends among the grouped rows."""
    return tl.load(offsets + group - 1, mask=group > 0, other=0), tl.load(offsets + group)


@triton.jit(do_not_specialize=COUNTS)
def outer(
    z, x, out, parts, tiles, permutation, offsets, num_tiles, num_groups, rank, width, z_row, z_col, x_row, x_col,
    PRECISION: tl.constexpr, PERMUTED: tl.constexpr, SIZE: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``sum of z_ij x_i`` over an adapter's rows: programs (tile times columns, these first; vectors).

    An adapter with one tile is done, out [N, rank, width]; the others' tiles give parts [P, rank, width], which
    :func:`add_parts` adds up. A group that starts at row s has the parts from ``2 s // SIZE`` on: more than SIZE rows
    are at least as many halves of SIZE as there are tiles.
    """
    blocks = tl.cdiv(width, BN)
    t = tl.program_id(0) // blocks
    group = tl.load(tiles + t)
    if (group < 0) | (group == num_groups):
        return
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    total = sum_of_products(z, x, tiles, permutation, num_tiles, t, r, n, rank, width, z_row, z_col, x_row, x_col,
                            PRECISION, PERMUTED, BM, BR, BN)  # fmt: skip
    start, end = bounds_of(offsets, group)
    places = r[:, None] * width + n[None, :]
    mask = (r < rank)[:, None] & (n < width)[None, :]
    if end - start <= SIZE:
        own = out + group.to(tl.int64) * rank * width
        tl.store(own + places, total.to(out.dtype.element_ty), mask=mask)
    else:
        part = 2 * start // SIZE + (tl.load(tiles + num_tiles + t) - start) // SIZE
        tl.store(parts + part.to(tl.int64) * rank * width + places, total, mask=mask)


@triton.jit
def sum_parts(parts, offsets, group, places, mask, size, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The sum of a group's parts, each of ``size`` numbers, PARTS of them at a time."""
    start, end = bounds_of(offsets, group)
    count = tl.cdiv(end - start, SIZE)
    own = parts + tl.cast(2 * start // SIZE, tl.int64) * size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        tile = own + part.to(tl.int64)[:, None] * size + places[None, :]
        total += tl.sum(tl.load(tile, mask=(part < count)[:, None] & mask[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def add_parts(parts, out, owners, offsets, size, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sums of groups that have several tiles: programs (owner, block of an adapter's ``size`` numbers)."""
    group = tl.load(owners + tl.program_id(0))
    if group < 0:
        return
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = sum_parts(parts, offsets, group, places, places < size, size, SIZE, BLOCK, PARTS)
    tl.store(out + group.to(tl.int64) * size + places, total.to(out.dtype.element_ty), mask=places < size)
