"""The kernel that cuts grouped rows into tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def map_tiles(
    offsets, tiles, owners, num_groups, num_rows, num_tiles,
    SIZE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, OWNERS: tl.constexpr,
):  # fmt: skip
    """Each tile's group, first row and end, and which group's parts are added up where, see :class:`TileMap`.

    Group g has the tiles from ``g + start_g // SIZE`` on: room for all of its rows, since floors of differences are no
    more than differences of floors. So a tile finds its group by bisection, and nothing is counted beforehand.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = low + num_groups
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        start = tl.load(offsets + middle - 1, mask=middle > 0, other=0)
        reached = middle + start // SIZE <= t
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    group = low
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets + group, mask=group < num_groups, other=num_rows)
    first = start + (t - group - start // SIZE) * SIZE
    used = (first < end) | (first == start)
    inside = t < num_tiles
    tl.store(tiles + t, tl.where(used, group, -1), mask=inside)
    tl.store(tiles + num_tiles + t, first, mask=inside)
    tl.store(tiles + 2 * num_tiles + t, tl.where(used, tl.minimum(first + SIZE, end), first), mask=inside)
    if OWNERS:
        row = t * SIZE
        low = tl.zeros((BLOCK,), dtype=tl.int32)
        high = low + num_groups
        for _ in range(STEPS):  # the first group that ends after the row
            middle = (low + high) // 2
            passed = (low < high) & (tl.load(offsets + middle, mask=middle < num_groups, other=num_rows) <= row)
            high = tl.where(passed | (low >= high), high, middle)
            low = tl.where(passed, middle + 1, low)
        start = tl.load(offsets + low - 1, mask=low > 0, other=0)
        end = tl.load(offsets + low, mask=low < num_groups, other=0)
        owns = (low < num_groups) & (end - start > SIZE) & ((start + SIZE - 1) // SIZE == t)
        tl.store(owners + t, tl.where(owns, low, -1), mask=t <= num_rows // SIZE)
