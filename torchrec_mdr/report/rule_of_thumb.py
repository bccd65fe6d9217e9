"""What adapters can be expected to add, by the rows that domains have: the rule of thumb of docs/when_it_pays.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# training rows of a domain in the study's middle row of points; below FEW adapters gained nothing there, and from
# ENOUGH on more than the domain as a feature does
FEW, ENOUGH = 100, 500
FEW_ROWS_IN_ALL = 2_000  # below which the shared part is hardly learned


def rule_of_thumb(rows_by_domain: Sequence[int]) -> str:
    """Where one's own data lie in the study, in a few sentences.

    Args:
        rows_by_domain (Sequence[int]): training rows of each domain of the natural division.

    Example::

        >>> rule_of_thumb([9000])
        'There is one domain: adapters have nothing to tell apart, and one model for all rows is enough.'
        >>> rule_of_thumb([9000, 5000, 40]).split(": ")[0]
        '3 domains, 1 of them with fewer than 100 training rows; half of the rows lie in domains of 9,000 or more'
    """
    rows = np.sort(np.asarray(rows_by_domain, dtype=np.int64))[::-1]
    rows = rows[rows > 0]
    if len(rows) < 2:
        return "There is one domain: adapters have nothing to tell apart, and one model for all rows is enough."
    typical = int(rows[np.searchsorted(rows.cumsum(), rows.sum() / 2)])
    few = int((rows < FEW).sum())
    small = f", {few:,} of them with fewer than {FEW} training rows" if few else ""
    where = f"{len(rows):,} domains{small}; half of the rows lie in domains of {typical:,} or more"
    if rows.sum() < FEW_ROWS_IN_ALL or typical < FEW:
        expected = (
            "that is where adapters gained nothing in the study (docs/when_it_pays.md): make the domain a feature, and "
            "pool small domains"
        )
    elif typical < ENOUGH:
        expected = (
            "in the study (docs/when_it_pays.md) adapters gained .01 of AUC there over a backbone that sees the domain "
            "where domains differ as much as they share, several times that where they differ more, and nothing where "
            "they do not"
        )
    else:
        expected = (
            "in the study (docs/when_it_pays.md) adapters gained .02 of AUC there over a backbone that sees the "
            "domain where domains differ as much as they share, and nothing where they do not differ"
        )
    return f"{where}: {expected}. The number of domains mattered less than the rows of each."
