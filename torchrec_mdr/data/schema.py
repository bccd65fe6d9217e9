"""What a prepared data set holds: `schema.json` and the objects it is read into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchrec_mdr.storage import path_manager

SPLITS = ("train", "validation", "test")
SCHEMA_FILE = "schema.json"
SCHEMA_VERSION = 1


def domain_column(division: str) -> str:
    """Name of the Parquet column that holds the rows' domain ids under a division."""
    return f"domain_{division}"


@dataclass(frozen=True)
class Division:
    """One way to cut the rows into domains.

    Args:
        name (str): name of the division.
        num_domains (int | None): ids lie in [0, num_domains); left out where names say it.
        names (Sequence[str] | None): the domains' names in id order, where they are known. Checkpoints keep them, so
            that a list in another order cannot hand a domain another domain's adapter.

    Raises:
        ValueError: no domain, a wrong number of names, or names that are no texts or not different.

    Example::

        >>> Division("scenario", 3).domain_names
        ('0', '1', '2')
        >>> Division("scenario", names=["home", "cart"]).num_domains
        2
    """

    name: str
    num_domains: int = None  # type: ignore[assignment]  # set from names
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.names is not None:
            names = tuple(self.names)
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"division '{self.name}': the domain name {name!r} is no text; write '{name}'")
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"division '{self.name}': two domains are named '{twice}'; rename one")
            object.__setattr__(self, "names", names)
            if self.num_domains is None:
                object.__setattr__(self, "num_domains", len(names))
            if len(names) != self.num_domains:
                raise ValueError(f"division '{self.name}' has {self.num_domains} domains but {len(names)} names")
        if self.num_domains is None:
            raise ValueError(f"division '{self.name}' needs a number of domains, or their names")
        if self.num_domains < 1:
            raise ValueError(f"division '{self.name}' needs at least one domain, not {self.num_domains}")

    @property
    def domain_names(self) -> tuple[str, ...]:
        """What the domains are called in tables and files: their names, or their ids where no names are known."""
        return tuple(self.names) if self.names is not None else tuple(str(i) for i in range(self.num_domains))


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature: ids in [0, num_embeddings), one (int column) or several (list column, multi_hot) a row."""

    name: str
    num_embeddings: int
    multi_hot: bool = False


@dataclass(frozen=True)
class Schema:
    """The columns of a prepared data set.

    The Parquet files hold: the label (float32, 0 or 1), every sparse feature (int32/int64, or a list of them), every
    dense feature (float32), and one int32 column `domain_NAME` for each division.

    Args:
        dataset (str): name of the data set.
        label (str): the label's column.
        sparse_features (tuple[SparseFeature, ...]): in the order of the embedding tables.
        dense_features (tuple[str, ...]): may be empty.
        divisions (tuple[Division, ...]): the natural one first.
        rows (dict[str, int]): rows of each split.
        source (dict): how the data were made: protocol, seed, options.
    """

    dataset: str
    label: str
    sparse_features: tuple[SparseFeature, ...]
    dense_features: tuple[str, ...]
    divisions: tuple[Division, ...]
    rows: dict[str, int]
    source: dict[str, Any] = field(default_factory=dict)

    def division(self, name: str) -> Division:
        """The division of this name.

        Raises:
            ValueError: there is none.
        """
        for division in self.divisions:
            if division.name == name:
                return division
        known = ", ".join(division.name for division in self.divisions)
        raise ValueError(f"data set '{self.dataset}' has no division '{name}'; it has {known}")

    def save(self, folder: str) -> None:
        """Writes `schema.json` into a folder."""
        with path_manager.open(f"{folder}/{SCHEMA_FILE}", "w") as file:
            content = {"version": SCHEMA_VERSION, **asdict(self)}
            for division in content["divisions"]:
                division["domain_names"] = division.pop("names")
            json.dump(content, file, indent=2)

    @staticmethod
    def load(folder: str) -> Schema:
        """Reads `schema.json` of a prepared folder.

        Raises:
            ValueError: the file is missing, not JSON, of another version, or lacks a field.
        """
        path = f"{folder}/{SCHEMA_FILE}"
        try:
            with path_manager.open(path, "r") as file:
                raw = json.load(file)
        except OSError as error:
            raise ValueError(f"{folder} is no prepared data set: {SCHEMA_FILE} cannot be read ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); prepare the data set anew") from error
        try:
            if raw["version"] != SCHEMA_VERSION:
                raise ValueError(f"{path} has version {raw['version']}, this is {SCHEMA_VERSION}; prepare it anew")
            return Schema(
                dataset=raw["dataset"],
                label=raw["label"],
                sparse_features=tuple(SparseFeature(**feature) for feature in raw["sparse_features"]),
                dense_features=tuple(raw["dense_features"]),
                divisions=tuple(Division(d["name"], d["num_domains"], d.get("domain_names")) for d in raw["divisions"]),
                rows={split: int(raw["rows"][split]) for split in SPLITS},
                source=raw.get("source", {}),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks or misstates the field {error}; prepare the data set anew") from error
