"""Adam on banks against torch.optim.Adam."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.cases import crossed
from tests.helpers import randomise
from tests.ranks import RankPool
from torchrec_mdr.adapters.bank import Bank, LoRABank
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups
from torchrec_mdr.ops.low_rank import FactorList
from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.optim.stage_optimizer import StageOptimizer

N = 4
NAMES = ("lora_A", "lora_B", "bias")
ALL = [torch.ones(N, dtype=torch.bool)] * 5
SOME = [torch.tensor(mask, dtype=torch.bool) for mask in ([1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1])]


def make_bank(frozen_up: bool = False) -> LoRABank:
    bank = LoRABank(N, 5, 4, 2)
    randomise(dict(bank.named_parameters()))
    for parameter in (bank.lora_B, bank.bias):
        parameter.requires_grad_(not frozen_up)
    return bank


def run(bank: LoRABank, masks: list[Tensor], frozen: dict[int, Tensor], **options: float) -> BankAdam:
    """Steps with random gradients, which are zero for rows that take no part."""
    optimizer = BankAdam([bank], lr=0.01, **options)
    for step, mask in enumerate(masks):
        if step in frozen:
            optimizer.freeze(bank, frozen[step])
        for gradient, parameter in zip(gradients(bank, step), bank.parameters(), strict=True):
            parameter.grad = gradient * mask.view(-1, *[1] * (gradient.dim() - 1))
        optimizer.step()
    return optimizer


def gradients(bank: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 10.0**-step for p in bank.parameters()]


def adam_row(bank: LoRABank, row: int, steps: list[int], **options: float) -> list[Tensor]:
    """One row of a bank, trained by torch.optim.Adam in some of the steps."""
    parameters = [nn.Parameter(p.detach()[row].clone()) for p in bank.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01, **options)
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(bank, step), strict=True):
            parameter.grad = gradient[row]
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("masks", [ALL, SOME], ids=["all", "some"])
def test_each_row_is_adam_on_the_steps_that_it_is_present_in(masks: list[Tensor], weight_decay: float) -> None:
    bank, start = make_bank(), make_bank()
    optimizer = run(bank, masks, {}, weight_decay=weight_decay)
    for row in range(N):
        steps = [step for step, mask in enumerate(masks) if mask[row]]
        expected = adam_row(start, row, steps, weight_decay=weight_decay)
        for parameter, origin, wanted in zip(bank.parameters(), start.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter[row].detach(), wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(parameter[row], origin[row]) == (not steps)
            assert optimizer.state[parameter]["step"][row] == len(steps)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_many_pieces_move_as_adam_moves_them(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    bank = LoRABank(3, 5000, 7, 2)
    start = {name: p.detach().clone() for name, p in bank.named_parameters()}
    run(bank, [torch.tensor([True, False, True])], {}, weight_decay=0.1)
    torch.set_num_threads(before)
    for (name, parameter), gradient in zip(bank.named_parameters(), gradients(bank, 0), strict=True):
        wanted = nn.Parameter(start[name].clone())
        wanted.grad = gradient
        torch.optim.Adam([wanted], lr=0.01, weight_decay=0.1).step()
        torch.testing.assert_close(parameter[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter[1], start[name][1])


def test_the_path_for_accelerators_gives_the_same() -> None:
    """There all rows are computed, since picking rows would wait for the device."""
    picked, masked = make_bank(), make_bank()
    run(picked, SOME, {}, weight_decay=0.1)
    states: dict[str, dict[str, Tensor]] = {}
    group = {"betas": (0.9, 0.999), "eps": 1e-8, "lr": 0.01, "weight_decay": 0.1}
    for step, mask in enumerate(SOME):
        for (name, parameter), gradient in zip(masked.named_parameters(), gradients(masked, step), strict=True):
            zeros = {"step": torch.zeros(N), "exp_avg": torch.zeros_like(parameter)}
            state = states.setdefault(name, {**zeros, "exp_avg_sq": torch.zeros_like(parameter)})
            with torch.no_grad():
                BankAdam._update_all(parameter, gradient, state, group, mask)
    for ours, theirs in zip(masked.parameters(), picked.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(masked.lora_A[2], make_bank().lora_A[2])


def test_frozen_rows_and_frozen_parameters_do_not_move() -> None:
    bank, start = make_bank(frozen_up=True), make_bank()
    optimizer = run(bank, ALL, {2: torch.tensor([True, False, False, False])})
    for parameter, origin in ((bank.lora_B, start.lora_B), (bank.bias, start.bias)):
        assert torch.equal(parameter, origin) and parameter not in optimizer.state
    assert optimizer.state[bank.lora_A]["step"].tolist() == [2, 5, 5, 5]
    early = make_bank(frozen_up=True)
    run(early, ALL[:2], {})
    assert torch.equal(bank.lora_A[0], early.lora_A[0]) and not torch.equal(bank.lora_A[1], early.lora_A[1])


def train(
    factored: bool, num_adapters: int, sizes: list[int], kind: str, uses: int, weight_decay: float
) -> dict[str, Tensor]:
    """What steps from real gradients make of a bank, with its optimizer state."""
    torch.manual_seed(0)
    bank = LoRABank(num_adapters, *sizes)
    randomise(dict(bank.named_parameters()))
    used = torch.arange(num_adapters) != 1
    optimizer = BankAdam([bank], lr=0.01, weight_decay=weight_decay, fused=factored)
    optimizer.freeze(bank, torch.arange(num_adapters) == 2)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(num_adapters, (200,), generator=generator)
        ids[ids == 1] = 0
        optimizer.zero_grad()
        for _ in range(uses):
            x = torch.randn(200, sizes[0], generator=generator)
            if kind == "combinations":  # several groups an adapter: no factors
                both = torch.stack([torch.arange(200) // 50, ids], 1)
                both = both[(both @ torch.tensor([num_adapters, 1])).argsort()]
                groups = BatchDomains.from_sorted(both, (4, num_adapters)).groups[1]
            elif kind == "sorted":
                groups = DomainGroups.from_sorted_ids(ids.sort().values, num_adapters)
            else:
                groups = DomainGroups.from_ids(ids, num_adapters)
            y = bank(x, groups)
            (y * torch.randn(y.shape, generator=generator)).sum().backward()
        if uses == 2:  # as other uses of a parameter would
            (bank.lora_A[used].sum() + 2 * bank.lora_B[used].square().sum() + 3 * bank.bias[used].sum()).backward()
        whole = uses == 0 or (factored and kind != "combinations" and uses == 1)
        assert all((parameter.grad is None) == whole for parameter in bank.parameters())
        optimizer.step()
    result = {name: parameter.detach() for name, parameter in bank.named_parameters()}
    for name, parameter in bank.named_parameters():
        result |= {f"{name}.{role}": value for role, value in optimizer.state[parameter].items()}
    return result


@crossed(
    sizes=[(5, 37, 300, 3), (40, 5, 130, 7), (3, 1, 2, 1)],
    kind=["sorted", "unsorted", "combinations"],
    uses=[1, 2],
    weight_decay=[0.0, 0.1],
    threads=[1, 3],
)
def test_factors_of_gradients_are_the_gradients(
    sizes: tuple[int, ...], kind: str, uses: int, weight_decay: float, threads: int
) -> None:
    num_adapters, *widths = sizes
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours = train(True, num_adapters, widths, kind, uses, weight_decay)
    theirs = train(False, num_adapters, widths, kind, uses, weight_decay)
    torch.set_num_threads(before)
    start = train(True, num_adapters, widths, kind, 0, weight_decay)
    for name, value in theirs.items():
        # a sum over rows may end near zero, and is as exact as its largest part
        atol = 1e-6 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    for name in NAMES:
        moved = (theirs[name] != start[name]).flatten(1).any(1)
        assert not moved[1:3].any() and moved[0] and moved[3:].any() == (num_adapters > 3)
        assert theirs[f"{name}.step"].tolist()[:3] == [3.0, 0.0, 0.0]


def test_gradients_are_back_where_the_optimizer_is_gone() -> None:
    bank = make_bank()
    optimizer = BankAdam([bank], lr=0.01, fused=True)
    groups = DomainGroups.from_ids(torch.arange(6) % N, N)
    bank(torch.randn(6, 5), groups).sum().backward()
    assert bank.lora_A.grad is None and len(FactorList.of(bank.lora_A) or []) == 1
    del optimizer
    gc.collect()
    bank(torch.randn(6, 5), groups).sum().backward()
    assert bank.lora_A.grad is not None and FactorList.of(bank.lora_A) is None


@pytest.mark.parametrize("frozen", ["lora_B", "bias"])
def test_a_matrix_may_train_without_its_bias_and_a_bias_without_its_matrix(frozen: str) -> None:
    bank, plain = make_bank(), make_bank()
    for one in (bank, plain):
        one.get_parameter(frozen).requires_grad_(False)
    ours = BankAdam([bank], lr=0.01, fused=True)
    theirs = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    groups = DomainGroups.from_ids(torch.arange(12) % N, N)
    for step in range(3):
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        for one, optimizer in ((bank, ours), (plain, theirs)):
            optimizer.zero_grad()
            one(x, groups).square().sum().backward()
            optimizer.step()
    for name, parameter in bank.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter, make_bank().get_parameter(name)) == (name == frozen)


def test_zero_grad_forgets_factors() -> None:
    bank = make_bank()
    optimizer = BankAdam([bank], lr=0.01, fused=True)
    bank(torch.randn(6, 5), DomainGroups.from_ids(torch.arange(6) % N, N)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(bank.lora_A, make_bank().lora_A) and bank.lora_A not in optimizer.state


@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_all_micro_batches_move_and_a_pass_without_gradients_changes_nothing(fused: bool) -> None:
    """What took part is told by backward passes; between them may lie forward passes of other rows."""
    bank, plain = make_bank(), make_bank()
    ours, theirs = BankAdam([bank], lr=0.01, fused=fused), torch.optim.Adam(plain.parameters(), lr=0.01)
    for step in range(3):
        for one, optimizer in ((bank, ours), (plain, theirs)):
            optimizer.zero_grad()
            for domain in (0, 2):
                x = torch.randn(5, 5, generator=torch.Generator().manual_seed(10 * step + domain))
                one(x, DomainGroups.from_ids(torch.full((5,), domain), N)).square().sum().backward()
            with torch.no_grad():
                one(torch.randn(3, 5), DomainGroups.from_ids(torch.full((3,), 1), N))
            optimizer.step()
    for name, parameter in bank.named_parameters():
        torch.testing.assert_close(parameter[[0, 2]], plain.get_parameter(name)[[0, 2]], rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter[[1, 3]], make_bank().get_parameter(name)[[1, 3]])


def test_gradients_are_where_everybody_looks_for_them() -> None:
    """Clipping, hooks and a gradient scaler see what they see of any module."""
    bank = make_bank()
    optimizer = BankAdam([bank], lr=0.01)
    groups, seen = DomainGroups.from_ids(torch.arange(8) % N, N), []
    bank.lora_A.register_hook(lambda gradient: seen.append(float(gradient.norm())))
    bank(torch.randn(8, 5), groups).square().sum().backward()
    before = torch.nn.utils.clip_grad_norm_(bank.parameters(), 0.1)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in bank.parameters()])
    assert before > 0.1 >= after - 1e-6 and seen
    bank.lora_B.grad.fill_(float("inf"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert not optimizer.state, "a step with infinite gradients is skipped"


def gradients_of_both_ranks() -> tuple[Tensor, Tensor]:
    """Row r gets its rows on rank r alone."""
    bank = make_bank()
    parallel = nn.parallel.DistributedDataParallel(bank)
    optimizer = BankAdam([bank], lr=0.01, fused=True)
    ids = torch.full((6,), dist.get_rank())
    parallel(torch.randn(6, 5), DomainGroups.from_ids(ids, N)).square().sum().backward()
    optimizer.step()
    return bank.lora_A.detach(), (bank.lora_A != make_bank().lora_A).flatten(1).any(1)


def test_rows_that_take_part_on_any_rank_move_on_all(two_ranks: RankPool) -> None:
    (one, moved), (other, _) = two_ranks.run(gradients_of_both_ranks)
    assert moved.tolist() == [True, True, False, False] and torch.equal(one, other)


def test_a_closure_is_not_taken() -> None:
    with pytest.raises(AssertionError, match="closure"):
        BankAdam([Bank(1)], lr=0.1).step(lambda: 0.0)


def test_the_state_goes_out_and_in_by_name() -> None:
    def make(bank: LoRABank, masks: list[Tensor]) -> StageOptimizer:
        names = {parameter: f"layer.{name}" for name, parameter in bank.named_parameters()}
        return StageOptimizer({"banks": run(bank, masks, {})}, names)

    bank, other = make_bank(), make_bank()
    optimizer = make(bank, SOME)
    tensors = optimizer.tensors()
    roles = ("step", "exp_avg", "exp_avg_sq")
    assert set(tensors) == {f"banks/layer.{name}/{role}" for name in NAMES for role in roles}
    fresh = make(other, [])
    fresh.restore({name: tensor.clone() for name, tensor in tensors.items()})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in fresh.tensors().items())
    optimizer.zero_grad()
    assert bank.lora_A.grad is None


@pytest.mark.parametrize("sizes", [(N, 5, 4, 2), (1, 5, 4, 2), (N, 5, 1, 2), (N, 5, 4, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("factored", [True, False])
def test_after_a_restart_moments_lie_as_their_parameter_and_steps_are_the_same_bitwise(
    factored: bool, sizes: tuple[int, ...]
) -> None:
    def make() -> tuple[LoRABank, StageOptimizer]:
        bank = LoRABank(*sizes)
        randomise(dict(bank.named_parameters()))
        optimizer = BankAdam([bank], lr=0.01, weight_decay=0.1, fused=factored)
        return bank, StageOptimizer({"banks": optimizer}, {p: name for name, p in bank.named_parameters()})

    def train(bank: LoRABank, optimizer: StageOptimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(30, sizes[1], generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            bank(x, DomainGroups.from_ids((torch.arange(30) * step) % sizes[0], sizes[0])).square().sum().backward()
            optimizer.step()

    (whole, once), (first, before), (second, after) = make(), make(), make()
    train(whole, once, range(1, 6))
    train(first, before, range(1, 4))
    second.load_state_dict(first.state_dict())
    # as they come from a checkpoint: row by row, whatever their parameter's order
    after.restore(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in before.tensors().items()}
    )
    (adam,) = after.by_name.values()
    for parameter in second.parameters():
        for role in ("exp_avg", "exp_avg_sq"):
            assert adam.state[parameter][role].stride() == parameter.stride()
            assert adam.state[parameter][role].any()
    train(second, after, range(4, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert not torch.equal(tensor, first.state_dict()[name]), name
    assert all(torch.equal(tensor, after.tensors()[name]) for name, tensor in once.tensors().items())
