"""The table of very many domains, beside `metrics.json`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from torchrec_mdr.metrics import Metrics
from torchrec_mdr.metrics.gains import Gain, Gains
from torchrec_mdr.metrics.results import MOST_LISTED, DomainResults


def domain_table(test: Metrics, backbone: Metrics | None = None, gains: Gains | None = None) -> pa.Table | None:
    """All domains of a run, where `metrics.json` lists only the largest; None where it lists all.

    Args:
        test (Metrics): of the run on test rows.
        backbone (Metrics | None): of the pretrained backbone on the same rows.
        gains (Gains | None): of the one over the other, in AUC.

    Returns:
        pa.Table | None: a row a domain, in id order: its name and what `metrics.json` would say; empty where undefined.
    """
    if len(test.domains) <= MOST_LISTED:
        return None
    columns: dict[str, pa.Array] = {"domain": pa.array(list(test.domains), pa.string())}
    columns["rows"] = pa.array(test.rows_per_domain)
    for prefix, result in (("", test), ("backbone_", backbone)):
        if result is not None:
            assert isinstance(result.domains, DomainResults)
            figures = {**result.domains.columns, **result.domains.others}
            columns |= {f"{prefix}{name}": _column(values) for name, values in figures.items()}
    if gains is not None:
        own = list(gains.domains.values())
        for name in Gain.__dataclass_fields__:
            values = (getattr(gain, name) for gain in own)
            columns[f"gain_{name}"] = pa.array(values, pa.float64(), size=len(own))
    return pa.table(columns)


def _column(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float64(), from_pandas=True)  # what is no number is empty
