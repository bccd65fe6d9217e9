"""Whether a backbone sees the domain: as a sparse feature, under whatever name."""

from __future__ import annotations

import numpy as np

from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.schema import Schema


def domain_feature(folder: str, schema: Schema, division: str, split: str = "validation") -> str | None:
    """The sparse feature that is a division's domain.

    A feature is the domain where each of its ids goes with one domain and each domain with one id, on a split's rows;
    one domain may have several, as that of pooled rare ones has.

    Args:
        folder (str): the prepared data set.
        schema (Schema): its schema.
        division (str): of the schema.
        split (str): the rows to look at.

    Returns:
        str | None: its name; None where no feature with one id a row is.
    """
    reader = SplitReader(folder, schema, split, [division])
    many = dict(zip((feature.name for feature in schema.sparse_features), reader.multi_hot, strict=True))
    names = [name for name, has_lists in many.items() if not has_lists]
    pairs: dict[str, np.ndarray] = {name: np.empty((0, 2), dtype=np.int64) for name in names}
    for group in reader.groups:
        if not pairs:
            break
        rows, domains = reader.rows(group), reader.domains(group, division)
        for column, name in enumerate(names):
            if name in pairs:
                found = np.stack([rows.ids(column).astype(np.int64), domains], axis=1)
                pairs[name] = np.unique(np.concatenate([pairs[name], found]), axis=0)
                ids, of_domains = (np.unique(pairs[name][:, side], return_counts=True)[1] for side in (0, 1))
                if (ids > 1).any() or (of_domains > 1).sum() > 1:
                    del pairs[name]
    return next((name for name, found in pairs.items() if len(found)), None)
