"""Exported and compiled, a serving model gives the same, in operators that need no Python."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.inference.models import METHODS, rows_for, trained
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.inference.freeze import CALIBRATION, FlatModel, ServingModel, freeze, known_ids
from torchrec_mdr.inference.package import (
    Example,
    Package,
    check_operators,
    compile_package,
    export_program,
    flat_inputs,
)
from torchrec_mdr.registry import BACKBONES

SHORT = [("multilora", "mlp"), ("moe_mlora", "dlrm_dcn")]
# each method, and each backbone
OTHERS = [*zip(METHODS, cycle(("mlp", "dlrm", "dlrm_dcn"))), *(("mlora", backbone) for backbone in BACKBONES)]
FULL = [pytest.param(*pair, marks=pytest.mark.full) for pair in dict.fromkeys(OTHERS) if pair not in SHORT]


def example(model: ServingModel, num_rows: int, unknown: int | None = None) -> Example:
    """Rows of all domains; the first three are of an unknown one."""
    dense, features, ids = rows_for(model, num_rows)
    if unknown is not None:
        ids[:3] = unknown
    return flat_inputs(dense, features, model.places(known_ids(ids, model.sizes)))


@pytest.mark.parametrize(("method", "backbone"), [*SHORT, *FULL])
@torch.no_grad()
def test_exported_equals_the_model(method: str, backbone: str) -> None:
    model = trained(method, backbone)
    frozen = freeze(model, ["a", "b", "c"])
    program = export_program(FlatModel(frozen), example(frozen, 7))
    check_operators(program, backbone)
    module = program.module(check_guards=False)  # which would take a batch of one for another program
    for num_rows in (1, 2, 33):
        rows = rows_for(model, num_rows)
        got = module(*example(frozen, num_rows))
        torch.testing.assert_close(got, model(*rows).reshape(-1), rtol=1e-6, atol=1e-6)
    _check_unknown(module, model, frozen)


@pytest.mark.parametrize(
    ("method", "backbone"), [*(pytest.param(*pair, marks=pytest.mark.full) for pair in SHORT), *FULL]
)
@torch.no_grad()
def test_compiled_equals_the_model(tmp_path: Path, method: str, backbone: str) -> None:
    model = trained(method, backbone)
    frozen = freeze(model, ["a", "b", "c"])
    path = str(tmp_path / "model.pt2")
    compile_package(frozen, example(frozen, 7), path)
    package = Package(path)
    for num_rows in (1, 2, 33, 4096):
        rows = rows_for(model, num_rows)
        got = package(*example(frozen, num_rows))
        torch.testing.assert_close(got, model(*rows).reshape(-1), rtol=1e-6, atol=1e-6)
    _check_unknown(package, model, frozen)
    banks = {f"{name}.{table}": tensor for name, bank in frozen.banks() for table, tensor in bank.tables.items()}
    tables = {name: tensor for name, tensor in banks.items() if name != CALIBRATION}
    package.share_tables(tables)
    before = package(*example(frozen, 33, unknown=-1))
    for tensor in tables.values():
        tensor[1:] = 0
    after = package(*example(frozen, 33, unknown=-1))
    assert torch.equal(before[:3], after[:3]) and not torch.isclose(before[3:], after[3:]).all()


def _check_unknown(scores: object, model: torch.nn.Module, frozen: ServingModel) -> None:
    """Whatever id a domain is unknown by, a row of it is the backbone's."""
    assert callable(scores)
    dense, features, ids = rows_for(frozen, 33)
    none = scores(*flat_inputs(dense, features, frozen.places(torch.full_like(ids, -1))))
    with model.routed(Route.BASE):
        base = model(dense, features, ids).reshape(-1)
    torch.testing.assert_close(none, base, rtol=1e-5, atol=1e-5)
    for unknown in (-1, 3, 10**9):
        mixed = scores(*example(frozen, 33, unknown))
        assert torch.equal(mixed[:3], none[:3]) and not torch.isclose(mixed[3:], none[3:]).all()


def test_what_only_python_has_is_named() -> None:
    class Sorts(torch.nn.Module):
        def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
            keyed = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
            return dense.sum(1) + keyed[0]

    frozen = freeze(trained("mlora", "dlrm"), ["a", "b", "c"])
    program = export_program(Sorts(), example(frozen, 7))
    with pytest.raises(ValueError, match="Sorts needs fbgemm.asynchronous_complete_cumsum"):
        check_operators(program, "Sorts")
