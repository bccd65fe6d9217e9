"""What a prepared data set holds: `schema.json` and the objects it is read into."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from iopath.common.file_io import PathManager

SPLITS = ("train", "validation", "test")
SCHEMA_FILE = "schema.json"
SCHEMA_VERSION = 1
path_manager = PathManager()


def domain_column(division: str) -> str:
    """Name of the Parquet column that holds the rows' domain ids under a division."""
    return f"domain_{division}"


@dataclass(frozen=True)
class Division:
    """One way to cut the rows into domains.

    Args:
        name (str): name of the division.
        num_domains (int): ids lie in [0, num_domains).
        domain_names (tuple[str, ...]): names in id order; the ids themselves where left out.

    Raises:
        ValueError: no domain, or a wrong number of names.

    Example::

        >>> Division("scenario", 3).domain_names
        ('0', '1', '2')
    """

    name: str
    num_domains: int
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_domains < 1:
            raise ValueError(f"division '{self.name}' needs at least one domain, not {self.num_domains}")
        names = tuple(self.domain_names) or tuple(str(i) for i in range(self.num_domains))
        if len(names) != self.num_domains:
            raise ValueError(f"division '{self.name}' has {self.num_domains} domains but {len(names)} names")
        object.__setattr__(self, "domain_names", names)


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
            json.dump({"version": SCHEMA_VERSION, **asdict(self)}, file, indent=2)

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
                divisions=tuple(
                    Division(d["name"], d["num_domains"], tuple(d["domain_names"])) for d in raw["divisions"]
                ),
                rows={split: int(raw["rows"][split]) for split in SPLITS},
                source=raw.get("source", {}),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks or misstates the field {error}; prepare the data set anew") from error
