"""Several banks beside one layer, against the same written out by PyTorch's operators, by every engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cases import crossed
from tests.ops.conftest import ENGINES, each_kind_of_engine
from torchrec_mdr.ops import attention
from torchrec_mdr.ops.attention import attention_weights
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups
from torchrec_mdr.ops.library import OPS
from torchrec_mdr.ops.low_rank import LinearWeights
from torchrec_mdr.ops.multi_bank import down_project, up_project

SIZES, ROWS, IN, OUT, RANK, QUERIES = (3, 2), 9, 5, 4, 3, 2
Part = dict[str, Tensor]


def some_groups(is_sorted: bool) -> tuple[DomainGroups, ...]:
    ids = torch.stack([torch.randint(size, (ROWS,)) for size in SIZES], 1)
    if is_sorted:
        return BatchDomains.from_sorted(ids[(ids @ torch.tensor([SIZES[1], 1])).argsort()], SIZES).groups
    return BatchDomains.from_ids(ids, SIZES).groups


def some_parts(dtype: torch.dtype) -> Part:
    shapes = {"x": (ROWS, IN), "weight": (OUT, IN), "bias": (OUT,), "query": (QUERIES, OUT), "base": (ROWS, OUT)}
    for place, size in enumerate(SIZES):
        shapes |= {f"down{place}": (size, RANK, IN), f"up{place}": (size, RANK + 1, OUT)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


def ours(part: Part, groups: Sequence[DomainGroups], with_layer: bool, with_query: bool) -> list[Tensor]:
    base, queries, inner = down_project(
        part["x"],
        LinearWeights(part["weight"], part["bias"]) if with_layer else part["base"],
        part["query"] if with_query else None,
        [part["down0"], part["down1"]],
        groups,
    )
    # as a fusion has it: weights that depend on the queries
    weighed = inner * queries.unsqueeze(2) if with_query else inner
    return [up_project(base, weighed, [part["up0"], part["up1"]], groups), inner, *([queries] if with_query else [])]


def written_out(part: Part, groups: Sequence[DomainGroups], with_layer: bool, with_query: bool) -> list[Tensor]:
    x, base = part["x"], part["base"]
    if with_layer:
        base = F.linear(x, part["weight"], part["bias"])
    queries, y, inner = base @ part["query"].T, base, []
    for place, own in enumerate(groups):
        z = torch.einsum("brk,bk->br", part[f"down{place}"][own.ids], x)
        inner.append(torch.cat([z, torch.ones(ROWS, 1, dtype=z.dtype)], 1))
        weighed = inner[-1] * queries[:, place : place + 1] if with_query else inner[-1]
        y = y + torch.einsum("br,brk->bk", weighed, part[f"up{place}"][own.ids])
    return [y, torch.stack(inner, 1), *([queries] if with_query else [])]


@crossed(
    ("engine",),
    engine=ENGINES,
    dtype=[torch.float32, torch.float64],
    is_sorted=[True, False],
    with_layer=[True, False],
    with_query=[True, False],
)
def test_several_banks_are_their_sum(
    dtype: torch.dtype, is_sorted: bool, with_layer: bool, with_query: bool, engine: str
) -> None:
    torch.manual_seed(1)
    groups, part = some_groups(is_sorted), some_parts(dtype)
    found, expected = (run(part, groups, with_layer, with_query) for run in (ours, written_out))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **tolerance)
    for outputs in (slice(1), slice(None)):  # of the result alone, and of all that there is
        weights = [torch.randn_like(output) for output in found[outputs]]
        gradients = [
            torch.autograd.grad(results[outputs], list(part.values()), weights, retain_graph=True, allow_unused=True)
            for results in (found, expected)
        ]
        for name, own, other in zip(part, *gradients, strict=True):
            assert (own is None) == (other is None), name
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@each_kind_of_engine
def test_what_alone_trains(engine: str) -> None:
    torch.manual_seed(2)
    groups, part = some_groups(True), some_parts(torch.float64)
    for trained in part.keys() - {"base"}:
        gradients = []
        for run in (ours, written_out):
            leaves = {name: tensor.detach().requires_grad_(name == trained) for name, tensor in part.items()}
            run(leaves, groups, True, True)[0].square().sum().backward()
            gradients.append(leaves[trained].grad)
        torch.testing.assert_close(*gradients, msg=lambda text, name=trained: f"{name}: {text}")


@crossed(("engine",), engine=ENGINES, dtype=[torch.float32, torch.float64], is_sorted=[True, False])
def test_attention_is_the_softmax_of_queries_times_keys(dtype: torch.dtype, is_sorted: bool, engine: str) -> None:
    torch.manual_seed(3)
    groups = some_groups(is_sorted)
    shapes = (ROWS, QUERIES), (ROWS, 2, RANK + 1), (3, QUERIES, RANK + 1), (2, QUERIES, RANK + 1)
    queries, inner, *tables = leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    keys = [torch.einsum("bqr,br->bq", tables[v][groups[v].ids], inner[:, v]) for v in range(2)]
    expected = torch.softmax(torch.stack([(queries * key).sum(1) for key in keys], 1), 1)
    weighed, weights = attention_weights(queries, inner, tables, groups)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(weights, expected, **tolerance)
    torch.testing.assert_close(weighed, inner * expected.unsqueeze(2), **tolerance)
    assert not weights.requires_grad and not torch.allclose(weights, torch.full_like(weights, 0.5), atol=0.1)
    direction = torch.randn_like(inner)
    found = torch.autograd.grad(weighed, leaves, direction)
    for own, other in zip(found, torch.autograd.grad(inner * expected.unsqueeze(2), leaves, direction), strict=True):
        torch.testing.assert_close(own, other, **tolerance)
    operator, its_weights, _ = OPS.attention(queries, inner, tables, *attention._flat(groups))
    assert torch.equal(operator, weighed) and torch.equal(its_weights, weights)
    assert all(map(torch.equal, torch.autograd.grad(operator, leaves, direction), found))


@each_kind_of_engine
def test_what_nobody_takes_has_no_gradient(engine: str) -> None:
    groups, part = some_groups(True), some_parts(torch.float64)
    for trained, of_layer, of_inner in (("query", 0, 0), ("down0", 0, 1), ("weight", 1, 0), ("x", 1, 1)):
        p = {name: tensor.detach().requires_grad_(name == trained) for name, tensor in part.items()}
        linear, downs = LinearWeights(p["weight"], p["bias"]), [p["down0"], p["down1"]]
        base, queries, inner = down_project(p["x"], linear, p["query"], downs, groups)
        assert [base.requires_grad, inner.requires_grad] == [bool(of_layer), bool(of_inner)], trained
        assert queries.requires_grad
