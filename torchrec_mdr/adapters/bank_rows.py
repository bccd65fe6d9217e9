"""How an adapter's tensors lie in one row of an embedding table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchrec_mdr.adapters.bank import Bank

ALIGNMENT = 4  # numbers, a multiple of which fbgemm wants a row to be


@dataclass(frozen=True)
class RowLayout:
    """The roles of a bank's tensors, one after the other in a row; zeros fill it up to a multiple of four.

    Args:
        roles (tuple[str, ...]): names of the tensors.
        shapes (tuple[tuple[int, ...], ...]): of one adapter's part of each, as it lies in memory.
        transposed (tuple[bool, ...]): whether that is the transpose of what the role stands for, as of ``lora_B``.

    Example::

        >>> from torchrec_mdr.adapters.bank import LoRABank
        >>> layout = RowLayout.of(LoRABank(num_adapters=3, in_features=8, out_features=4, rank=2))
        >>> layout.roles, layout.width
        (('lora_A', 'lora_B', 'bias'), 28)
        >>> {role: tuple(part.shape) for role, part in layout.cut(torch.zeros(5, 28)).items()}
        {'lora_A': (5, 2, 8), 'lora_B': (5, 4, 2), 'bias': (5, 4)}
    """

    roles: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: tuple[bool, ...]

    @staticmethod
    def of(bank: Bank) -> RowLayout:
        """The layout of a bank's rows."""
        tensors = bank.row_tensors()
        turned = tuple(tensor.dim() == 3 and not tensor.is_contiguous() for tensor in tensors.values())
        parts = [t.mT if turn else t for t, turn in zip(tensors.values(), turned, strict=True)]
        return RowLayout(tuple(tensors), tuple(tuple(part.shape[1:]) for part in parts), turned)

    @property
    def numbers(self) -> int:
        """Of one adapter."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def width(self) -> int:
        """Of a row."""
        return -(-self.numbers // ALIGNMENT) * ALIGNMENT

    def cut(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows [U, width] -> the adapters' tensors [U, ...] by role, views of them."""
        tensors, place = {}, 0
        for role, shape, turned in zip(self.roles, self.shapes, self.transposed, strict=True):
            part = rows[:, place : place + prod(shape)].unflatten(1, shape)
            tensors[role] = part.mT if turned else part
            place += prod(shape)
        return tensors

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The adapters' tensors [U, ...] by role -> rows [U, width]; the opposite of :meth:`cut`."""
        first = tensors[self.roles[0]]
        rows = first.new_zeros(len(first), self.width)
        for role, part in self.cut(rows).items():
            part.copy_(tensors[role])
        return rows


@torch.no_grad()
def reset_rows(bank: Bank, layout: RowLayout, rows: Tensor) -> Tensor:
    """Gives rows [U, width] of a table the initial values that adapters of this bank have, in place."""
    rows.zero_()
    reset = bank.over(layout.cut(rows)).reset_parameters
    reset()  # type: ignore[operator]  # every bank that fits a table has one
    return rows
