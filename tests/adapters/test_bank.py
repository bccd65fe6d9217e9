"""Banks of low-rank adapters."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import low_rank_rows, randomise
from torchrec_mdr.adapters.bank import LayerAdapter, LoRABank
from torchrec_mdr.ops.groups import DomainGroups


def test_a_new_bank_adds_zero_and_can_learn() -> None:
    bank = LoRABank(4, 20, 6, 3)
    groups = DomainGroups.from_ids(torch.randint(4, (9,)), 4)
    assert not bank(torch.randn(9, 20), groups).any()
    bound = (6 / 23) ** 0.5
    assert bank.lora_A.abs().max() <= bound and bank.lora_A.abs().max() > 0.9 * bound
    bank(torch.randn(9, 20), groups).sum().backward()
    assert bank.Bb.grad[:, :-1].any() and bank.Bb.grad[:, -1].any()  # A = B = 0 would be a stationary point


def test_parameters_are_counted_without_padding() -> None:
    assert sum(p.numel() for p in LoRABank(3, 113, 5, 7).parameters()) == 3 * (7 * 113 + 5 * 7 + 5)


def test_groups_may_count_from_a_later_adapter() -> None:
    torch.manual_seed(0)
    bank = LoRABank(6, 5, 4, 2)
    randomise(dict(bank.named_parameters()))
    x, ids, base = torch.randn(8, 5), torch.randint(3, (8,)), torch.randn(8, 4)
    groups = DomainGroups.from_ids(ids, 3)
    torch.testing.assert_close(bank(x, groups, first=3), low_rank_rows(x, bank.lora_A, bank.lora_B, bank.bias, ids + 3))
    torch.testing.assert_close(
        bank(x, groups, base=base), base + low_rank_rows(x, bank.lora_A, bank.lora_B, bank.bias, ids)
    )


def test_rows_of_absent_domains_get_no_gradient() -> None:
    torch.manual_seed(0)
    bank = LoRABank(4, 5, 4, 2)
    randomise(dict(bank.named_parameters()))
    bank(torch.randn(6, 5), DomainGroups.from_ids(torch.tensor([1, 3, 1, 1, 3, 3]), 4)).sum().backward()
    for parameter in bank.parameters():
        assert not parameter.grad[[0, 2]].any() and parameter.grad[[1, 3]].flatten(1).any(1).all()


@pytest.mark.parametrize("sizes", [(0, 5, 4, 2), (3, 0, 4, 2), (3, 5, 0, 2), (3, 5, 4, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="positive|at least one adapter"):
        LoRABank(*sizes)


def test_groups_of_another_division_are_refused() -> None:
    with pytest.raises(ValueError, match="the groups name 4 adapters, the bank has 3"):
        LoRABank(3, 5, 4, 2)(torch.randn(1, 5), DomainGroups.from_ids(torch.tensor([0]), 4))


def test_an_adapter_says_how_it_adapts() -> None:
    with pytest.raises(NotImplementedError, match="LayerAdapter does not say"):
        LayerAdapter().adapt(torch.zeros(1), torch.zeros(1), None)
