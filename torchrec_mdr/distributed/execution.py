"""How a model's arithmetic is run: in which precision, and compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Proxy

from torchrec_mdr.model import is_lookup

Precision = Literal["fp32", "tf32", "bf16"]
# passes of one layer that differ in route, mode, sizes known or not, and experts: more than PyTorch's eight
_RECOMPILE_LIMIT = 64


def set_float32_products(precision: Precision, device: torch.device) -> None:
    """Lets this process multiply float32 in TF32, or not.

    Raises:
        ValueError: TF32 on a device that has none.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("--precision tf32 needs an NVIDIA GPU, and there is none here; choose fp32 or bf16")
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """What a training step's forward pass runs in: autocast over float32 weights for `bf16`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def compile_dense(model: nn.Module) -> list[str]:
    """Compiles, in place, the largest modules that hold no embedding table; what looks tables up stays as it is.

    So a sharded model keeps its lookups, which TorchRec's pipelines run ahead. Modules compile when they are first
    called, and again where sizes, route or mode change. While TorchRec's tracer is at work they run as they are.

    Args:
        model (nn.Module): before or after sharding.

    Returns:
        list[str]: names of the modules.

    Example::

        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> compile_dense(nn.ModuleDict({"tables": EmbeddingBagCollection(tables=[table]), "mlp": nn.Linear(8, 1)}))
        ['mlp']
    """
    names = []
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for name, module in _without_tables(model, ""):
        _compile(module)
        names.append(name)
    return names


def _without_tables(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if is_lookup(module):
        return
    if not any(is_lookup(part) for part in module.modules()):
        if any(True for _ in module.parameters()):
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from _without_tables(child, f"{name}.{child_name}".lstrip("."))


def _compile(module: nn.Module) -> None:
    eager = module.forward
    compiled = torch.compile(eager)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return eager(*args, **kwargs)
        return compiled(*args, **kwargs)

    module.forward = forward
