"""The operators' kernels on CUDA, in Triton, which is imported only where they are called."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # products in TF32 and bfloat16


def is_supported(x: Tensor) -> bool:
    """Whether the kernels are there and take this tensor's type on its device; Triton's interpreter takes CPU's."""
    if isinstance(x, torch.fx.Proxy) or x.dtype not in DTYPES or not _is_installed():
        return False
    if x.device.type == "cuda":
        return _serves(x.device)
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _serves(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
