"""The one free number of leaving rows out: by how much embeddings move."""

from __future__ import annotations

# from one that moves nothing to one that is far off the mark on either side of one
SCALES = (0.0, *(2.0 ** (power / 2) for power in range(-8, 9)))


def scale_for(target: float, losses: list[float]) -> float:
    """The first scale under which the loss reaches the target, between those tried by a straight line.

    Args:
        target (float): the loss to reach.
        losses (list[float]): under each of `SCALES`.

    Example::

        >>> scale_for(0.5, [0.6] * len(SCALES))
        0.0
        >>> scale_for(0.5, [0.4] + [0.6] * (len(SCALES) - 1)) == SCALES[1] / 2
        True
    """
    if losses[0] >= target:
        return 0.0
    for i in range(1, len(losses)):
        if losses[i] >= target:
            share = (target - losses[i - 1]) / (losses[i] - losses[i - 1])
            return SCALES[i - 1] + share * (SCALES[i] - SCALES[i - 1])
    return SCALES[-1]
