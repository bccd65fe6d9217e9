"""Putting adapters into a backbone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.helpers import hand_built_dlrm
from torchrec_mdr.adapters import GlobalBatchNorm1d
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.adapters.norm import DomainNorm
from torchrec_mdr.backbones.layers import OverArch
from torchrec_mdr.ops.groups import BatchDomains

IDS = torch.tensor([1, 0, 1])


def make_adapter(layer: int, in_features: int, out_features: int) -> LoRABank:
    return LoRABank(2, in_features, out_features, 1)


def over_arch() -> OverArch:
    torch.manual_seed(0)
    return OverArch(6, [4, 3], dropout=0.5, batch_norm=True)


def test_layers_are_replaced_in_the_models_order() -> None:
    model, seen = over_arch(), []

    def recorded(*layer_and_widths: int) -> LoRABank:
        seen.append(layer_and_widths)
        return make_adapter(*layer_and_widths)

    linears = [layer.linear for layer in model.hidden]
    names = inject(model, ["hidden.1.*near", "hidden.*.linear"], recorded, DomainContext())
    assert names == ["hidden.0.linear", "hidden.1.linear"] and seen == [(0, 6, 4), (1, 4, 3)]
    for layer, linear in zip(model.hidden, linears, strict=True):
        assert type(layer.linear) is AdapterLinear and layer.linear.weight is linear.weight
    assert type(model.output) is nn.Linear


def test_names_of_base_parameters_stay() -> None:
    model, plain = over_arch(), over_arch()
    inject(model, ["hidden.*.linear"], make_adapter, DomainContext(), [2])
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and result.missing_keys
    assert all("adapter" in key or "domains" in key for key in result.missing_keys)


def test_the_layers_own_dropout_moves_before_the_adapters_part() -> None:
    model = over_arch()
    inject(model, ["hidden.*.linear"], make_adapter, DomainContext())
    for layer in model.hidden:
        assert layer.linear.dropout.p == 0.5 and isinstance(layer.dropout, nn.Identity)
    untouched = over_arch()
    inject(untouched, ["output"], make_adapter, DomainContext())
    assert isinstance(untouched.hidden[0].dropout, nn.Dropout)


@pytest.mark.parametrize("training", [True, False])
def test_new_adapters_change_nothing_bitwise_under_the_same_dropout(training: bool) -> None:
    model, plain = over_arch().train(training), over_arch().train(training)
    context = DomainContext()
    inject(model, ["hidden.*.linear"], make_adapter, context)
    x = torch.randn(3, 6)
    for route in (Route.BASE, Route.DOMAIN):
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        with context.open(DomainState(route, BatchDomains.from_ids(IDS, [2]))):
            assert torch.equal(model(x), expected)


def test_norms_are_replaced_where_asked_for() -> None:
    plain, model = over_arch(), over_arch()
    inject(plain, ["hidden.0.linear"], make_adapter, DomainContext())
    assert type(plain.hidden[0].norm) is GlobalBatchNorm1d
    inject(model, ["hidden.0.linear"], make_adapter, DomainContext(), [2, 3])
    assert type(model.hidden[0].norm) is DomainNorm and type(model.hidden[1].norm) is GlobalBatchNorm1d
    assert [bank.num_adapters for bank in model.hidden[0].norm.domains] == [2, 3]
    assert model.hidden[0].norm.combinations.num_adapters == 6


def test_the_cross_net_gets_an_adapter_of_its_own() -> None:
    model = hand_built_dlrm(crossnet=True)
    assert inject(model, ["inter_arch.crossnet"], make_adapter, DomainContext()) == ["inter_arch.crossnet"]
    assert type(model.inter_arch.crossnet) is AdapterCrossNet


def test_layers_are_counted_over_all_targets() -> None:
    model, seen = hand_built_dlrm(crossnet=True), []

    def recorded(*layer_and_widths: int) -> LoRABank:
        seen.append(layer_and_widths)
        return make_adapter(*layer_and_widths)

    inject(model, ["over_arch.model.1", "inter_arch.crossnet", "dense_arch.*._linear"], recorded, DomainContext())
    # in the model's order: dense layers, the cross net's two layers, the score
    assert seen == [(0, 2, 6), (1, 6, 8), (2, 32, 32), (3, 32, 32), (4, 5, 1)]


def test_a_target_that_matches_nothing_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'hidden.9.linear' matches no module.*hidden.0.linear.*output"):
        inject(over_arch(), ["hidden.*.linear", "hidden.9.linear"], make_adapter, DomainContext())


def test_a_target_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="target 'hidden.0' is a HiddenLayer"):
        inject(over_arch(), ["hidden.0"], make_adapter, DomainContext())


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def changed(change: Callable[[OverArch], object]) -> OverArch:
    model = over_arch()
    change(model)
    return model


def share_linear(model: OverArch) -> None:
    model.output = model.hidden[1].linear


def share_dropout(model: OverArch) -> None:
    model.hidden[1].dropout = model.hidden[0].dropout


REFUSED: dict[str, tuple[Callable[[OverArch], object], str]] = {
    "own forward": (lambda m: setattr(m.hidden[1], "linear", Scaled(4, 3)), "hidden.1.linear' is a Scaled with a forw"),
    "set forward": (lambda m: setattr(m.hidden[1].linear, "forward", torch.relu), "hidden.1.linear' is a Linear with"),
    "hook": (lambda m: m.hidden[1].linear.register_forward_hook(print), "'hidden.1.linear' has hooks"),
    "pre-hook": (lambda m: m.hidden[1].linear.register_forward_pre_hook(print), "'hidden.1.linear' has hooks"),
    "parametrized": (lambda m: parametrizations.weight_norm(m.hidden[1].linear), "'hidden.1.linear' is parametrized"),
    "two names": (share_linear, "Linear is shared: it is called 'hidden.1.linear' and 'output'"),
    "one dropout": (share_dropout, "Dropout is shared: it is called 'hidden.0.dropout' and 'hidden.1.dropout'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapted_layer_would_change_is_refused_by_name(case: str) -> None:
    change, sentence = REFUSED[case]
    model = changed(change)
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ValueError, match=sentence) as error:
        inject(model, ["hidden.*.linear"], make_adapter, DomainContext())
    assert "\n" not in str(error.value)
    assert dict(model.named_modules(remove_duplicate=False)) == before, "nothing is changed"


class TwoLayers(nn.Module):
    """Two linear layers with one dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(x).square()))


def test_a_dropout_that_is_not_one_layers_stays_where_it_is() -> None:
    torch.manual_seed(0)
    model, x, context = TwoLayers(), torch.randn(3, 6), DomainContext()
    torch.manual_seed(1)
    expected = model(x)
    inject(model, ["first", "second"], make_adapter, context)
    with context.open(DomainState(Route.DOMAIN, BatchDomains.from_ids(IDS, [2]))):
        torch.manual_seed(1)
        assert torch.equal(model(x), expected)


def test_adapters_lie_where_their_layer_does() -> None:
    with torch.device("meta"):
        model = OverArch(6, [4, 3], batch_norm=True)
    inject(model, ["hidden.*.linear"], make_adapter, DomainContext(), [2, 3])
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
