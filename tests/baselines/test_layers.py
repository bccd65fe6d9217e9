"""Each baseline against its definition, computed row by row, and in a batch of several domains against single ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.baselines.baseline_loops import (
    AGE,
    CASES,
    DIM,
    HIDDEN,
    Built,
    ple,
)
from tests.cases import one_at_a_time
from tests.helpers import CountOps, Rows, random_rows, randomise, schema_of
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.baselines import PLE, Finetune, Hamur, Mix, Plate, Single
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops import grouped_linear as dense
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.registry import BACKBONES


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_definitions(name: str) -> None:
    method, reference = CASES[name]
    built = Built(method)
    expected = built.row_by_row(reference)
    assert expected.std() > 0.01
    torch.testing.assert_close(built.logits(), expected, atol=2e-5, rtol=1e-4)


def test_ple_with_three_levels() -> None:
    built = Built(PLE(num_levels=3), hidden=(6, 5, 4))
    torch.testing.assert_close(built.logits(), built.row_by_row(ple), atol=2e-5, rtol=1e-4)


METHODS: dict[str, Method] = {
    **{name: method for name, (method, _) in CASES.items()},
    "mix": Mix(),
    "single": Single(),
    "finetune": Finetune(),
    "finetune, layers only": Finetune(embeddings=False),
    "hamur, shared layers": Hamur(k=3, domain_layers=False),
}


@one_at_a_time(backbone=["mlp", "dlrm_dcn"], name=METHODS)
def test_a_batch_of_several_domains_is_its_single_domain_parts(name: str, backbone: str) -> None:
    built = Built(METHODS[name], backbone=backbone)
    mixed = built.logits()
    for domain in range(AGE.num_domains):
        index = built.rows.domains[:, 0] == domain
        torch.testing.assert_close(mixed[index], built.logits(built.rows.pick(index)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mix"])
def test_the_domain_matters(name: str) -> None:
    built = Built(METHODS[name])
    rows = built.rows
    moved = Rows(rows.dense, rows.sparse, rows.labels, (rows.domains + 1) % AGE.num_domains)
    assert (built.logits() != built.logits(moved)).float().mean() > 0.8  # some rows end in zeros of ReLU


@pytest.mark.parametrize("backbone", ["mlp", "dcn", "fibinet", "xdeepfm", "dlrm", "dlrm_dcn"])
@pytest.mark.parametrize("method", [Single(), Finetune()], ids=["single", "finetune"])
def test_each_domain_has_the_whole_backbone_for_itself(method: Method, backbone: str) -> None:
    """A plain backbone that is given one domain's parameters gives that domain's logits."""
    built = Built(method, backbone=backbone)
    options = {} if backbone.startswith("dlrm") else {"batch_norm": True}
    plain = materialize_tables(BACKBONES[backbone](hidden=HIDDEN, **options).build(schema_of([AGE]), DIM)).eval()
    state = {name.removeprefix("backbone."): tensor for name, tensor in built.model.state_dict().items()}
    mixed = built.logits()
    for domain in range(AGE.num_domains):
        own = {}
        for name, tensor in plain.state_dict().items():
            layer, _, role = name.rpartition(".")
            if "embedding_bags" in name:
                own[name] = state[name].view(-1, *tensor.shape)[
                    domain - AGE.num_domains
                ]  # the base part may come first
            elif role == "num_batches_tracked":
                own[name] = tensor
            else:
                own[name] = state[bank_tensor(state, layer, role)][domain]
        plain.load_state_dict(own)
        index = built.rows.domains[:, 0] == domain
        rows = built.rows.pick(index)
        torch.testing.assert_close(mixed[index], plain(rows.dense, rows.kjt()), atol=2e-5, rtol=1e-4)


def bank_tensor(state: dict[str, Tensor], layer: str, role: str) -> str:
    """The name of the stacked tensor that holds the domains' values of a layer's parameter."""
    above, _, below = layer.rpartition(".")  # parameters of a cross net lie in lists
    candidates = [
        f"{place}.{holder}.{name}"
        for place, name in ((layer, role), (above, f"{below}_{role}"))
        for holder in ("bank", "domains", "domains.0")
    ]
    (found,) = (name for name in candidates if name in state)
    return found


def test_finetune_starts_from_the_pretrained_model() -> None:
    for method in (Finetune(), Finetune(embeddings=False)):
        for backbone in ("mlp", "dlrm_dcn", "fibinet"):
            built = Built(method, backbone=backbone)
            built.model.set_route(Route.BASE)
            pretrained = built.logits()
            built.model.set_route(Route.DOMAIN)
            assert not torch.allclose(built.logits(), pretrained)
            built.model.start_stage(Route.DOMAIN, 0)
            torch.testing.assert_close(built.logits(), pretrained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["mlp", "dlrm_dcn"])  # with norms, and with layers that are no linear ones
@pytest.mark.parametrize("embeddings", [True, False])
def test_copies_of_domains_that_are_not_tuned_stay_bitwise(embeddings: bool, backbone: str) -> None:
    built = Built(Finetune(embeddings=embeddings), backbone=backbone)
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    built.model.start_stage(Route.DOMAIN, 0, [1])
    moved: set[str] = set()
    for name, tensor in built.model.state_dict().items():
        if ".domains." not in name and not (embeddings and ".t_" in name):
            assert torch.equal(tensor, before[name]), name
            continue
        rows = AGE.num_domains + (".t_" in name)  # in a table the pretrained part comes first
        changed = (tensor.reshape(rows, -1) != before[name].reshape(rows, -1)).any(1)[-AGE.num_domains :]
        assert changed.tolist() == [False, True, False], name
        moved.add(name)
    assert len(moved) > 4


def test_plate_starts_from_the_pretrained_model() -> None:
    torch.manual_seed(0)
    plain = materialize_tables(BACKBONES["wdl"](hidden=HIDDEN).build(schema_of([AGE]), DIM))
    model = MultiDomainModel(plain, Plate(), [AGE])
    rows = random_rows(20, [AGE])
    results = []
    for change in (False, True):
        if change:
            randomise(model.backbone.over_arch.hidden[0].linear.state_dict())
            nn.init.zeros_(model.backbone.over_arch.hidden[0].linear.tuned.prompt_weight)
            model.start_stage(Route.DOMAIN, 0)
        model.set_route(Route.BASE)
        results.append(model(rows.dense, rows.kjt(), rows.domains))
        model.set_route(Route.DOMAIN)
        results.append(model(rows.dense, rows.kjt(), rows.domains))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[3], results[2])
    assert not torch.allclose(results[0], results[2])


def test_plate_takes_the_users_features_by_name() -> None:
    built = Built(Plate(user_features=["c", "a"]))
    seen: list[Tensor] = []
    built.model.backbone.over_arch.hidden[0].linear.user_prompts.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    built.logits()
    features = built.features()
    torch.testing.assert_close(seen[0], torch.cat([features[:, 2 * DIM : 3 * DIM], features[:, :DIM]], 1))


@one_at_a_time(kernel=[True, False], name=METHODS)
def test_the_number_of_operators_does_not_depend_on_the_number_of_domains(
    name: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "grouped_mm_supports", lambda x: kernel)
    counts = []
    for num_domains in (4, 40):
        division = Division("d", num_domains)
        plain = materialize_tables(
            BACKBONES["deepfm"](hidden=HIDDEN, batch_norm=True).build(schema_of([division]), DIM)
        )
        model = MultiDomainModel(plain, METHODS[name], [division])
        rows = random_rows(64, [division])
        with CountOps() as ops:
            logits = model(rows.dense, rows.kjt(), BatchDomains.from_sorted(rows.domains, [num_domains]))
            F.binary_cross_entropy_with_logits(logits[:, 0], rows.labels).backward()
        counts.append(ops.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["shared_bottom", "star", "hamur", "single", "ple, one level", "finetune"])
def test_a_row_does_no_work_for_other_domains(name: str) -> None:
    """The multiplications of matrix products do not grow with the number of domains."""
    flops = []
    for num_domains in (2, 16):
        division = Division("d", num_domains)
        plain = materialize_tables(BACKBONES["mlp"](hidden=(32, 16), batch_norm=True).build(schema_of([division]), DIM))
        model = MultiDomainModel(plain, METHODS[name], [division])
        rows = random_rows(2048, [division])
        with MatmulWork() as work:
            logits = model(rows.dense, rows.kjt(), BatchDomains.from_sorted(rows.domains, [num_domains]))
            logits.sum().backward()
        flops.append(work.total)
    one_model = 2048 * (26 * 32 + 32 * 16 + 16)
    assert 2 * one_model < flops[0] and flops[1] < 1.01 * flops[0]  # with the gradients of weights and inputs


class MatmulWork(CountOps):
    """Counts the multiplications of all products of matrices."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            right = args[2] if name in ("addmm", "baddbmm") else args[1]
            self.total += left.numel() * right.shape[-1]  # in a grouped product too, each row being in one group
        return result
