"""What a prepared data set holds: `schema.json` and the objects it is read into."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from typing import Any

from torchrec_mdr.storage import isfile, missing_bucket, read_json, write_json

SPLITS = ("train", "validation", "test")
SCHEMA_FILE = "schema.json"
SCHEMA_VERSION = 1
POOLINGS = ("mean", "sum")


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
        _check_text(self.name, "a division's name")
        if self.names is not None:
            names = _sequence(self.names, f"division '{self.name}': the domains' names")
            for name in names:
                _check_text(name, f"division '{self.name}': a domain's name")
            for name in _repeated(names):
                raise ValueError(f"division '{self.name}': two domains are named '{name}'; rename one")
            object.__setattr__(self, "names", names)
        if self.num_domains is None:
            if self.names is None:
                raise ValueError(f"division '{self.name}' needs a number of domains, or their names")
            object.__setattr__(self, "num_domains", len(self.names))
        _check_count(self.num_domains, f"division '{self.name}': num_domains")
        object.__setattr__(self, "num_domains", int(self.num_domains))
        if self.names is not None and len(self.names) != self.num_domains:
            raise ValueError(
                f"division '{self.name}' has {self.num_domains} domains but {len(self.names)} names; name each domain"
            )

    @property
    def domain_names(self) -> tuple[str, ...]:
        """What the domains are called in tables and files: their names, or their ids where no names are known."""
        return tuple(self.names) if self.names is not None else tuple(str(i) for i in range(self.num_domains))

    def domain_id(self, domain: str | int | None) -> int:
        """The id of a domain named or numbered; -1, that of an unknown one, for None.

        Raises:
            ValueError: there is no such domain.
        """
        if domain is None:
            return -1
        names = self.domain_names
        if isinstance(domain, str) and domain in names:
            return names.index(domain)
        if isinstance(domain, int) and 0 <= domain < self.num_domains:
            return domain
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"division '{self.name}' has no domain '{domain}'; it has {shown}")


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature: ids in [0, num_embeddings), one (int column) or several (list column, multi_hot) a row.

    Args:
        name (str): of the feature.
        num_embeddings (int): ids lie below it.
        multi_hot (bool): whether a row has a list of ids.
        pooling (str): how the embeddings of a list become one: mean or sum.

    Raises:
        ValueError: a value is of another type or out of its range.
    """

    name: str
    num_embeddings: int
    multi_hot: bool = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        _check_text(self.name, "a sparse feature's name")
        _check_count(self.num_embeddings, f"sparse feature '{self.name}': num_embeddings")
        object.__setattr__(self, "num_embeddings", int(self.num_embeddings))
        if not isinstance(self.multi_hot, bool):
            raise ValueError(
                f"sparse feature '{self.name}': multi_hot must be true or false, not {_shown(self.multi_hot)}"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"sparse feature '{self.name}': pooling must be {' or '.join(POOLINGS)}, not {_shown(self.pooling)}"
            )


@dataclass(frozen=True)
class Schema:
    """The columns of a prepared data set.

    The Parquet files hold: the label (float32, 0 or 1), every sparse feature (int32/int64, or a list of them), every
    dense feature (float32), one int32 column `domain_NAME` for each division, and the weight (float32) if there is one.

    Args:
        dataset (str): name of the data set.
        label (str): the label's column.
        sparse_features (tuple[SparseFeature, ...]): in the order of the embedding tables.
        dense_features (tuple[str, ...]): may be empty.
        divisions (tuple[Division, ...]): the natural one first.
        rows (dict[str, int]): rows of each split.
        source (dict): how the data were made: protocol, seed, options.
        weight (str | None): the column of the rows' weights, finite and not negative, about 1 on average; a row counts
            that many times in loss and metrics.

    Raises:
        ValueError: a column that is listed twice, or a division.
    """

    dataset: str
    label: str
    sparse_features: tuple[SparseFeature, ...]
    dense_features: tuple[str, ...]
    divisions: tuple[Division, ...]
    rows: dict[str, int]
    source: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None

    def __post_init__(self) -> None:
        _check_text(self.dataset, "dataset")
        _check_text(self.label, "label")
        if self.weight is not None:
            _check_text(self.weight, "weight")
        for name in self.dense_features:
            _check_text(name, "a dense feature's name")
        sparse = [feature.name for feature in self.sparse_features]
        for title, names in (("sparse_features", sparse), ("dense_features", self.dense_features)):
            for name in _repeated(names):
                raise ValueError(f"feature '{name}' is listed twice in {title}; take one out")
            for role, column in (("label", self.label), ("weight", self.weight)):
                if column in names:
                    raise ValueError(f"the {role} '{column}' is also a feature, in {title}; take it out there")
        for name in _repeated([*sparse, *self.dense_features]):
            raise ValueError(f"feature '{name}' is in sparse_features and in dense_features; take it out of one")
        for name in _repeated([division.name for division in self.divisions]):
            raise ValueError(f"division '{name}' is listed twice in divisions; take one out")
        for division in self.divisions:
            if self.label == domain_column(division.name):
                raise ValueError(
                    f"the label '{self.label}' is also the column of division '{division.name}'; rename one"
                )

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
        content = {"version": SCHEMA_VERSION, **asdict(self)}
        for division in content["divisions"]:
            division["domain_names"] = division.pop("names")
        for feature in content["sparse_features"]:
            if not feature["multi_hot"]:
                del feature["pooling"]
        if self.weight is None:
            del content["weight"]
        write_json(f"{folder}/{SCHEMA_FILE}", content)

    @staticmethod
    def load(folder: str) -> Schema:
        """Reads `schema.json` of a prepared folder.

        Raises:
            ValueError: the file is missing, not JSON, or of another version, or a field is missing or misstated.
        """
        path = f"{folder}/{SCHEMA_FILE}"
        if not isfile(path):
            if bucket := missing_bucket(folder):
                raise ValueError(f"{folder} is no prepared data set: there is no bucket {bucket}; correct its name")
            raise ValueError(
                f"{folder} is no prepared data set: it has no {SCHEMA_FILE}; python -m torchrec_mdr.prepare --input "
                "makes one of rows of your own"
            )
        raw = read_json(path)
        try:
            return _parsed(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _parsed(raw: Any) -> Schema:
    _check_keys(raw, "the file", ["version", *(f.name for f in fields(Schema) if f.name not in ("source", "weight"))])
    if raw["version"] != SCHEMA_VERSION:
        raise ValueError(
            f"version must be {SCHEMA_VERSION}, not {_shown(raw['version'])}; correct it, or prepare the data set anew"
        )
    sparse = []
    for place, entry in enumerate(_sequence(raw["sparse_features"], "sparse_features")):
        _check_keys(entry, f"sparse_features[{place}]", ["name", "num_embeddings"], ["multi_hot", "pooling"])
        sparse.append(SparseFeature(**entry))
    divisions = []
    for place, entry in enumerate(_sequence(raw["divisions"], "divisions")):
        _check_keys(entry, f"divisions[{place}]", ["name", "num_domains"], ["domain_names"])
        names = entry.get("domain_names")
        divisions.append(Division(entry["name"], entry["num_domains"], None if names == [] else names))
    if not divisions:
        raise ValueError("divisions must list at least one division, each with name and num_domains")
    _check_keys(raw["rows"], "rows", SPLITS, ())
    for split in SPLITS:
        _check_count(raw["rows"][split], f"rows.{split}", least=0)
    dense = _sequence(raw["dense_features"], "dense_features")
    rows = {split: raw["rows"][split] for split in SPLITS}
    source, weight = raw.get("source", {}), raw.get("weight")
    return Schema(raw["dataset"], raw["label"], tuple(sparse), dense, tuple(divisions), rows, source, weight)


def _check_keys(content: Any, title: str, needed: Sequence[str], optional: Sequence[str] | None = None) -> None:
    """Raises ValueError for what is no object, lacks a field, or has others; None lets it have others."""
    if not isinstance(content, dict):
        raise ValueError(f"{title} must be an object with the fields {', '.join(needed)}, not {_shown(content)}")
    for name in needed:
        if name not in content:
            raise ValueError(f"{title} lacks the field '{name}'; it needs {', '.join(needed)}")
    for name in content:
        if optional is not None and name not in (*needed, *optional):
            raise ValueError(f"{title} has the unknown field '{name}'; it may have {', '.join((*needed, *optional))}")


def _sequence(content: Any, title: str) -> tuple[Any, ...]:
    if isinstance(content, str) or not isinstance(content, Sequence):
        raise ValueError(f"{title} must be a list, not {_shown(content)}")
    return tuple(content)


def _check_text(value: Any, title: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{title} must be a text that is not empty, not {_shown(value)}")


def _check_count(value: Any, title: str, least: int = 1) -> None:
    # to Python a bool is an int, and a whole number of numpy is none
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{title} must be a whole number of at least {least}, not {_shown(value)}")


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _shown(value: Any) -> str:
    """A value as JSON has it, which tells "3" from 3; long ones are cut."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
