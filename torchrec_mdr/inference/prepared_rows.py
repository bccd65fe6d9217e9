"""Rows in the form of a prepared data set, checked one by one: a plan where there is no `features.yaml`."""

from __future__ import annotations

import polars as pl
from polars.exceptions import PolarsError

from torchrec_mdr.data.features import EncodedRows, keys
from torchrec_mdr.data.schema import Schema, domain_column

_LABEL = "is no label, which is 0 or 1"


class PreparedRows:
    """Takes rows whose columns are a schema's, as :class:`~torchrec_mdr.data.features.FeaturePlan` takes raw ones.

    Args:
        schema (Schema): of the data the run was trained on.

    Example::

        >>> from torchrec_mdr.data.schema import Division, SparseFeature
        >>> schema = Schema("d", "clicked", (SparseFeature("item", 3),), ("price",), (Division("shop", 2),), {})
        >>> frame = pl.DataFrame({"item": [2, 3], "price": [0.5, 1.0], "domain_shop": [1, 7]})
        >>> encoded = PreparedRows(schema).encode(frame)
        >>> encoded.errors.to_list()
        [None, "column 'item': '3' is outside its embedding table, [0, 3)"]
        >>> encoded.unknown["shop"].to_list()
        [False, True]
        >>> encoded.names["shop"].to_list()  # an adapter may have been put as "7"
        ['1', '7']
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    @property
    def weight(self) -> str | None:
        """Column of the rows' weights."""
        return self._schema.weight

    def raw_columns(self, need_label: bool = False) -> list[str]:
        """The columns that :meth:`encode` needs."""
        schema = self._schema
        names = [domain_column(division.name) for division in schema.divisions]
        names += [feature.name for feature in schema.sparse_features] + list(schema.dense_features)
        if need_label:
            names += [schema.label] + ([schema.weight] if schema.weight else [])
        return list(dict.fromkeys(names))

    def encode(self, frame: pl.DataFrame, need_label: bool = False) -> EncodedRows:
        """Checks rows; see :meth:`torchrec_mdr.data.features.FeaturePlan.encode`.

        Raises:
            ValueError: a column that is needed is missing.
        """
        missing = [f"'{name}'" for name in self.raw_columns(need_label) if name not in frame.columns]
        if missing:
            raise ValueError(
                f"the rows have no column {', '.join(missing)}; the run has no features.yaml that would make it from "
                "raw rows, so give rows in the form of its prepared data, or prepare raw ones and train on them"
            )
        schema = self._schema
        values: dict[str, pl.Series] = {}
        bad: list[pl.Series] = []

        def keep(name: str, column: pl.Series, wrong: pl.Series, complaint: str) -> None:
            values[name] = column.alias(name)
            if wrong.any():
                shown = pl.format("'{}'", _text(frame, name)).fill_null("a missing value")
                reason = pl.lit(f"column '{name}': ") + shown + pl.lit(f" {complaint}")
                bad.append(frame.select(pl.when(wrong).then(reason).alias(f"error{len(bad)}")).to_series())

        for feature in schema.sparse_features:
            size, column = feature.num_embeddings, frame[feature.name]
            complaint = f"is outside its embedding table, [0, {size})"
            if isinstance(column.dtype, pl.List | pl.Array):
                lists = column.cast(pl.List(pl.Int64), strict=False)
                entry = pl.element()
                wrong = lists.list.eval(entry.is_null() | (entry < 0) | (entry >= size)).list.any().fill_null(True)
                keep(feature.name, _where(wrong, [], lists), wrong, complaint)
            else:
                ids, wrong = _integers(column, size)
                keep(feature.name, _where(wrong, 0, ids), wrong, complaint)
        for name in schema.dense_features:
            numbers = _cast(frame[name], pl.Float32)
            wrong = ~numbers.is_finite().fill_null(False)
            keep(name, _where(wrong, 0.0, numbers), wrong, "is no finite number")
        if need_label:
            numbers = _cast(frame[schema.label], pl.Float32)
            wrong = ~((numbers == 0) | (numbers == 1)).fill_null(False)
            keep(schema.label, _where(wrong, 0.0, numbers), wrong, _LABEL)
            if schema.weight is not None:
                numbers = _cast(frame[schema.weight], pl.Float32)
                wrong = ~(numbers.is_finite() & (numbers >= 0)).fill_null(False)
                keep(schema.weight, _where(wrong, 0.0, numbers), wrong, "is no weight, which is 0 or more")
        unknown, names = {}, {}
        for division in schema.divisions:
            name = domain_column(division.name)
            ids, outside = _integers(frame[name], division.num_domains)
            if name not in values:
                values[name] = _where(outside, -1, ids).alias(name)
            unknown[division.name] = outside
            names[division.name] = frame.select(keys.key(name, frame.schema[name], "integer")).to_series()
        none = pl.repeat(None, frame.height, dtype=pl.String, eager=True)
        errors = pl.DataFrame(bad).select(pl.coalesce(pl.all())).to_series() if bad else none
        return EncodedRows(pl.DataFrame(values), errors.alias("error"), pl.DataFrame(unknown), pl.DataFrame(names))


def _cast(column: pl.Series, kind: type[pl.DataType]) -> pl.Series:
    """Values of another type; null where one cannot be had."""
    try:
        return column.cast(kind, strict=False)
    except PolarsError:
        return pl.repeat(None, len(column), dtype=kind, eager=True)


def _integers(column: pl.Series, size: int) -> tuple[pl.Series, pl.Series]:
    """Ids, and where they are none in [0, size)."""
    ids = _cast(column, pl.Int64)
    wrong = ((ids < 0) | (ids >= size)).fill_null(True)
    if column.dtype.is_float():  # 1.5 is no id, and would be cut off
        wrong = wrong | (column != ids.cast(column.dtype)).fill_null(True)
    return ids, wrong


def _where(wrong: pl.Series, neutral: object, values: pl.Series) -> pl.Series:
    return pl.select(pl.when(wrong).then(pl.lit(neutral, values.dtype)).otherwise(values)).to_series()


def _text(frame: pl.DataFrame, name: str) -> pl.Expr:
    kind = frame.schema[name]
    if isinstance(kind, pl.List | pl.Array):
        return pl.lit([str(value) for value in frame[name].to_list()], pl.List(pl.String)).explode().str.slice(0, 60)
    return pl.col(name).cast(pl.String, strict=False).str.slice(0, 60)
