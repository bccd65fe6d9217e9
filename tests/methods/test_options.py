"""What methods refuse, their ranks, their sizes and their stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_mdr.adapters.bank import LoRABank, ParameterGroup
from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.backbones.layers import OverArch
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.registry import METHODS

AGE3, GENDER = Division("age3", 3), Division("gender", 2)
HIDDEN = (256, 128, 6)


def wrapped(method: Method, divisions: tuple[Division, ...], in_features: int = 113) -> nn.Module:
    model = OverArch(in_features, HIDDEN, batch_norm=True)
    return method.wrap(model, ["hidden.*.linear"], divisions, DomainContext())


def ranks(method: Method, divisions: tuple[Division, ...]) -> list[int]:
    return [bank.rank for bank in wrapped(method, divisions).modules() if isinstance(bank, LoRABank)]


@pytest.mark.parametrize("kind", [MLoRA, MoEMLoRA])
def test_the_rank_follows_alpha_unless_it_is_given(kind: type[Method]) -> None:
    assert ranks(kind(alpha=16), (AGE3,)) == [16, 8, 1]
    assert ranks(kind(alpha=100), (AGE3,)) == [2, 1, 1]
    assert ranks(kind(alpha=16, rank=3), (AGE3,)) == [3, 3, 3]
    assert ranks(kind(rank=[5, 4, 3]), (AGE3,)) == [5, 4, 3]


def test_ranks_of_multilora() -> None:
    assert ranks(MultiLoRA(), (AGE3, GENDER)) == [8] * 6
    assert ranks(MultiLoRA(rank=[8, 4, 2]), (AGE3, GENDER)) == [8, 8, 4, 4, 2, 2]
    assert ranks(SingleLoRA(rank=[8, 4, 2]), (AGE3,)) == [8, 4, 2]


@pytest.mark.parametrize(
    ("method", "divisions", "message"),
    [
        (MLoRA(rank=0), (AGE3,), "rank must be at least 1, not 0"),
        (MLoRA(rank=[4, 4]), (AGE3,), "rank names 2 layers, but the backbone has more"),
        (MultiLoRA(rank=[4, 0, 4]), (AGE3, GENDER), "rank must be at least 1, not 0"),
    ],
)
def test_methods_that_do_not_fit_are_refused(method: Method, divisions: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(method, divisions)


@pytest.mark.parametrize(
    ("method", "divisions", "message"),
    [
        (MLoRA(), (AGE3, GENDER), "MLoRA works along one division, not 2; leave out --auxiliary_division"),
        (MoEMLoRA(), (AGE3, GENDER), "MoEMLoRA works along one division, not 2; leave out --auxiliary_division"),
        (SingleLoRA(), (AGE3, GENDER), "SingleLoRA works along one division, not 2; leave out --auxiliary_division"),
        (MultiLoRA(), (AGE3,), "MultiLoRA needs 2 divisions or more, not 1; add --auxiliary_division"),
    ],
)
def test_divisions_that_do_not_fit_are_refused(method: Method, divisions: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MultiDomainModel(OverArch(4, [3]), method, divisions)
    method.check_divisions((AGE3, GENDER)[: 3 - len(divisions)])


@pytest.mark.parametrize(("kind", "option"), [(MLoRA, "alpha"), (MoEMLoRA, "alpha"), (MoEMLoRA, "experts_per_domain")])
def test_options_below_one_are_refused(kind: type[Method], option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, not 0"):
        kind(**{option: 0})


def test_a_top_k_gate_has_room_for_a_domains_own_experts() -> None:
    with pytest.raises(ValueError, match="top_k is 2, and must be 3 or more: each row goes through its domain's own"):
        MoEMLoRA(experts_per_domain=3, top_k=2)


def test_parameters_of_multilora_are_those_of_its_table_7() -> None:
    """Input width 113 = 7 features x 16 + age, hidden [256, 128], r 8: of one domain, and of the fusion."""
    model = MultiLoRA(rank=8).wrap(
        OverArch(113, (256, 128), batch_norm=True), ["hidden.*.linear"], (AGE3, GENDER), DomainContext()
    )
    groups = parameter_groups(model)
    base = sum(p.numel() for n, p in model.named_parameters() if groups[n] is ParameterGroup.BACKBONE)
    assert base == 62_977  # feature interaction, norms and output
    for division in (0, 1):
        banks = [layer.linear.adapter.banks[division] for layer in model.hidden]
        assert sum(bank.lora_A[0].numel() + bank.lora_B[0].numel() for bank in banks) == 6_024
        assert sum(p[0].numel() for bank in banks for p in bank.parameters()) == 6_792
    fusion = [layer.linear.adapter.attention for layer in model.hidden]
    assert sum(p.numel() for attention in fusion for p in attention.parameters()) == 6_144
    norms = 2 * (256 + 128)
    parameters = dict(model.named_parameters())
    counts = {g: sum(p.numel() for n, p in parameters.items() if groups[n] is g) for g in ParameterGroup}
    assert counts[ParameterGroup.ADAPTERS] == 5 * (6_792 + norms)  # domains of both divisions
    assert counts[ParameterGroup.GATE] == 6_144 + 6 * norms  # combinations


def test_stages() -> None:
    embeddings, backbone, adapters, gate = ParameterGroup
    for name in ("mlora", "single_lora", "multilora", "moe_mlora"):
        kind = METHODS[name]
        divisions = [AGE3, GENDER] if name == "multilora" else [AGE3]
        pretrain, *adapt = kind().stages(divisions)
        assert pretrain.name == "pretrain" and pretrain.trains == {embeddings, backbone}
        assert pretrain.route is Route.BASE and pretrain.trains_embeddings and not pretrain.starts_from_result
        if kind().route is Route.FUSED:
            *adapt, last = adapt
            assert last.name == ("fuse" if name == "multilora" else "gate")
            assert last.trains == {gate} and last.route is Route.FUSED and not last.per_domain
        wanted = ["adapt"] if len(divisions) == 1 else ["adapt_age3", "adapt_gender"]
        assert [stage.name for stage in adapt] == wanted
        for division, stage in enumerate(adapt):
            assert stage.trains == {adapters} and stage.route is Route.DOMAIN and stage.division == division
            assert stage.per_domain and stage.starts_from_result and not stage.trains_backbone


def test_experts_of_one_domain_are_trained_in_passes() -> None:
    assert [stage.expert_passes for stage in MoEMLoRA(experts_per_domain=3).stages([AGE3])] == [1, 3, 1]


@pytest.mark.parametrize(
    ("method", "divisions"),
    [
        (MLoRA(schedule="joint"), [AGE3]),
        (SingleLoRA(schedule="joint"), [AGE3]),
        (MultiLoRA(schedule="joint"), [AGE3, GENDER]),
    ],
)
def test_joint_is_one_stage_that_trains_everything(method: Method, divisions: list[Division]) -> None:
    (stage,) = method.stages(divisions)
    everything = set(ParameterGroup) - ({ParameterGroup.GATE} if len(divisions) == 1 else set())
    assert stage.name == "joint" and stage.trains == everything and stage.route is method.route


def test_new_parts_are_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = wrapped(MultiLoRA(rank=8), (AGE3, GENDER))
    for layer in model.hidden:
        for bank in layer.linear.adapter.banks:
            assert not bank.lora_B.any() and not bank.bias.any()
            assert bank.lora_A.any() and 0.7 < bank.scale.std() < 1.3
            assert 0.7 < bank.lora_A.std() * bank.in_features**0.5 < 1.3
