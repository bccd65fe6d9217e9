"""The kernels for CUDA without a GPU: computed by Triton's interpreter, and compiled for the cards that they serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_mdr.ops.groups import DomainGroups

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(__file__).parent / "kernels"
N, B, IN, OUT, R = 3, 16384, 256, 128, 16  # as large as a layer in one pass must be; nothing is computed

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing: pip install -e '.[dev]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process"),
]
interpreted = pytest.mark.skipif(
    find_spec("triton") is not None and version("triton").startswith("3.6"),
    reason="Triton 3.6 interprets nothing with numpy 2.4",
)


def interpret(*arguments: str) -> None:
    """Runs what tests/ops/kernels holds: Triton asks for the variable when a kernel's module is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert re.search(r"\d+ passed", done.stdout)


@interpreted
@pytest.mark.timeout(1800)
def test_kernels_give_what_float64_gives() -> None:
    interpret()


@interpreted
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_give_what_float64_gives_in_every_case() -> None:
    interpret("-m", "full", "--timeout", "900")


@pytest.fixture(
    params=[(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)], ids=lambda p: f"sm_{p[0]}-{p[1]}"
)
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[torch.dtype], None]], list[Any]]]:
    """Compiles, for a card, all kernels that a function would launch, as they would be launched."""
    from triton import runtime
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    capability, dtype = request.param
    kernels: list[Any] = []

    class Card:
        """As much of a driver as compiling asks for."""

        get_current_device = staticmethod(lambda: capability)  # what is compiled is kept by device
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(runtime.driver, "_active", Card())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tf32 = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield lambda launch: launch(dtype) or kernels
    torch.backends.cuda.matmul.fp32_precision = tf32


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel, rows in order and not, small tiles and large; nothing is read or written."""
    from torchrec_mdr.ops.triton import adam, norms, products

    ids = torch.randint(N, (B,))
    groups, few = DomainGroups.from_sorted_ids(ids.sort().values, N), DomainGroups.from_ids(ids[:500], N)
    x, grad, z = torch.empty(B, IN, dtype=dtype), torch.empty(B, OUT, dtype=dtype), torch.empty(B, R + 1, dtype=dtype)
    lora_A, lora_B = torch.empty(N, R, IN, dtype=dtype), torch.empty(N, R, OUT, dtype=dtype).mT
    bias, weight = torch.empty(N, OUT, dtype=dtype), torch.empty(OUT, IN, dtype=dtype)
    layer = weight, torch.empty(OUT, dtype=dtype)
    products.low_rank(x, lora_A, lora_B, bias, None, *layer, groups)
    products.low_rank(grad, lora_B.mT, lora_A.mT, None, None, weight.mT, None, groups)
    products.low_rank(x[:500], lora_A, lora_B, bias, None, *layer, few)
    products.down(x, lora_A, groups)
    products.up(z, lora_B.mT, groups, grad, grad, bias)
    products.outer(z, grad, groups)
    norms.centered_sums(grad, grad, bias, groups, grad)
    norms.affine_by_domain(grad, grad, torch.empty(N, 4, OUT, dtype=dtype), groups, grad)
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    table, own_bias, present = torch.empty(N, R, OUT).mT, torch.empty(N, OUT), torch.ones(N, dtype=torch.bool)
    state, bias_state = (
        {"step": torch.zeros(N), "exp_avg": torch.empty_like(param), "exp_avg_sq": torch.empty_like(param)}
        for param in (table, own_bias)
    )
    adam.update(table, table, state, group, present)
    adam.update_from_factors(table, state, own_bias, bias_state, (z, grad, groups), group, present)
    adam.mark_rows(table, present)


def spilled(kernel: Any, folder: Path) -> int:
    """Bytes that a thread keeps in memory for want of registers, on the card that sizes are chosen for."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if kernel.metadata.target.arch != 90 or not tool.exists():
        return 0
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True)
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


PRODUCTS = {"layer", "down_up", "down", "up", "outer", "adam_outer"}
OTHERS = {"map_tiles", "add_parts", "centered_sums", "affine_by_domain", "adam", "adam_parts", "mark_rows"}


def test_every_kernel_compiles_and_multiplies_by_tensor_cores(
    compiled: Callable[[Callable[[torch.dtype], None]], list[Any]], tmp_path: Path
) -> None:
    kernels = compiled(launch_all)
    assert {name for name, _ in kernels} == PRODUCTS | OTHERS
    for name, kernel in kernels:
        ptx = kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 0
        assert ("mma.sync" in ptx or "wgmma.mma_async" in ptx) == (name in PRODUCTS), name
        assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: sums would depend on who comes first"
        if name == "layer" and kernel.metadata.target.arch == 90:
            assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
        assert not spilled(kernel, tmp_path), f"{name}: more numbers than registers"
