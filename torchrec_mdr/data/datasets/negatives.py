"""Clicks without their opposites: sampled negatives, as MAMDR's public code draws them for MLoRA's data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_mdr.data.datasets.raw_rows import LABEL, RawRows
from torchrec_mdr.data.splits import SPLIT_SEED, stratified_split

CLICK_RATES = (0.2, 0.5)  # clicks per sampled negative, drawn for each domain from this range

Ints = NDArray[np.int64]


def sampled_rows(
    clicks: pl.DataFrame,
    domain: str,
    names: Sequence[str],
    extra: dict[str, Any],
    raw_names: Mapping[str, str] | None = None,
) -> RawRows:
    """Clicks and sampled negatives, split 60/20/20 within each domain and label.

    A domain's click rate r is drawn from CLICK_RATES, and a user with n clicks in the domain gets int(n / r) of the
    domain's items that the user has not clicked there, without replacement; all of them where there are fewer. The
    public code also splits each user's negatives by themselves; here domain and label are the strata.

    Args:
        clicks (pl.DataFrame): texts user and item, and the domain's column; no row twice.
        domain (str): that column, which becomes the natural division.
        names (Sequence[str]): the domains, in the order in which their rates are drawn.
        extra (dict[str, Any]): what else to say in the schema's source.
        raw_names (Mapping[str, str] | None): see `RawRows`.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    rates = rng.uniform(*CLICK_RATES, len(names)).round(2)
    parts = []
    for name, rate in zip(names, rates, strict=True):
        part = clicks.filter(pl.col(domain) == name)
        users, items = part["user"].unique().sort(), part["item"].unique().sort()
        user = part["user"].cast(pl.Enum(users)).to_physical().to_numpy().astype(np.int64)
        item = part["item"].cast(pl.Enum(items)).to_physical().to_numpy().astype(np.int64)
        drawn_users, drawn_items = sample_negatives(rng, user, item, len(items), float(rate))
        negative = pl.DataFrame({"user": users.gather(drawn_users), "item": items.gather(drawn_items)})
        for rows, label in ((part, True), (negative, False)):
            parts.append(rows.select("user", "item", pl.lit(name).alias(domain), pl.lit(label).alias(LABEL)))
    rows = pl.concat(parts)
    place = {name: number for number, name in enumerate(names)}
    domains = rows[domain].replace_strict(place, return_dtype=pl.Int64).to_numpy()
    splits = stratified_split(domains, rows[LABEL].to_numpy())
    return RawRows(
        splits={split: rows[index].lazy() for split, index in splits.items()},
        sparse=("user", "item"),
        divisions=(domain,),
        raw_names=raw_names or {},
        source={
            "split": "60/20/20 within each domain and label",
            "seed": SPLIT_SEED,
            "click_rates": dict(zip(names, rates.tolist(), strict=True)),
            **extra,
        },
    )


def sample_negatives(
    rng: np.random.Generator, users: Ints, items: Ints, num_items: int, rate: float
) -> tuple[Ints, Ints]:
    """Items of one domain that users have not clicked, by lot.

    Args:
        rng (np.random.Generator): draws them.
        users (Ints): [n], the clicks' users.
        items (Ints): [n], the clicks' items, in [0, num_items).
        num_items (int): items of the domain.
        rate (float): r; a user with n clicks gets int(n / r) negatives, or all there are.

    Returns:
        tuple[Ints, Ints]: users and items of the negatives, each pair once, ordered by user and item.

    Example::

        >>> sample_negatives(np.random.default_rng(0), np.array([0, 0]), np.array([0, 2]), 4, 0.5)
        (array([0, 0]), array([1, 3]))
    """
    clicked = np.unique(users * num_items + items)
    every, clicks = np.unique(users, return_counts=True)
    free = num_items - np.bincount(np.searchsorted(every, clicked // num_items), minlength=len(every))
    wanted = np.minimum((clicks / rate).astype(np.int64), free)
    found = [_whole(rng, user, number, clicked, num_items) for user, number in _crowded(every, wanted, free)]
    left = np.where(2 * wanted > free, 0, wanted)
    drawn = np.empty(0, dtype=np.int64)
    while left.any():  # each round fills half of what is missing or more, for no user wants more than half of the free
        more = np.repeat(every, left) * num_items + rng.integers(0, num_items, left.sum())
        drawn = np.union1d(drawn, np.setdiff1d(more, clicked))
        left = np.where(2 * wanted > free, 0, wanted) - np.bincount(
            np.searchsorted(every, drawn // num_items), minlength=len(every)
        )
    pairs = np.sort(np.concatenate([drawn, *found]))
    return pairs // num_items, pairs % num_items


def _crowded(users: Ints, wanted: Ints, free: Ints) -> list[tuple[int, int]]:
    """Users who want more than half of the items that are free to them, and how many."""
    chosen = 2 * wanted > free
    return list(zip(users[chosen].tolist(), wanted[chosen].tolist(), strict=True))


def _whole(rng: np.random.Generator, user: int, number: int, clicked: Ints, num_items: int) -> Ints:
    """Pairs for one user, drawn from a list of all items that are free."""
    first, last = np.searchsorted(clicked, (user * num_items, (user + 1) * num_items))
    free = np.setdiff1d(np.arange(num_items), clicked[first:last] - user * num_items, assume_unique=True)
    pairs: Ints = user * num_items + rng.choice(free, number, replace=False)
    return pairs
