"""Batch normalisation over ranks, per domain and per combination of domains, against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import CountOps, randomise
from tests.ranks import RankPool
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.norm import DomainNorm, GlobalBatchNorm1d, NormBank
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

N, WIDTH, STEPS = 4, 5, 3


def random_state(norm: nn.Module) -> nn.Module:
    randomise({f"norm.{name}": tensor for name, tensor in norm.state_dict().items()})
    return norm


def share(rows: Tensor) -> Tensor:
    """This rank's rows: unequal shares, the last rank's the larger one."""
    if dist.get_world_size() == 1:
        return rows
    first = len(rows) // 4
    return rows[:first] if dist.get_rank() == 0 else rows[first:]


def train_norm(norm: nn.Module, inputs: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Outputs and gradients of some training steps, summed over ranks, and the state after them."""
    random_state(norm).train()
    results = {}
    for step, (x, weight, *ids) in enumerate(inputs):
        norm.zero_grad()
        own = share(x).clone().requires_grad_()
        y = norm(own, *map(share, ids))
        (y * share(weight)).sum().backward()
        results |= {f"y{step}": y.detach(), f"x.grad{step}": own.grad}
        for name, parameter in norm.named_parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                results[f"{name}.grad{step}"] = parameter.grad.clone()
    return results | {name: tensor.clone() for name, tensor in norm.state_dict().items()}


def joined(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all ranks: rows put together, everything else the same on all of them."""
    for name in ranks[0]:
        if name[0] not in "xy":
            assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), name
    return {name: torch.cat([r[name] for r in ranks]) if name[0] in "xy" else ranks[0][name] for name in ranks[0]}


def some_inputs() -> list[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return [(3 * torch.randn(23, WIDTH) + 2, torch.randn(23, WIDTH)) for _ in range(STEPS)]


def with_ids(inputs: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Domain 0 on the first rank alone, 1 on both, 2 in one row, 3 absent at first."""
    ids = [torch.tensor([0] * 4 + [1] * 16 + [2] + [2 if step == 1 else 3] * 2) for step in range(STEPS)]
    ids[0][21:] = 1
    return [(*pair, i) for pair, i in zip(inputs, ids, strict=True)]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_batch_norm_on_two_ranks_is_one_batch_norm(one_rank: RankPool, two_ranks: RankPool) -> None:
    inputs = some_inputs()
    theirs = joined(one_rank.run(train_norm, nn.BatchNorm1d(WIDTH), inputs))
    assert_close(joined(one_rank.run(train_norm, GlobalBatchNorm1d(WIDTH), inputs)), theirs)
    assert_close(joined(two_ranks.run(train_norm, GlobalBatchNorm1d(WIDTH), inputs)), theirs)


def test_batch_norm_does_not_mind_a_rank_without_rows(one_rank: RankPool, two_ranks: RankPool) -> None:
    inputs = [(x[:3], weight[:3]) for x, weight in some_inputs()]  # a quarter of three rows is none
    theirs = joined(one_rank.run(train_norm, nn.BatchNorm1d(WIDTH), inputs))
    assert_close(joined(two_ranks.run(train_norm, GlobalBatchNorm1d(WIDTH), inputs)), theirs)


class LoopOfNorms(nn.Module):
    """One ``nn.BatchNorm1d`` a domain, which a single row goes through in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(N))

    def copy(self, bank: NormBank) -> LoopOfNorms:
        for name, tensor in bank.row_tensors().items():
            for domain, norm in enumerate(self.norms):
                norm.state_dict()[name].copy_(tensor[domain])
        return self

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for domain, norm in enumerate(self.norms):
            rows = ids == domain
            norm.train(self.training and int(rows.sum()) > 1)
            if rows.any():
                y = torch.where(rows.unsqueeze(1), torch.zeros_like(y).index_put((rows,), norm(x[rows])), y)
        return y

    def stacked(self, name: str) -> Tensor:
        return torch.stack([norm.state_dict(keep_vars=True)[name] for norm in self.norms])


@pytest.mark.parametrize("make", [DomainGroups.from_ids, DomainGroups.from_sorted_ids])
def test_a_norm_bank_is_a_loop_of_batch_norms(make: Callable[[Tensor, int], DomainGroups]) -> None:
    bank = NormBank(N, WIDTH)
    random_state(bank)
    loop = LoopOfNorms().copy(bank)
    for x, weight, ids in with_ids(some_inputs()):
        if make is DomainGroups.from_sorted_ids:
            ids = ids.sort().values
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        for norm in (bank, loop):
            norm.zero_grad()
        before = {name: tensor.clone() for name, tensor in bank.row_tensors().items()}
        groups = make(ids, N)
        y, expected = bank(ours, groups), loop(theirs, ids)
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
        assert_close({"y": y, "x": ours.grad}, {"y": expected, "x": theirs.grad})
        assert_close(bank.row_tensors(), {name: loop.stacked(name) for name in bank.row_tensors()})
        for domain, norm in enumerate(loop.norms):
            for name, parameter in norm.named_parameters():
                wanted = torch.zeros(WIDTH) if parameter.grad is None else parameter.grad
                assert_close({name: bank.get_parameter(name).grad[domain]}, {name: wanted})
            if (ids == domain).sum() < 2:  # one row moves no statistics, nor does none
                for name in ("running_mean", "running_var"):
                    assert torch.equal(before[name][domain], bank.row_tensors()[name][domain])
    assert_close({"y": bank.eval()(x, groups)}, {"y": loop.eval()(x, ids)})
    assert_close(before, {name: before[name] for name in ("weight", "bias")})


class NormBankByIds(NormBank):
    """Groups the rows itself."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, DomainGroups.from_ids(ids, N))


def test_a_norm_bank_on_two_ranks_is_one(one_rank: RankPool, two_ranks: RankPool) -> None:
    inputs = with_ids(some_inputs())
    theirs = joined(one_rank.run(train_norm, NormBankByIds(N, WIDTH), inputs))
    assert_close(joined(two_ranks.run(train_norm, NormBankByIds(N, WIDTH), inputs)), theirs)
    assert theirs["running_mean"].isfinite().all()


def test_the_number_of_operators_of_a_norm_bank_does_not_depend_on_the_number_of_domains() -> None:
    def count(domains: int) -> int:
        bank, x = NormBank(domains, WIDTH), torch.randn(60, WIDTH, requires_grad=True)
        with CountOps() as ops:
            bank(x, DomainGroups.from_ids(torch.arange(60) % domains, domains)).sum().backward()
        return ops.count

    assert 10 < count(2) == count(30)


SIZES = [3, 2]


def domain_norm() -> tuple[nn.BatchNorm1d, DomainNorm]:
    norm = random_state(nn.BatchNorm1d(WIDTH))
    return copy.deepcopy(norm), DomainNorm(norm, SIZES, DomainContext())


def run(norm: DomainNorm, x: Tensor, route: Route, ids: Tensor, division: int = 0) -> Tensor:
    with norm.context.open(DomainState(route, BatchDomains.from_ids(ids, SIZES), division)):
        return norm(x)


def all_combinations() -> Tensor:
    return torch.cartesian_prod(torch.arange(3), torch.arange(2))


def test_a_domain_norm_starts_as_the_norm_it_replaces() -> None:
    plain, norm = domain_norm()
    plain.eval()
    norm.eval()
    x, ids = torch.randn(6, WIDTH), all_combinations()
    for route in Route:
        torch.testing.assert_close(run(norm, x, route, ids), plain(x))
    assert set(plain.state_dict()) <= set(norm.state_dict())


def test_each_combination_has_a_norm_that_starts_as_its_first_divisions() -> None:
    _, norm = domain_norm()
    for bank in (*norm.domains, norm.combinations):
        random_state(bank)
    norm.domains[0].copy_rows({name: t + 1 for name, t in norm.domains[0].row_tensors().items()})
    norm.start_stage(Route.FUSED, 0)
    x, ids = torch.randn(6, WIDTH), all_combinations()
    seen = ids[[0, 0, 3, 3, 5, 5]]  # (0, 0), (1, 1), (2, 1)
    norm.train()
    for module in norm.modules():
        module.requires_grad_(True)
    before = norm.combinations.running_mean.clone()
    run(norm, x, Route.FUSED, seen).square().sum().backward()
    moved = (norm.combinations.running_mean != before).any(1)
    assert moved.tolist() == [True, False, False, True, False, True]  # the last division is the fastest
    assert norm.combinations.weight.grad.any(1).tolist() == moved.tolist()
    assert all(p.grad is None for bank in norm.domains for p in bank.parameters())
    norm.eval()
    fused, first = run(norm, x, Route.FUSED, ids), run(norm, x, Route.DOMAIN, ids, division=0)
    torch.testing.assert_close(fused[~moved], first[~moved])  # a combination never seen keeps its start
    assert not torch.isclose(fused[moved], first[moved]).all(1).any()


def test_one_division_has_no_combinations() -> None:
    norm = DomainNorm(nn.BatchNorm1d(WIDTH), [3], DomainContext())
    assert norm.combinations is None
    with norm.context.open(DomainState(Route.FUSED, BatchDomains.from_ids(torch.tensor([0, 2]), [3]))):
        assert norm.eval()(torch.randn(2, WIDTH)).shape == (2, WIDTH)


class OnBaseRoute(DomainNorm):
    """A domain norm in a model that runs without adapters."""

    def forward(self, input: Tensor) -> Tensor:
        ids = torch.zeros(len(input), 2, dtype=torch.int64)
        with self.context.open(DomainState(Route.BASE, BatchDomains.from_ids(ids, SIZES))):
            return super().forward(input)


def test_a_domain_norms_base_agrees_over_ranks(one_rank: RankPool, two_ranks: RankPool) -> None:
    inputs = some_inputs()
    theirs = joined(one_rank.run(train_norm, nn.BatchNorm1d(WIDTH), inputs))
    ours = joined(two_ranks.run(train_norm, OnBaseRoute(nn.BatchNorm1d(WIDTH), SIZES, DomainContext()), inputs))
    assert_close({name: ours[name] for name in theirs}, theirs)


@pytest.mark.parametrize("route", [Route.DOMAIN, Route.FUSED])
def test_training_leaves_the_base_norm_alone(route: Route) -> None:
    plain, norm = domain_norm()
    run(norm.train(), torch.randn(6, WIDTH), route, all_combinations()).sum().backward()
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert norm.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("domains", [True, False])
def test_a_relu_behind_is_a_relu(domains: bool, frozen: bool, training: bool) -> None:
    torch.manual_seed(0)
    with_relu = random_state(NormBank(N, 40) if domains else GlobalBatchNorm1d(40))
    with_relu.requires_grad_(not frozen).train(training)
    plain = copy.deepcopy(with_relu)
    x, weight = torch.randn(50, 40), torch.randn(50, 40)
    ids = (DomainGroups.from_ids(torch.arange(50) % N, N),) if domains else ()
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, own = with_relu(found, *ids, relu=True), torch.relu(plain(expected, *ids))
    for result in (y, own):
        (result * weight).sum().backward()
    assert 0.2 < float((y == 0).float().mean()) < 0.8
    assert_close({"y": y, "x": found.grad}, {"y": own, "x": expected.grad})
    assert_close(with_relu.state_dict(), plain.state_dict())
    for name, parameter in with_relu.named_parameters():
        theirs = plain.get_parameter(name).grad
        assert (parameter.grad is None) == (theirs is None) == frozen
        if theirs is not None:
            assert_close({name: parameter.grad}, {name: theirs})
