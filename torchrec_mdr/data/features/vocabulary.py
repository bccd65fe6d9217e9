"""Ids by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl
from polars.exceptions import PolarsError

from torchrec_mdr.storage import local_copy, open_write


@dataclass(frozen=True)
class Vocabularies:
    """Tables of ids by name, each with the columns `value` (String, no value twice) and `id` (Int64).

    Example::

        >>> shops = pl.DataFrame({"value": ["Oslo", "Rome"], "id": [2, 3]})
        >>> Vocabularies({"shop": shops}).ids("shop", pl.Series(["Rome", "Lima", None])).to_list()
        [3, None, None]
    """

    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    _lookups: dict[str, tuple[pl.Enum, pl.Series]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of values of each."""
        return {name: table.height for name, table in self.tables.items()}

    def ids(self, name: str, keys: pl.Series) -> pl.Series:
        """Ids of some values: Int64, null where a value is unknown or null."""
        if not self.tables[name].height:
            return pl.Series(keys.name, [None] * len(keys), pl.Int64)
        if name not in self._lookups:
            table = self.tables[name]
            # an Enum builds its index of the values once
            self._lookups[name] = (pl.Enum(table["value"]), table["id"])
        values, ids = self._lookups[name]
        return ids.gather(keys.cast(values, strict=False).to_physical()).alias(keys.name)

    def save(self, path: str) -> None:
        """Writes all of them into one Parquet file."""
        columns = {"vocabulary": pl.String, "value": pl.String, "id": pl.Int64}
        tables = [pl.DataFrame(schema=columns)]
        tables += [
            table.select(pl.lit(name).alias("vocabulary"), pl.col("value"), pl.col("id").cast(pl.Int64))
            for name, table in self.tables.items()
        ]
        with open_write(path) as file:
            pl.concat(tables).write_parquet(file)

    @staticmethod
    def load(path: str) -> Vocabularies:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is missing or damaged.
        """
        try:
            table = pl.read_parquet(local_copy(path))
            grouped = table.partition_by("vocabulary", maintain_order=True, include_key=False, as_dict=True)
            return Vocabularies({str(name): part.select("value", "id") for (name,), part in grouped.items()})
        except (PolarsError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read ({reason}); restore it, or prepare the data anew") from error
