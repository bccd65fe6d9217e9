"""The kernels for CUDA: on a GPU where there is one, or in Triton's interpreter, see tests/ops/test_triton.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if find_spec("triton") and (INTERPRETED or torch.cuda.is_available()):
    from torchrec_mdr.ops import cpu_kernels
    from torchrec_mdr.ops.triton import sizes
    from torchrec_mdr.optim import bank_adam

    @pytest.fixture(autouse=True)
    def device() -> Iterator[None]:
        """Where all tensors of a test are made."""
        with torch.device("cpu" if INTERPRETED else "cuda"):
            yield

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        """Tiles of 16 rows, so that few rows make many, and no code for CPU."""
        monkeypatch.setattr(sizes, "rows_of_tile", lambda layout: 16)
        monkeypatch.setattr(sizes, "rows_of_sum", lambda layout: 16)
        monkeypatch.setattr(sizes, "LAYER_ROWS", 16)
        monkeypatch.setattr(cpu_kernels, "is_supported", lambda x: False)
        monkeypatch.setattr(bank_adam, "_is_supported", lambda param: False)

    if INTERPRETED:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        _dot = interpreter.InterpreterBuilder.create_dot

        def _float32(tensor: interpreter.TensorHandle) -> interpreter.TensorHandle:
            if tensor.dtype.scalar != tl.bfloat16:
                return tensor
            values = interpreter._convert_float(tensor.data, tl.bfloat16, tl.float32, None).view(np.float32)
            return interpreter.TensorHandle(values, tl.float32)

        def _dot_of_floats(self, a, b, *others):  # type: ignore[no-untyped-def]
            """The interpreter's own multiplies the bits of bfloat16 as if they were integers."""
            return _dot(self, _float32(a), _float32(b), *others)

        interpreter.InterpreterBuilder.create_dot = _dot_of_floats

else:
    collect_ignore_glob = ["*.py"]
