"""Banks of low-rank adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

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
    assert bank.lora_B.grad.any() and bank.bias.grad.any()  # A = B = 0 would be a stationary point


def test_parameters_are_counted_without_padding() -> None:
    assert sum(p.numel() for p in LoRABank(3, 113, 5, 7).parameters()) == 3 * (7 * 113 + 5 * 7 + 5)


def test_a_domain_may_have_several_experts() -> None:
    torch.manual_seed(0)
    bank = LoRABank(6, 5, 4, 2)
    randomise(dict(bank.named_parameters()))
    x, ids, base = torch.randn(8, 5), torch.randint(3, (8,)), torch.randn(8, 4)
    groups = DomainGroups.from_ids(ids, 3)
    for expert_index in (0, 1):
        part = low_rank_rows(x, bank.lora_A, bank.lora_B, bank.bias, ids + 3 * expert_index)
        torch.testing.assert_close(bank(x, groups, expert_index=expert_index), part)
        torch.testing.assert_close(bank(x, groups, base, expert_index), base + part)


def test_rows_of_absent_domains_get_no_gradient() -> None:
    torch.manual_seed(0)
    bank = LoRABank(4, 5, 4, 2)
    randomise(dict(bank.named_parameters()))
    bank(torch.randn(6, 5), DomainGroups.from_ids(torch.tensor([1, 3, 1, 1, 3, 3]), 4)).sum().backward()
    for parameter in bank.parameters():
        assert not parameter.grad[[0, 2]].any() and parameter.grad[[1, 3]].flatten(1).any(1).all()


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="a bank needs at least one adapter, not 0"):
        LoRABank(0, 5, 4, 2)
    for widths in ((0, 4, 2), (5, 0, 2), (5, 4, 0)):
        named = "in_features {}, out_features {} and rank {} must be positive".format(*widths)
        with pytest.raises(ValueError, match=named):
            LoRABank(3, *widths)


def test_groups_of_another_division_are_refused() -> None:
    with pytest.raises(ValueError, match="the groups name 4 adapters, the bank has 3"):
        LoRABank(3, 5, 4, 2)(torch.randn(1, 5), DomainGroups.from_ids(torch.tensor([0]), 4))
    with pytest.raises(ValueError, match="the groups name 6 adapters, the bank has 3"):  # an expert that is not there
        LoRABank(3, 5, 4, 2)(torch.randn(1, 5), DomainGroups.from_ids(torch.tensor([0]), 3), expert_index=1)


def test_an_adapter_has_to_say_how_it_adapts() -> None:
    with pytest.raises(NotImplementedError, match="LayerAdapter does not say how it adapts a layer"):
        LayerAdapter().adapt(torch.zeros(1), torch.zeros(1), None)


def saved_and_loaded(bank: LoRABank) -> LoRABank:
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    loaded = LoRABank(bank.num_adapters, bank.in_features, bank.out_features, bank.rank)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def load_into_empty(bank: LoRABank) -> LoRABank:
    empty = copy.deepcopy(bank).to("meta").to_empty(device="cpu")
    empty.load_state_dict({name: tensor.contiguous() for name, tensor in bank.state_dict().items()})
    return empty


COPIES: dict[str, Callable[[LoRABank], LoRABank]] = {
    "new": lambda bank: bank,
    "deepcopy": copy.deepcopy,
    "pickled": lambda bank: pickle.loads(pickle.dumps(bank)),
    "other type and back": lambda bank: bank.to(torch.float64).to(torch.float32),
    "saved and loaded": saved_and_loaded,
    "loaded into empty tensors": load_into_empty,
}


@pytest.mark.parametrize("name", COPIES)
def test_tensors_keep_names_shapes_values_and_their_order_in_memory(name: str) -> None:
    bank = LoRABank(3, 8, 4, 2)
    randomise(dict(bank.named_parameters()))
    before = {key: tensor.clone() for key, tensor in bank.state_dict().items()}
    copied = COPIES[name](bank)
    shapes = {"lora_A": (3, 2, 8), "lora_B": (3, 4, 2), "bias": (3, 4)}
    assert {key: tuple(tensor.shape) for key, tensor in copied.state_dict().items()} == shapes
    assert all(torch.equal(tensor, before[key]) for key, tensor in copied.state_dict().items())
    assert copied.lora_A.is_contiguous() and copied.lora_B.mT.is_contiguous() and copied.bias.is_contiguous()


def test_what_is_applied_after_a_as_one_table() -> None:
    bank = LoRABank(3, 8, 4, 2)
    randomise(dict(bank.named_parameters()))
    table = bank.up_table()
    assert table.shape == (3, 3, 4)
    for domain in range(3):
        assert torch.equal(table[domain, :2], bank.lora_B[domain].T)
        assert torch.equal(table[domain, 2], bank.bias[domain])


def test_gradients_of_a_bias_come_with_those_of_its_matrix() -> None:
    bank = LoRABank(3, 8, 4, 2)
    pairs = [(id(table), id(bias)) for table, bias in bank.factored_tables()]
    assert pairs == [(id(bank.lora_A), id(None)), (id(bank.lora_B), id(bank.bias))]
