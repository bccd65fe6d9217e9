"""The whole model compiled, exported, traced, under autocast and in float64: what the plain backbone can do, it can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.fx import Tracer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers import DIVISIONS, build_backbone, randomise
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.gate import CombiningAdapter
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA
from torchrec_mdr.model import MultiDomainModel

METHODS: dict[str, Method] = {
    "mlora": MLoRA(rank=2),
    "multilora": MultiLoRA(rank=2),
    "moe_mlora": MoEMLoRA(rank=2, experts_per_domain=2),
    "moe_mlora_top_k": MoEMLoRA(rank=2, experts_per_domain=2, top_k=3),
}
BACKBONES = ("mlp", "dlrm", "dlrm_dcn")
EACH_ONCE = [("mlora", "dlrm_dcn"), ("multilora", "mlp"), ("moe_mlora", "dlrm")]
OTHERS = [(m, b) for m in METHODS for b in BACKBONES if (m, b) not in EACH_ONCE and m != "moe_mlora_top_k"]
OTHERS.append(("moe_mlora_top_k", "dlrm"))
PAIRS = [*EACH_ONCE, *(pytest.param(*pair, marks=pytest.mark.full) for pair in OTHERS)]

pytestmark = pytest.mark.parametrize(("method", "backbone"), PAIRS)


def make(method: str, backbone: str) -> MultiDomainModel:
    torch.manual_seed(0)
    divisions = DIVISIONS[: 2 if method == "multilora" else 1]
    model = MultiDomainModel(materialize_tables(build_backbone(backbone)), METHODS[method], divisions)
    randomise({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return model


def inputs(model: MultiDomainModel, num_rows: int, unknown: bool = True) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """Rows in no order; the first is of an unknown domain in every division, the next three in the last one."""
    generator = torch.Generator().manual_seed(num_rows)
    sizes = [division.num_domains for division in model.divisions]
    ids = torch.stack([torch.randint(size, (num_rows,), generator=generator) for size in sizes], 1)
    if unknown:
        ids[0], ids[1:4, -1] = -1, -1
    values = torch.randint(50, (3 * num_rows,), generator=generator)
    lengths = torch.ones(3 * num_rows, dtype=torch.int32)
    features = KeyedJaggedTensor(keys=["a", "b", "c"], values=values, lengths=lengths, stride=num_rows)
    return torch.rand(num_rows, 2, generator=generator), features, ids


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".adapter" in name]


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.full)], ids=["training", "evaluation"]
)
def test_compile_sees_one_graph_for_any_batch(method: str, backbone: str, training: bool) -> None:
    eager = make(method, backbone).train(training)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (7, 12):
        batch = inputs(model, num_rows)
        y, wanted = compiled(*batch), eager(*batch)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        for one, other in zip(_gradients(y, model), _gradients(wanted, eager), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):  # running statistics moved alike
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _gradients(y: Tensor, model: nn.Module) -> tuple[Any, ...]:
    return torch.autograd.grad(y.sin().sum(), adapters(model), allow_unused=True)


class Flat(nn.Module):
    """A model that takes tensors alone, as a serving system calls it."""

    def __init__(self, model: MultiDomainModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, values: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        features = KeyedJaggedTensor(keys=["a", "b", "c"], values=values, lengths=lengths, stride=dense.shape[0])
        logits: Tensor = self.model(dense, features, ids)
        return logits


def flat_inputs(model: MultiDomainModel, num_rows: int) -> tuple[Tensor, ...]:
    dense, features, ids = inputs(model, num_rows)
    return dense, features.values(), features.lengths(), ids


def test_export_takes_it_whole_for_any_batch(method: str, backbone: str) -> None:
    model = make(method, backbone).eval()
    static = torch.export.export(model, inputs(model, 7), strict=False).module()
    torch.testing.assert_close(static(*inputs(model, 7)), model(*inputs(model, 7)))
    any_rows = tuple({0: torch.export.Dim.DYNAMIC} for _ in range(4))
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # or a batch of one is another program
        program = torch.export.export(Flat(model), flat_inputs(model, 7), dynamic_shapes=any_rows, strict=False)
    for num_rows in (1, 7, 33):
        batch = flat_inputs(model, num_rows)
        torch.testing.assert_close(program.module()(*batch), Flat(model)(*batch))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_aot_inductor_packages_it(method: str, backbone: str, tmp_path: Any) -> None:
    model = make(method, backbone).eval()
    any_rows = tuple({0: torch.export.Dim.DYNAMIC} for _ in range(4))
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(Flat(model), flat_inputs(model, 7), dynamic_shapes=any_rows, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for num_rows in (1, 7, 33):
        batch = flat_inputs(model, num_rows)
        torch.testing.assert_close(package(*batch), Flat(model)(*batch), rtol=1e-4, atol=1e-5)


def test_fx_traces_it(method: str, backbone: str) -> None:
    model = make(method, backbone).eval()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    for num_rows in (7, 12):
        torch.testing.assert_close(traced(*inputs(model, num_rows)), model(*inputs(model, num_rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_it(method: str, backbone: str, dtype: torch.dtype) -> None:
    model = make(method, backbone)
    batch = inputs(model, 9)
    plain = model.eval()(*batch)
    with torch.autocast("cpu", dtype):
        low = model(*batch)
        loss = model.train()(*batch).float().square().mean()
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), plain, rtol=0.1, atol=0.1)
    loss.backward()
    touched = [parameter.grad for parameter in adapters(model) if parameter.grad is not None]
    assert touched and all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in touched)


def test_float64_is_as_good_as_float32_and_better(method: str, backbone: str) -> None:
    model = make(method, backbone).eval()
    dense, features, ids = inputs(model, 9)
    single = model(dense, features, ids)
    double = copy.deepcopy(model).double()(dense.double(), features, ids)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-5)


def test_rows_of_unknown_domains_are_the_backbones(method: str, backbone: str) -> None:
    model = make(method, backbone).eval()
    dense, features, ids = inputs(model, 9)
    with torch.no_grad():
        mixed, all_unknown = model(dense, features, ids), model(dense, features, torch.full_like(ids, -1))
        with model.routed(Route.BASE):
            base = model(dense, features, ids)
    assert torch.equal(mixed[0], all_unknown[0]), "bitwise the same form with all rows unknown"
    torch.testing.assert_close(all_unknown, base, rtol=1e-5, atol=1e-5)
    if backbone != "mlp":  # without norms per domain
        assert torch.equal(all_unknown, base)
    assert not torch.equal(mixed[4:], base[4:])
    if method == "multilora":  # three rows are known in the first division alone, whose adapter has all the weight
        with torch.no_grad():
            other = model(dense, features, torch.where(ids < 0, ids, torch.tensor([-1, 0])))
        assert not torch.allclose(mixed[1:4], base[1:4])
        for layer in (module for module in model.modules() if isinstance(module, CombiningAdapter)):
            assert layer.weights is not None
            assert layer.weights[:4].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0]]
            assert layer.weights[4:].tolist() == [[0, 1]] * 5
        assert other.isfinite().all()
