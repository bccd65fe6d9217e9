"""How the kernels cut their work, by sizes that the host knows: the same batch is always cut alike."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from torchrec_mdr.ops.triton.tile_map import Layout

MOST_VECTORS = 64  # of a table that a program takes at a time; down_up and layer take all of them
_PROCESSORS = 132  # of the card that sizes are chosen for, an H100
_LARGE_SHARED_MEMORY = 160 * 1024  # bytes a program can have for a layer's large tiles
LAYER_ROWS = 128


def precision(x: Tensor) -> str:
    """How float32 is multiplied: in TF32 where PyTorch's own products are."""
    tf32 = x.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def rows_of_tile(layout: Layout) -> int:
    """Rows of a tile: the larger, the less often tables are read; but neither padding nor idle processors."""
    size = 16
    while size < 64 and 2 * size * max(layout.num_groups, 2 * _PROCESSORS) <= layout.num_rows:
        size *= 2
    return size


def rows_of_sum(layout: Layout) -> int:
    """Rows that one program adds up."""
    size = 128
    while size < 512 and 64 * size < layout.num_rows:
        size *= 2
    return size


def vectors(rank: int) -> int:
    """Vectors of a table that a program takes at a time."""
    return min(max(16, triton.next_power_of_2(rank)), MOST_VECTORS)


def depth(x: Tensor, num_rows: int) -> int:
    """Columns that a product of a tile with ``num_rows`` rows takes at a time; what waits for memory takes more."""
    if _without_tensor_cores(x):  # from registers
        return 16
    return (64 if num_rows < 64 else 32) * 4 // x.element_size()


def columns(num_rows: int, rank: int) -> int:
    """Columns of what a tile with ``num_rows`` rows gives, at a time."""
    return 64 if max(num_rows, vectors(rank)) >= 64 else 128


def columns_of_layer(width: int, rank: int) -> int:
    """Columns of what a layer's tile gives: as many as fit into registers beside z."""
    return 256 if width >= 256 and vectors(rank) < 64 else 128


def takes_down_up(x: Tensor, rank: int) -> bool:
    """Whether down and up fit into one program's registers."""
    return rank <= (16 if _without_tensor_cores(x) else MOST_VECTORS)


def takes_layer(x: Tensor, layout: Layout, rank: int) -> bool:
    """Whether a layer and its adapters in one pass should be faster than cuBLAS and then the adapters.

    A pass over x and y is saved, but a tile has one adapter, so that groups must be large; and a small batch's rows
    are still in the cache when they are read again.
    """
    if rank > MOST_VECTORS or _without_tensor_cores(x):
        return False
    if layout.num_rows < max(16384, 4 * LAYER_ROWS * layout.num_groups):
        return False
    return x.device.type == "cpu" or _shared_memory(x.device) >= _LARGE_SHARED_MEMORY


def _without_tensor_cores(x: Tensor) -> bool:
    return x.dtype is torch.float32 and precision(x) != "tf32"


def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))  # which PyTorch's stubs do not know


def columns_of_sum(width: int) -> int:
    """Columns that one program adds up."""
    return 64 if width <= 64 else 128
