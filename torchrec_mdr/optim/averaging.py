"""Averages of weights over training steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

EVERY = 5  # steps between two looks at the weights, so that large tables are not read in every step
LOOKS = 20  # at the weights within what an average reaches over


class WeightAverage:
    """Exponential moving average of what a stage trains, this rank's shards of embedding tables included.

    Evaluated and kept in place of the last weights, it takes the noise of the last steps out of a result (Polyak and
    Juditsky, 1992). In the first steps the average is a shorter one, so that the start is forgotten; until the first
    look at the weights there is none, and the weights stay in their own place.

    Args:
        tensors (Iterable): parameters and buffers, plain or sharded; others than floating-point ones are left out.
        decay (float): share of the average that is kept in one step, in (0, 1).
        every (int): steps between two looks at the weights.

    Example::

        >>> weight = torch.zeros(1)
        >>> average = WeightAverage([weight], decay=0.9)
        >>> for _ in range(10):
        ...     _ = weight.fill_(1.0)
        ...     average.update()
        >>> average.swap()  # the average is in the weight's place now
        >>> 0.5 < weight.item() < 1.0
        True
    """

    def __init__(self, tensors: Iterable[Any], decay: float, every: int = EVERY) -> None:
        self.live = [tensor.detach() for tensor in _local(tensors) if tensor.is_floating_point()]
        self.every = every
        self.decay = decay**every
        self.restart(0)

    @classmethod
    def over(cls, tensors: Iterable[Any], steps: float) -> WeightAverage:
        """The average that reaches over so many steps: a weight's share falls to 1/e within them.

        Args:
            tensors (Iterable): see :class:`WeightAverage`.
            steps (float): more than 0.
        """
        every = max(1, int(steps / LOOKS))
        # of one look, and not below that of an average over two
        share = min(every / max(steps, 1.0), 0.5)
        return cls(tensors, (1.0 - share) ** (1.0 / every), every)

    def restart(self, step: int) -> None:
        """Starts from the weights as they are, as if step steps had been averaged."""
        self.step = step
        self.average = [tensor.clone() for tensor in self.live]

    @property
    def has_looked(self) -> bool:
        """Whether there is an average yet."""
        return self.step >= self.every

    @torch.no_grad()
    def update(self) -> None:
        """Takes note of a training step."""
        self.step += 1
        if self.step % self.every == 0:
            seen = self.step // self.every
            torch._foreach_lerp_(self.average, self.live, 1.0 - min(self.decay, (1.0 + seen) / (10.0 + seen)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights and their average, where there is one."""
        if not self.has_looked:
            return
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


def _local(tensors: Iterable[Any]) -> Iterable[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, ShardedTensor):
            yield from (shard.tensor for shard in tensor.local_shards())
        else:
            yield tensor
