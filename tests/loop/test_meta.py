"""A model that comes from the meta device has the initial values of one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import DIVISIONS, build_backbone, hand_built_dlrm
from torchrec_mdr.methods import Method, MoEMLoRA, MultiLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import METHODS

FEW = ("mlora", "multilora", "moe_mlora", "star", "hamur", "plate")
ALL = [pytest.param(METHODS[name](), marks=[] if name in FEW else pytest.mark.full, id=name) for name in METHODS]
ALL.append(pytest.param(MoEMLoRA(gate_start="own"), id="moe_mlora_own"))


def wrapped(made: Method, backbone: nn.Module) -> MultiDomainModel:
    return MultiDomainModel(backbone, made, DIVISIONS if isinstance(made, MultiLoRA) else DIVISIONS[:1])


def initialised(model: nn.Module) -> dict[str, torch.Tensor]:
    """As DistributedModelParallel does it: memory for everything, here full of NaN; then each module's values."""
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else -99)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("method", ALL)
def test_every_module_sets_its_initial_values(method: Method) -> None:
    """Zeros and ones are where they were, and what was drawn is drawn as widely; tables are their own business."""
    torch.manual_seed(0)
    plain = wrapped(method, build_backbone("mlp"))
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    with torch.device("meta"):
        model = wrapped(method, build_backbone("mlp"))
    found = initialised(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if ".sparse_arch." in name and "shift" not in name:
            continue
        wanted = expected[name]
        assert tensor.float().isfinite().all(), name
        if ".tuned." in name:
            continue  # copies, which take the pretrained layer's values where a stage starts
        if set(wanted.float().unique().tolist()) <= {0.0, 1.0} or not wanted.is_floating_point():
            assert torch.equal(tensor, wanted), name
        elif wanted.numel() >= 60:
            torch.testing.assert_close(tensor.std(), wanted.std(), rtol=0.5, atol=0.0)


def test_a_cross_net_too() -> None:
    with torch.device("meta"):
        model = wrapped(METHODS["mlora"](), hand_built_dlrm(crossnet=True))
    found = initialised(model)
    kernels = [tensor for name, tensor in found.items() if "_kernels." in name]
    assert len(kernels) == 4 and all(kernel.isfinite().all() and kernel.std() > 0.05 for kernel in kernels)
    assert not any(tensor.any() for name, tensor in found.items() if "crossnet.bias" in name)
