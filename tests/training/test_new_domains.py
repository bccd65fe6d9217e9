"""Which domains a checkpoint and a run have in common, and what becomes of those that are new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import build_backbone, randomise
from tests.ranks import RankPool
from torchrec_mdr.adapters.expert_gate import NO_WEIGHT
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.baselines import Finetune
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.new_domains import check_divisions, load_with_new_domains, stored_divisions

HOME, CART = ["home", "cart", "search"], Division("scenario", names=["home", "cart", "search"])
GENDER = Division("gender", 2)


def accepted(stored: Mapping[str, Any], *mine: Division, trained: list[int] | None = None) -> bool:
    return check_divisions("old/adapt", stored, mine, trained)


def refusal(stored: Mapping[str, Any], *mine: Division, trained: list[int] | None = None) -> str:
    with pytest.raises(ValueError) as error:
        accepted(stored, *mine, trained=trained)
    sentence = str(error.value)
    assert "\n" not in sentence and "checkpoint old/adapt" in sentence
    return sentence


def test_the_same_domains_are_the_same() -> None:
    assert not accepted({"scenario": HOME}, CART)
    assert not accepted({"scenario": HOME, "gender": 2}, CART, GENDER)
    assert not accepted(stored_divisions([CART, GENDER]), CART, GENDER, trained=[1])


def test_the_same_names_in_another_order_are_refused() -> None:
    moved = Division("scenario", names=["cart", "home", "search"])
    assert refusal({"scenario": HOME}, moved) == (
        "checkpoint old/adapt: domain 0 of division 'scenario' is 'home' there and 'cart' here, so the list is in "
        "another order; keep the old domains in their order, and put new ones last"
    )
    of_second = Division("gender", names=["M", "F"])
    assert "domain 0 of division 'gender' is 'F' there and 'M' here" in refusal(
        {"scenario": HOME, "gender": ["F", "M"]}, CART, of_second
    )


def test_a_new_domain_comes_last_and_is_named() -> None:
    wider = Division("scenario", names=[*HOME, "banner"])
    assert accepted({"scenario": HOME}, wider, trained=[3]) and accepted({"scenario": HOME}, wider, trained=[0, 3])
    for trained in (None, [0]):
        assert "the domains [3] of division 'scenario' are not in" in refusal(
            {"scenario": HOME}, wider, trained=trained
        )
    first = Division("scenario", names=["banner", *HOME])
    assert (
        "domain 0 of division 'scenario' is 'home' there and 'banner' here, so the list has other domains"
        in refusal({"scenario": HOME}, first, trained=[0])
    )


def test_domains_without_names_are_matched_by_their_place() -> None:
    for stored in (3, HOME):  # names that one side does not know
        assert not accepted({"scenario": stored}, Division("scenario", 3))
        assert accepted({"scenario": stored}, Division("scenario", 5), trained=[3, 4])
        assert "3 domains of division 'scenario', this run has 2" in refusal(
            {"scenario": stored}, Division("scenario", 2)
        )
    assert not accepted({"scenario": 3}, CART)


def test_a_domain_that_is_gone_is_refused() -> None:
    assert "3 domains of division 'scenario', this run has 2; only the natural division may have new" in refusal(
        {"scenario": HOME}, Division("scenario", names=HOME[:2])
    )
    assert "domain 1 of division 'scenario' is 'cart' there and 'search' here" in refusal(
        {"scenario": HOME}, Division("scenario", names=["home", "search"])
    )


def test_other_divisions_are_refused() -> None:
    stored = {"scenario": HOME, "gender": 2}
    for mine in ([CART], [GENDER, CART], [CART, Division("city", 2)]):
        sentence = refusal(stored, *mine)
        assert (
            "has adapters of the divisions scenario, gender, this run has " + ", ".join(d.name for d in mine)
            in sentence
        )
    assert "2 domains of division 'gender', this run has 3" in refusal(stored, CART, Division("gender", 3))


State = dict[str, Tensor]


def grow(method: Method, folder: str, others: tuple[Division, ...]) -> tuple[State, State, State]:
    """The tensors of a model of 3 domains, those of a fresh one of 5, and the latter's once it has loaded the first."""
    torch.manual_seed(4)
    models = [
        MultiDomainModel(materialize_tables(build_backbone("mlp")), method, [Division("scenario", number), *others])
        for number in (3, 5)
    ]
    old, new = (dict(model.state_dict()) for model in models)
    randomise(old)
    fresh = {name: tensor.clone() for name, tensor in new.items()}
    checkpoint.save(folder, old, {})
    load_with_new_domains(models[1], folder)
    return old, fresh, new


@pytest.mark.parametrize(
    ("method", "others"),
    [
        (MLoRA(rank=2), ()),
        (MultiLoRA(rank=2), (GENDER,)),
        (MoEMLoRA(rank=2, experts_per_domain=2), ()),
        (Finetune(), ()),
    ],
    ids=["mlora", "multilora", "moe_mlora", "finetune"],
)
def test_old_domains_keep_their_rows_bitwise_and_new_ones_start_anew(
    method: Method, others: tuple[Division, ...], tmp_path: Path, one_rank: RankPool
) -> None:
    old, fresh, new = one_rank.run(grow, method, str(tmp_path / "adapt"), others)[0]
    grown = {name for name in new if new[name].shape != old[name].shape}
    assert all(torch.equal(new[name], old[name]) for name in new.keys() - grown) and len(grown) >= 6
    for name in grown:
        if ".gate." in name:
            continue  # below
        experts = 2 if ".adapter.bank." in name else 1
        per_domain = 2 if ".combinations." in name else 1  # the second division's domains
        rows, before, start = (t[name].unflatten(0, (experts, -1)) for t in (new, old, fresh))
        kept = 3 * per_domain if ".t_" not in name else before.shape[1]
        assert torch.equal(rows[:, :kept], before), name
        if ".t_" in name:  # a table's new rows are like the mean of the old ones
            torch.testing.assert_close(rows[0, kept:], before[0].mean(0).expand_as(rows[0, kept:]))
        else:
            assert torch.equal(rows[:, kept:], start[:, kept:]), name


def test_no_gate_gives_a_new_domains_experts_weight(tmp_path: Path, one_rank: RankPool) -> None:
    method = MoEMLoRA(rank=2, experts_per_domain=2)
    old, _, new = one_rank.run(grow, method, str(tmp_path / "adapt"), ())[0]
    gate = "backbone.over_arch.hidden.0.linear.adapter.gate"
    bias, weight, embedding = (f"{gate}.{name}" for name in ("linear.bias", "linear.weight", "domain_embedding"))
    assert torch.equal(new[bias].view(2, 5)[:, :3], old[bias].view(2, 3))
    assert (new[bias].view(2, 5)[:, 3:] == NO_WEIGHT).all()
    assert torch.equal(new[weight].view(2, 5, -1)[:, :3], old[weight].view(2, 3, -1))
    assert torch.equal(new[embedding][:3], old[embedding])
    torch.testing.assert_close(new[embedding][3:], old[embedding].mean(0).expand(2, -1))
    # what old domains draw from old experts stays, and new experts get nothing
    before, after = (torch.softmax(t[embedding][:3] @ t[weight].T + t[bias], 1).view(3, 2, -1) for t in (old, new))
    torch.testing.assert_close(after[:, :, :3], before)
    assert after[:, :, 3:].max() < 1e-6


def lose(folder: str) -> str:
    """The error of a model of fewer domains."""
    models = [
        MultiDomainModel(materialize_tables(build_backbone("mlp")), MLoRA(rank=2), [Division("scenario", number)])
        for number in (3, 2)
    ]
    checkpoint.save(folder, dict(models[0].state_dict()), {})
    try:
        load_with_new_domains(models[1], folder)
    except ValueError as error:
        return str(error)
    return "no error"


def test_tensors_with_fewer_rows_are_refused(tmp_path: Path, one_rank: RankPool) -> None:
    assert (
        "is of another model or division: 'backbone.over_arch.hidden.0.linear.adapter."
        in one_rank.run(lose, str(tmp_path / "adapt"))[0]
    )
