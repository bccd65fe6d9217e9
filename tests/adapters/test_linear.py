"""A linear layer with adapters beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import low_rank_rows, randomise
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

IDS = torch.tensor([2, 0, 2, 1, 0, 0, 2])


def make(dropout: float = 0.0, bias: bool = True) -> tuple[nn.Linear, LoRABank, AdapterLinear]:
    torch.manual_seed(0)
    linear, bank = nn.Linear(9, 6, bias=bias), LoRABank(3, 9, 6, 2)
    randomise(dict(bank.named_parameters()))
    return linear, bank, AdapterLinear.from_linear(linear, bank, dropout, DomainContext())


def state_of(route: Route) -> DomainState:
    return DomainState(route, BatchDomains.from_ids(IDS, [3]))


def test_base_parameters_are_shared_and_keep_their_names() -> None:
    linear, bank, layer = make()
    assert layer.weight is linear.weight and layer.bias is linear.bias
    own = [f"adapter.{name}" for name in ("lora_A", "lora_B", "bias")]
    assert list(layer.state_dict()) == ["weight", "bias", *own]
    result = layer.load_state_dict(nn.Linear(9, 6).state_dict(), strict=False)
    assert result.missing_keys == own and not result.unexpected_keys


@pytest.mark.parametrize("bias", [True, False])
def test_routes(bias: bool) -> None:
    linear, bank, layer = make(bias=bias)
    x = torch.randn(len(IDS), 9)
    with layer.context.open(state_of(Route.BASE)):
        assert torch.equal(layer(x), linear(x))
    expected = linear(x) + low_rank_rows(x, bank.lora_A, bank.lora_B, bank.bias, IDS)
    with layer.context.open(state_of(Route.DOMAIN)):
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.adapted(x, DomainGroups.from_ids(IDS, 3)), expected)


def test_dropout_acts_on_the_base_output_alone() -> None:
    linear, bank, layer = make(dropout=0.5)
    x = torch.randn(len(IDS), 9)
    part = low_rank_rows(x, bank.lora_A, bank.lora_B, bank.bias, IDS)
    with layer.context.open(state_of(Route.DOMAIN)):
        torch.manual_seed(1)
        trained = layer(x)
        layer.eval()
        torch.testing.assert_close(layer(x), linear(x) + part)
    torch.manual_seed(1)
    dropped = FastDropout(0.5)(linear(x))
    assert (dropped == 0).any()
    torch.testing.assert_close(trained, dropped + part)


def test_reading_the_domains_outside_a_pass_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside its MultiDomainModel"):
        make()[2](torch.randn(2, 9))


@pytest.mark.parametrize("widths", [(8, 6), (9, 5)])
def test_a_bank_of_other_widths_is_refused(widths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{widths[0]} -> {widths[1]} cannot stand beside a layer 9 -> 6"):
        AdapterLinear.from_linear(nn.Linear(9, 6), LoRABank(3, *widths, 2))
