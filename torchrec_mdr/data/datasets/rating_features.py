"""How raw ratings, with the columns of their users and movies, become what MovieLens' prepared rows hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import polars as pl

from torchrec_mdr.data.features import DensePlan, DivisionPlan, FeaturePlan, LabelPlan, SparsePlan, Vocabularies
from torchrec_mdr.data.schema import Division

_COLUMNS = {"age3": "age", "random3": "user", "activity": "user"}  # that divisions of other names look at


def rating_features(
    dataset: str,
    rule: str,
    values: Mapping[str, Sequence[str]],
    sparse: Sequence[str],
    ages: tuple[int, int] | None,
    divisions: Sequence[Division],
    by_value: Mapping[str, Mapping[str, int]],
) -> FeaturePlan:
    """The plan. Its features know the values of the files alone, so that rows with others are bad.

    Args:
        dataset (str): name of the data set.
        rule (str): what the rating of positive rows is.
        values (Mapping[str, Sequence[str]]): of each column, its values in id order.
        sparse (Sequence[str]): the columns that are features; the domain is one more.
        ages (tuple[int, int] | None): the youngest and the oldest, where age is a dense feature.
        divisions (Sequence[Division]): the natural one first.
        by_value (Mapping[str, Mapping[str, int]]): domains of divisions that are not a column's values, by value.
    """
    ids = {name: {value: i for i, value in enumerate(known)} for name, known in values.items()}
    ids["occupation"] |= {str(i): i for i in range(len(values["occupation"]))}  # as MovieLens-1M has it
    tables: dict[str, Mapping[str, int]] = {name: ids[name] for name in sparse}
    tables |= {f"domain_{one.name}": by_value.get(one.name) or ids[one.name] for one in divisions}
    plans = [DivisionPlan(one.name, _COLUMNS.get(one.name, one.name), one.domain_names) for one in divisions]
    natural = plans[0]
    features = [
        SparsePlan(name, name, len(values[name]), vocabulary=name, has_missing=False, unknown=None) for name in sparse
    ]
    domain = SparsePlan("domain", natural.column, len(natural.names), kind="domain", division=natural.name)
    dense: tuple[DensePlan, ...] = ()
    if ages is not None:
        youngest, width = float(ages[0]), float(max(ages[1] - ages[0], 1))
        dense = (DensePlan("age", "age", median=youngest, mean=youngest, std=width, clip=math.inf),)
    return FeaturePlan(
        dataset,
        LabelPlan("label", rule=rule),
        (*features, domain),
        dense,
        tuple(plans),
        vocabularies=Vocabularies({name: _table(known) for name, known in tables.items()}),
    )


def _table(ids: Mapping[str, int]) -> pl.DataFrame:
    return pl.DataFrame({"value": list(ids), "id": list(ids.values())}, {"value": pl.String, "id": pl.Int64})
