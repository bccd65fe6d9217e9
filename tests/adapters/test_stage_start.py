"""What norms per domain take up where a stage begins, all of them or those of some domains."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.test_norm import WIDTH, all_combinations, domain_norm, random_state, run
from torchrec_mdr.adapters.context import Route


def test_starting_a_stage_copies_the_trained_base_norm() -> None:
    plain, norm = domain_norm()
    trained = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    plain.eval().load_state_dict(trained)
    norm.eval().load_state_dict(trained, strict=False)
    x, ids = torch.randn(6, WIDTH), all_combinations()
    untouched = {name: tensor.clone() for name, tensor in norm.domains[0].row_tensors().items()}
    norm.start_stage(Route.DOMAIN, 1)
    torch.testing.assert_close(run(norm, x, Route.DOMAIN, ids, division=1), plain(x))
    assert all(torch.equal(untouched[name], tensor) for name, tensor in norm.domains[0].row_tensors().items())
    assert not torch.allclose(run(norm, x, Route.DOMAIN, ids, division=0), plain(x))


@pytest.mark.parametrize("division", [0, 1])
def test_norms_of_domains_that_do_not_train_stay_bitwise(division: int) -> None:
    plain, norm = domain_norm()
    others = [bank for bank in norm.domains if bank.division != division]
    for bank in (*norm.domains, norm.combinations):
        random_state(bank)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.start_stage(Route.DOMAIN, division, torch.tensor([1]))
    for name, tensor in norm.domains[division].row_tensors().items():
        assert torch.equal(tensor[1], plain.state_dict()[name])
        old = before[f"domains.{division}.{name}"]
        kept = torch.arange(len(tensor)) != 1
        assert torch.equal(tensor[kept], old[kept]) and not torch.equal(tensor[1], old[1])
    for bank, prefix in ((others[0], f"domains.{1 - division}"), (norm.combinations, "combinations")):
        assert all(torch.equal(tensor, before[f"{prefix}.{name}"]) for name, tensor in bank.row_tensors().items())


def test_combinations_of_domains_that_do_not_train_stay_bitwise() -> None:
    _, norm = domain_norm()
    for bank in (*norm.domains, norm.combinations):
        random_state(bank)
    norm.domains[0].copy_rows({name: t + 1 for name, t in norm.domains[0].row_tensors().items()})
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.start_stage(Route.FUSED, 0, torch.tensor([2, 0]))
    for name, tensor in norm.combinations.row_tensors().items():
        for row, (domain, _) in enumerate(all_combinations().tolist()):
            source = before[f"combinations.{name}"][row] if domain == 1 else before[f"domains.0.{name}"][domain]
            assert torch.equal(tensor[row], source), (name, row)
        assert not torch.equal(before[f"combinations.{name}"][0], before[f"domains.0.{name}"][0])
    for name, tensor in norm.state_dict().items():
        assert "combinations" in name or torch.equal(tensor, before[name]), name


def test_the_base_route_starts_nothing() -> None:
    _, norm = domain_norm()
    for bank in (*norm.domains, norm.combinations):
        random_state(bank)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.start_stage(Route.BASE, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
