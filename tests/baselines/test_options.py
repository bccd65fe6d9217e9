"""What the baselines refuse, and where they take their sizes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import hand_built_dlrm, schema_of
from torchrec_mdr.backbones.layers import OverArch
from torchrec_mdr.baselines import PLE, Finetune, Hamur, Mix, MMoE, Plate, SharedBottom, Single, Star
from torchrec_mdr.baselines.over_arch import over_arch_info
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.registry import BACKBONES, METHODS

AGE, GENDER = Division("age", 3), Division("gender", 2)
BASELINES: list[Method] = [
    *(Single(), Mix(), Finetune(), SharedBottom(), MMoE(), PLE(), Star(), Hamur(k=3), Plate()),
]
OF_THE_MLP = [method for method in BASELINES if not isinstance(method, (Single, Mix, Finetune))]


def name_of(method: Method) -> str:
    return METHODS.name_of(type(method))


def mlp(hidden: tuple[int, ...] = (6, 4), **options: Any) -> nn.Module:
    return BACKBONES["mlp"](hidden=hidden, **options).build(schema_of([AGE]), 8)


class Custom(nn.Module):
    """A model of a user's own with an over arch of any kind."""

    adapter_targets = ("over_arch.*",)

    def __init__(self, over_arch: nn.Module | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if over_arch is not None:
            self.over_arch = over_arch


@pytest.mark.parametrize("method", [m for m in BASELINES if not isinstance(m, Mix)], ids=name_of)
def test_one_division(method: Method) -> None:
    message = f"^{type(method).__name__} works along one division, not 2; leave out --auxiliary_division$"
    with pytest.raises(ValueError, match=message):
        MultiDomainModel(mlp(), method, [AGE, GENDER])


def test_mix_takes_any_divisions_and_leaves_the_backbone_as_it_is() -> None:
    backbone = mlp()
    assert MultiDomainModel(backbone, Mix(), [AGE, GENDER]).backbone is backbone


@pytest.mark.parametrize("method", [Single(), Mix(), Finetune()], ids=name_of)
def test_layers_cannot_be_chosen_where_all_are_meant(method: Method) -> None:
    message = f"^{type(method).__name__} takes the backbone as a whole; leave out --target_modules$"
    with pytest.raises(ValueError, match=message):
        MultiDomainModel(mlp(), method, [AGE], target_modules=["over_arch.hidden.0.linear"])


@pytest.mark.parametrize(
    ("over_arch", "targets", "message"),
    [
        (None, ["linear"], "needs a backbone with an MLP named over_arch, and Custom has none"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), ["over_arch.0"], "that are no chain of modules of their own"),
        (OverArch(4, [3, 2]), ["linear"], "has no hidden layer in it that may be adapted"),
    ],
)
def test_an_mlp_is_needed(over_arch: nn.Module | None, targets: list[str], message: str) -> None:
    for method in OF_THE_MLP:
        with pytest.raises(ValueError, match=f"^{type(method).__name__} .*{message}"):
            MultiDomainModel(Custom(copy.deepcopy(over_arch)), method, [AGE], target_modules=targets)


def test_an_mlp_has_to_end_in_one_score() -> None:
    class Two(OverArch):
        def __init__(self) -> None:
            super().__init__(4, [3])
            self.other = nn.Linear(3, 1)

    backbone = Custom(Two())
    with pytest.raises(ValueError, match="^Star needs .* does not end in one layer that scores"):
        over_arch_info(backbone, ["over_arch.hidden.*.linear"], "Star")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMoE(num_experts=0), "num_experts must be at least 1, not 0"),
        (lambda: MMoE(num_expert_layers=0), "num_expert_layers must be at least 1, not 0"),
        (lambda: PLE(num_levels=0), "num_levels must be at least 1, not 0"),
        (lambda: PLE(num_specific_experts=0), "num_specific_experts must be at least 1, not 0"),
        (lambda: PLE(num_shared_experts=0), "num_shared_experts must be at least 1, not 0"),
        (lambda: Star(auxiliary_hidden=0), "auxiliary_hidden must be at least 1, not 0"),
        (lambda: Hamur(k=0), "k must be at least 1, not 0"),
        (lambda: Hamur(bottleneck=0), "bottleneck must be at least 1, not 0"),
        (lambda: Hamur(hyper_hidden=0), "hyper_hidden must be at least 1, not 0"),
        (lambda: Plate(num_meta=0), "num_meta must be at least 1, not 0"),
        (lambda: Plate(temperature=0.0), "temperature must be positive, not 0.0"),
        (lambda: Plate(user_features=[]), "user_features must name at least one sparse feature"),
    ],
)
def test_impossible_options(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            SharedBottom(num_shared_layers=3),
            "num_shared_layers is 3, but the backbone has 2 hidden layers; choose at most",
        ),
        (SharedBottom(num_shared_layers=-1), "num_shared_layers is -1, but the backbone has 2 hidden layers"),
        (MMoE(num_expert_layers=3), "num_expert_layers is 3, but the backbone has 2 hidden layers"),
        (PLE(num_levels=3), "num_levels is 3, but the backbone has 2 hidden layers"),
        (Plate(user_features=["z"]), "user_features names 'z', which is no sparse feature; they are a, b, c"),
    ],
)
def test_options_that_do_not_fit_the_backbone(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiDomainModel(mlp(), method, [AGE])


def test_plate_needs_a_sparse_arch() -> None:
    with pytest.raises(ValueError, match="^Plate needs the users' embeddings, and Custom has no torchrec"):
        MultiDomainModel(Custom(OverArch(4, [3])), Plate(), [AGE], target_modules=["over_arch.hidden.*.linear"])


@pytest.mark.parametrize("method", [Single(), Finetune()], ids=name_of)
def test_whole_copies_need_layers_that_can_be_copied(method: Method) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="Scaled has a parameter 'scale' outside its layers"):
        MultiDomainModel(Scaled(), method, [AGE])
    with pytest.raises(ValueError, match="a InstanceNorm1d cannot be had once per domain: it keeps state"):
        MultiDomainModel(nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), method, [AGE])


def test_sizes_follow_the_backbone() -> None:
    info = over_arch_info(mlp((6, 4), dropout=0.25, batch_norm=True), ["over_arch.hidden.*.linear"], "star")
    assert info.in_features == 26 and [layer.linear.out_features for layer in info.hidden] == [6, 4]
    assert [layer.dropout for layer in info.hidden] == [0.25, 0.25]
    assert all(layer.norm is not None for layer in info.hidden) and info.output.in_features == 4
    dlrm = over_arch_info(hand_built_dlrm(), ["over_arch.model.0._mlp.*._linear"], "star")
    assert [layer.linear.out_features for layer in dlrm.hidden] == [10, 5] and dlrm.output.in_features == 5
    assert [(layer.dropout, layer.norm) for layer in dlrm.hidden] == [(0.0, None)] * 2


def test_numbers_of_parameters() -> None:
    """With 110 inputs, hidden layers of 256 and 128 with batch norm, and three domains."""
    counts = {}
    for method in BASELINES:
        schema = schema_of([AGE])
        backbone = BACKBONES["mlp"](hidden=(256, 128), batch_norm=True).build(schema, 36)
        assert backbone.over_arch.hidden[0].linear.in_features == 110
        model = MultiDomainModel(backbone, method, [AGE])
        groups = parameter_groups(model)
        counts[name_of(method)] = {
            group: sum(p.numel() for name, p in model.named_parameters() if groups[name].value == group)
            for group in ("backbone", "adapters")
        }
    first, second, score = 110 * 256 + 3 * 256, 256 * 128 + 3 * 128, 128 + 1
    whole, tower = first + second + score, second + score
    assert counts["mix"] == {"backbone": whole, "adapters": 0}
    assert counts["single"] == {"backbone": 3 * whole, "adapters": 0}
    assert counts["finetune"] == {"backbone": whole, "adapters": 3 * whole}
    assert counts["shared_bottom"] == {"backbone": first + 3 * tower, "adapters": 0}
    assert counts["mmoe"] == {"backbone": 3 * first + 3 * 3 * 110 + 3 * tower, "adapters": 0}
    gates = 3 * 2 * 110 + 4 * 110 + 3 * 2 * 256
    assert counts["ple"] == {"backbone": 4 * first + gates + 4 * second + 3 * score, "adapters": 0}
    linear = 110 * 256 + 256 + 256 * 128 + 128 + score
    norms = 2 * (110 + 256 + 128)
    auxiliary = 3 * 8 + (8 + 110) * 32 + 32 + 33
    assert counts["star"] == {"backbone": 4 * (linear + norms) + auxiliary, "adapters": 0}
    hyper = 110 * 64 + 3 * 64 + 64 * 9 + 3 * 9
    adapter = 2 * 3 * (128 + 32) + 128 + 32 + 3 * 2 * 128
    assert counts["hamur"] == {"backbone": 3 * whole + hyper + adapter, "adapters": 0}
    prompts = 3 * 36 + 10 * 36 + 36 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    assert counts["plate"] == {"backbone": whole, "adapters": prompts + 110 * 256 + 256 + 72 * 256}


def test_banks_draw_each_domains_layer_anew() -> None:
    torch.manual_seed(0)
    towers = MultiDomainModel(mlp((64, 48)), SharedBottom(), [AGE]).backbone.over_arch.towers
    weight: Tensor = towers.hidden[0].linear.weight.detach()
    assert weight.abs().max() <= 64**-0.5 and weight.std() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("method", [Mix(), Finetune(), Finetune(embeddings=False), Plate()])
@pytest.mark.parametrize("backbone", ["dcn", "fibinet", "dlrm_dcn"])
def test_the_pretrained_backbones_names_stay(method: Method, backbone: str) -> None:
    plain, wrapped = (BACKBONES[backbone](hidden=(6, 4)).build(schema_of([AGE]), 8) for _ in range(2))
    model = MultiDomainModel(wrapped, method, [AGE])
    names = set(plain.state_dict())
    assert names <= set(model.backbone.state_dict())
    groups = parameter_groups(model)
    assert {groups[f"backbone.{name}"].value for name in names} == {"backbone", "embeddings"}
    others = {group.value for name, group in groups.items() if name.removeprefix("backbone.") not in names}
    assert others <= {"adapters", "backbone"}  # buffers that no state_dict holds are the backbone's
    copy.deepcopy(model)
