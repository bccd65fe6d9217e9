"""Names that tensors had in checkpoints before the first release, which load until then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sizes = Mapping[str, tuple[torch.Size, torch.dtype]]


class OldTensor(NamedTuple):
    """Where a tensor lies in an old checkpoint.

    Args:
        name (str): its name there.
        convert (Callable): from what lies there to the tensor.
    """

    name: str
    convert: Callable[[Tensor], Tensor]


# last part of a name today -> last part before, and what is taken of the tensor
_RENAMED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "lora_A": ("A", lambda old: old),
    "lora_B": ("Bb", lambda old: old[:, :-1].mT),  # the columns of B, and b in the last row
    "bias": ("Bb", lambda old: old[:, -1]),
    "domain_embedding": ("domains", lambda old: old),
}


def old_tensors(sizes: Sizes) -> dict[str, OldTensor]:
    """The tensors of an old checkpoint by the names of today; none of a checkpoint of today.

    Args:
        sizes (Mapping): size and type of every tensor there.

    Example::

        >>> sizes = {f"adapter.{name}": (torch.Size([3, 2, 4]), torch.float32) for name in ("A", "Bb")}
        >>> {name: tuple(old.convert(torch.ones(3, 2, 4)).shape) for name, old in old_tensors(sizes).items()}
        {'adapter.lora_A': (3, 2, 4), 'adapter.lora_B': (3, 4, 1), 'adapter.bias': (3, 4)}
    """
    found: dict[str, OldTensor] = {}
    for name in sizes:
        holder, dot, last = name.rpartition(".")
        of_bank = f"{holder}{dot}A" in sizes and f"{holder}{dot}Bb" in sizes
        if not (holder.endswith("gate") if last == "domains" else of_bank):
            continue  # a tensor of a user's own
        for today, (before, convert) in _RENAMED.items():
            if last == before:
                found[f"{holder}{dot}{today}"] = OldTensor(name, convert)
    return found


def converted_sizes(sizes: Sizes) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of every tensor by the names of today."""
    old = old_tensors(sizes)
    gone = {one.name for one in old.values()}
    kept: dict[str, Any] = {name: entry for name, entry in sizes.items() if name not in gone}
    for name, (before, convert) in old.items():
        size, dtype = sizes[before]
        kept[name] = convert(torch.empty(size, dtype=dtype, device="meta")).shape, dtype
    return kept
