"""The adapted cross net against DCN v2's formula."""

from __future__ import annotations

import torch
from torchrec.modules.crossnet import LowRankCrossNet

from tests.helpers import low_rank_rows, randomise
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.ops.groups import BatchDomains

WIDTH, LAYERS = 7, 3
IDS = torch.tensor([2, 0, 2, 1, 0])


def make() -> tuple[LowRankCrossNet, AdapterCrossNet]:
    torch.manual_seed(0)
    plain = LowRankCrossNet(WIDTH, LAYERS, low_rank=2)
    net = AdapterCrossNet(plain, lambda i, o: LoRABank(3, i, o, 2), DomainContext())
    return plain, net


def run(net: AdapterCrossNet, x: torch.Tensor, route: Route) -> torch.Tensor:
    with net.context.open(DomainState(route, BatchDomains.from_ids(IDS, [3]))):
        return net(x)


def test_new_adapters_and_the_base_route_change_nothing_bitwise() -> None:
    plain, net = make()
    x = torch.randn(len(IDS), WIDTH)
    assert torch.equal(run(net, x, Route.DOMAIN), plain(x))
    randomise(dict(net.adapters.named_parameters()))
    assert torch.equal(run(net, x, Route.BASE), plain(x))
    assert not torch.allclose(run(net, x, Route.DOMAIN), plain(x), atol=1e-2)


def test_each_rows_matrix_is_the_cross_matrix_plus_its_domains() -> None:
    _, net = make()
    randomise(dict(net.named_parameters()))
    x = torch.randn(len(IDS), WIDTH)
    rows = []
    for x0, domain in zip(x, IDS, strict=True):
        xl = x0
        for layer, bank in enumerate(net.adapters):
            matrix = net.W_kernels[layer] @ net.V_kernels[layer] + bank.lora_B[domain] @ bank.lora_A[domain]
            xl = x0 * (matrix @ xl + net.bias[layer].flatten() + bank.bias[domain]) + xl
        rows.append(xl)
    torch.testing.assert_close(run(net, x, Route.DOMAIN), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_base_parameters_keep_their_names() -> None:
    plain, net = make()
    result = net.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    roles = ("lora_A", "lora_B", "bias")
    assert result.missing_keys == [f"adapters.{layer}.{role}" for layer in range(LAYERS) for role in roles]
    assert all(net.get_parameter(name) is parameter for name, parameter in plain.named_parameters())


def test_layers_are_adapted_by_their_own_input() -> None:
    """Only the last layer's adapter: its input is the plain net's output so far."""
    plain, net = make()
    last = net.adapters[-1]
    randomise(dict(last.named_parameters()))
    x = torch.randn(len(IDS), WIDTH)
    shorter = LowRankCrossNet(WIDTH, LAYERS - 1, low_rank=2)
    shorter.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.endswith(f".{LAYERS - 1}")})
    extra = x * low_rank_rows(shorter(x), last.lora_A, last.lora_B, last.bias, IDS)
    torch.testing.assert_close(run(net, x, Route.DOMAIN), plain(x) + extra)
