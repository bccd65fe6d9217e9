"""A batch with more domains than fit into memory, in parts."""

from __future__ import annotations

import torch
from torch import Tensor


def halves(ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows of one half of the domains and of the other, under the first division that has two; None where none has.

    Args:
        ids (Tensor): int64 [B, V].
    """
    for column in ids.unbind(1):
        domains = column.unique()
        if len(domains) > 1:
            low = column < domains[len(domains) // 2]
            return low.nonzero().flatten(), (~low).nonzero().flatten()
    return None


def pick(
    dense: Tensor, values: Tensor, lengths: Tensor, ids: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some rows of a batch as :class:`~torchrec_mdr.inference.freeze.FlatModel` takes it, with their domains.

    Args:
        dense (Tensor): [B, D].
        values (Tensor): int64 [T], ids, feature by feature.
        lengths (Tensor): int64 [F * B].
        ids (Tensor): int64 [B, V].
        rows (Tensor): int64 [R], which ones.
    """
    by_feature = lengths.view(-1, len(dense))
    ends = lengths.cumsum(0).view_as(by_feature)
    picked = by_feature[:, rows].flatten()
    starts = (ends - by_feature)[:, rows].flatten()
    within = torch.arange(int(picked.sum())) - torch.repeat_interleave(picked.cumsum(0) - picked, picked)
    return dense[rows], values[torch.repeat_interleave(starts, picked) + within], picked, ids[rows]
