"""What needs a GPU, see `make gpu-test`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skips where there is no GPU; leaves PyTorch's settings as they were."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
