"""The grouped linear product against a loop over rows, and the tiles behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import crossed
from tests.helpers import CountOps
from torchrec_mdr.ops.grouped_linear import grouped_linear
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups
from torchrec_mdr.ops.tiles import Tiles

N = 4


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """The product, row by row."""
    rows = [row @ weight[d].T for row, d in zip(x, ids.tolist(), strict=True)]
    if not rows:
        return x.new_zeros(0, *x.shape[1:-1], weight.shape[1])
    y = torch.stack(rows)
    return y if bias is None else torch.stack([row + bias[d] for row, d in zip(y, ids.tolist(), strict=True)])


def groups_of(kind: str, num_rows: int) -> DomainGroups:
    ids = torch.randint(N, (num_rows,))
    ids[ids == 1] = 2  # an empty group
    if kind == "unsorted":
        return DomainGroups.from_ids(ids, N)
    if kind == "sorted":
        return DomainGroups.from_sorted_ids(ids.sort().values, N)
    pairs = torch.stack([torch.randint(3, (num_rows,)), ids], 1)
    pairs = pairs[(pairs[:, 0] * N + pairs[:, 1]).argsort()]
    return BatchDomains.from_sorted(pairs, (3, N)).groups[1]


@crossed(
    kind=["unsorted", "sorted", "second division"],
    widths=[(8, 4), (7, 5), (113, 1)],
    inner=[(), (3,), (2, 3)],
    dtype=[torch.float32, torch.float64],
)
def test_output_and_gradients_are_those_of_a_loop(
    kind: str, widths: tuple[int, int], inner: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    in_features, out_features = widths
    groups = groups_of(kind, 37)
    tensors = [
        torch.randn(37, *inner, in_features, dtype=dtype),
        torch.randn(N, out_features, in_features, dtype=dtype),
        torch.randn(N, out_features, dtype=dtype),
    ]
    leaves = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    outputs = [grouped_linear(*leaves[0], groups), linear_rows(*leaves[1], groups.ids)]
    pull = torch.randn_like(outputs[1])
    for output in outputs:
        output.backward(pull)
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {}
    torch.testing.assert_close(*outputs, **tolerance)
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 3, 8), (1, 8)])
def test_no_rows_no_features_no_bias(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(N, 6, shape[-1], dtype=dtype, requires_grad=True)
    groups = DomainGroups.from_ids(torch.zeros(shape[0], dtype=torch.int64), N)
    y = grouped_linear(x, weight, None, groups)
    torch.testing.assert_close(y, linear_rows(x, weight, None, groups.ids), atol=1e-5, rtol=1e-5)
    y.sum().backward()  # an expanded gradient
    assert weight.grad is not None and not weight.grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_operators_does_not_depend_on_the_number_of_domains(dtype: torch.dtype) -> None:
    counts = []
    for num_domains in (2, 50):
        x = torch.randn(64, 8, dtype=dtype, requires_grad=True)
        weight = torch.randn(num_domains, 4, 8, dtype=dtype, requires_grad=True)
        groups = DomainGroups.from_ids(torch.randint(num_domains, (64,)), num_domains)
        with CountOps() as ops:
            grouped_linear(x, weight, None, groups).square().sum().backward()
        counts.append(ops.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("sizes", [[5], [0, 0, 3], [300, 1, 0, 40], [16, 16, 16], [1] * 40, [0], [129, 127]])
def test_tiles_hold_every_row_once_and_one_group_each(sizes: list[int]) -> None:
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    num_rows = sum(sizes)
    tiles = Tiles.of(ends, num_rows)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert tiles.slots.unique().numel() == num_rows
    assert torch.equal(tiles.groups[tiles.slots // tiles.size], group)
    # no more than half a tile a group is wasted on average, beside the tile that may be left over
    assert tiles.groups.numel() * tiles.size <= num_rows + (len(sizes) + 1) * tiles.size
    rows = torch.randn(num_rows, 3)
    assert torch.equal(tiles.collect(tiles.spread(rows)), rows)
    assert tiles.spread(rows).sum() == pytest.approx(rows.sum().item(), abs=1e-3)
