"""MovieLens-1M and MovieLens-100k in the protocols of MultiLoRA and MLoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchrec_mdr.data.datasets.base import Choice, Dataset, paper_defaults, stage_defaults
from torchrec_mdr.data.datasets.movielens_files import GENDERS, Ratings, read_1m, read_100k
from torchrec_mdr.data.schema import SPLITS, Division, Schema, SparseFeature, domain_column
from torchrec_mdr.data.writer import write_split

SPLIT_SEED = 2024
DEFAULT_DIVISIONS = {"multilora": "age3", "mlora": "gender"}
NATURAL_DIVISIONS = ("gender", "age", "age3", "occupation", "random3")
AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
AGE3_NAMES = ("under 25", "25-34", "35+")
AGE3_OF_BRACKET = (0, 0, 1, 2, 2, 2, 2)
RANDOM3_NAMES = ("a", "b", "c")
ACTIVITY_NAMES = ("at most median ratings", "above median ratings")

# this project's own settings. Penalty and learning rate are those of the grids in examples/search_backbone.yaml and
# search_adapters.yaml with the highest AUC on validation rows (seed 0); the rest was not searched
_PENALTY = {"mlora": 2.0, "multilora": 8.0}
# where embeddings meet in products alone, all of them zero is a point that no gradient leads away from, and these
# penalties lead there; judged the same way by examples/search_products.yaml
_PENALTY_OF_PRODUCTS = {("nfm", "mlora"): 0.02, ("dlrm", "mlora"): 0.2, ("dlrm", "multilora"): 0.08}
_LEARNING_RATE = {"mlora": 1e-4, "multilora": 1e-3}
_AFTER_PRETRAINING = {
    "ema_decay": 0.99,
    "validations_per_epoch": 4,
    "patience": 4,
    "hooks": ["leave_one_out"],
    "backbone_noise": False,
}

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _MovieLens(Dataset):
    """What the two data sets share.

    Args:
        data_dir (str): folder of the original files.
        protocol (str): `multilora` (label rating > 3; all features; random 8:1:1) or `mlora` (label rating == 5; user,
            movie and domain; 6:2:2 within each domain and label).
        division (str): the natural division: gender, age, age3, occupation, or random3 (users by lot: what adapters
            gain there has nothing to do with domains); empty takes age3 for `multilora` and gender for `mlora`. The
            others, and `activity`, follow it and can be auxiliary.
    """

    data_dir: str
    protocol: str = "multilora"
    division: str = ""

    protocols: ClassVar[tuple[str, ...]] = ("multilora", "mlora")
    NAME: ClassVar[str]
    FILES: ClassVar[tuple[str, str, str]]

    def __post_init__(self) -> None:
        if self.protocol not in DEFAULT_DIVISIONS:
            raise ValueError(f"{self.NAME} has no protocol '{self.protocol}'; choose {' or '.join(DEFAULT_DIVISIONS)}")
        if not self.division:
            object.__setattr__(self, "division", DEFAULT_DIVISIONS[self.protocol])
        if self.division not in NATURAL_DIVISIONS:
            raise ValueError(
                f"{self.NAME} has no natural division '{self.division}'; choose one of {', '.join(NATURAL_DIVISIONS)}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the original files."""
        return tuple(f"{self.data_dir}/{name}" for name in self.FILES)

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`: the papers' own."""
        return ("age3", "gender") if protocol == "multilora" else ("gender", "age")

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`; `recommended` is this project's own, chosen on validation rows."""
        assert choice.protocol is not None, "MovieLens has a default protocol"
        values = paper_defaults(choice.protocol)
        if choice.recipe == "paper":
            return values
        penalty = _PENALTY_OF_PRODUCTS.get((choice.backbone, choice.protocol), _PENALTY[choice.protocol])
        values |= stage_defaults({"embedding_l2": penalty, "ema_decay": 0.999}, ("pretrain", "joint"))
        after = {**_AFTER_PRETRAINING, "learning_rate": _LEARNING_RATE[choice.protocol]}
        return values | stage_defaults(after, ("adapt", "fuse", "gate"))

    @abstractmethod
    def _read(self) -> Ratings:
        """The ratings in the files' order."""

    def write(self, folder: str) -> None:
        """Writes the three splits and `schema.json` into an existing folder.

        Raises:
            ValueError: a file is missing, or one of its lines is faulty.
        """
        ratings = self._read()
        columns = {name: ratings.rows[name].to_numpy() for name in ratings.rows.columns}
        domains = {
            "gender": columns["gender"],
            "age": columns["bracket"],
            "age3": np.asarray(AGE3_OF_BRACKET)[columns["bracket"]],
            "occupation": columns["occupation"],
            "random3": random_users(columns["user"], ratings.sizes["user"], len(RANDOM3_NAMES)),
        }
        divisions = {
            "gender": Division("gender", len(GENDERS), GENDERS),
            "age": Division("age", len(AGE_NAMES), AGE_NAMES),
            "age3": Division("age3", len(AGE3_NAMES), AGE3_NAMES),
            "occupation": Division("occupation", len(ratings.occupations), ratings.occupations),
            "random3": Division("random3", len(RANDOM3_NAMES), RANDOM3_NAMES),
            "activity": Division("activity", len(ACTIVITY_NAMES), ACTIVITY_NAMES),
        }
        order = (self.division, *(name for name in divisions if name != self.division))
        natural = domains[self.division]
        sparse: tuple[str, ...]
        if self.protocol == "multilora":
            label = columns["rating"] > 3
            splits = random_split(len(label))
            sparse = ("user", "gender", "occupation", "zip", "movie", "genre")
            youngest, oldest = ratings.age_range
            dense = {"age": (columns["age"] - youngest) / max(oldest - youngest, 1)}
        else:
            label = columns["rating"] == 5
            splits = stratified_split(natural, label)
            sparse = ("user", "movie")
            dense = {}
        domains["activity"] = activity(columns["user"], splits["train"], ratings.sizes["user"])
        table: Mapping[str, Ints | NDArray[np.floating[Any]]] = {
            "label": label.astype(np.float32),
            **{name: columns[name] for name in sparse},
            "domain": natural,
            **dense,
            **{domain_column(name): domains[name] for name in order},
        }
        for split in SPLITS:
            write_split(folder, split, [{name: values[splits[split]] for name, values in table.items()}])
        Schema(
            dataset=self.NAME,
            label="label",
            sparse_features=(
                *(SparseFeature(name, ratings.sizes[name]) for name in sparse),
                SparseFeature("domain", divisions[self.division].num_domains),
            ),
            dense_features=tuple(dense),
            divisions=tuple(divisions[name] for name in order),
            rows={split: len(rows) for split, rows in splits.items()},
            source={
                "protocol": self.protocol,
                "label": "rating > 3" if self.protocol == "multilora" else "rating == 5",
                "split": "random 80/10/10" if self.protocol == "multilora" else "60/20/20 within each domain and label",
                "seed": SPLIT_SEED,
            },
        ).save(folder)


@dataclass(frozen=True)
class MovieLens1M(_MovieLens):
    """MovieLens-1M: 1,000,209 ratings by 6,040 users.

    Args:
        data_dir (str): folder of ratings.dat, users.dat and movies.dat.
        protocol (str): `multilora` or `mlora`.
        division (str): the natural division: gender, age, age3, occupation or random3.

    Raises:
        ValueError: an unknown protocol or division.
    """

    NAME: ClassVar[str] = "movielens-1m"
    FILES: ClassVar[tuple[str, str, str]] = ("ratings.dat", "users.dat", "movies.dat")

    def _read(self) -> Ratings:
        return read_1m(self.data_dir)


@dataclass(frozen=True)
class MovieLens100K(_MovieLens):
    """MovieLens-100k: 100,000 ratings by 943 users, whose ages are put into the brackets of MovieLens-1M.

    Args:
        data_dir (str): folder of u.data, u.user and u.item.
        protocol (str): `multilora` or `mlora`.
        division (str): the natural division: gender, age, age3, occupation or random3.

    Raises:
        ValueError: an unknown protocol or division.
    """

    NAME: ClassVar[str] = "movielens-100k"
    FILES: ClassVar[tuple[str, str, str]] = ("u.data", "u.user", "u.item")

    def _read(self) -> Ratings:
        return read_100k(self.data_dir)


def random_split(rows: int) -> dict[str, Ints]:
    """Cuts rows 80/10/10 at random, as docs/departures.md fixes it.

    Args:
        rows (int): number of rows.

    Returns:
        dict[str, Ints]: the rows of each split, in random order.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(rows)
    first, second = int(0.8 * rows), int(0.1 * rows)
    return {"train": order[:first], "validation": order[first : first + second], "test": order[first + second :]}


def stratified_split(domains: Ints, labels: NDArray[np.bool_]) -> dict[str, Ints]:
    """Cuts rows 60/20/20 within each domain and label (MoE-MLoRA, data sets).

    Args:
        domains (Ints): [n], the rows' natural domains.
        labels (NDArray[np.bool_]): [n].

    Returns:
        dict[str, Ints]: the rows of each split, in random order.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    strata = (domains.astype(np.int64) * 2 + labels)[order]
    by_stratum = np.argsort(strata, kind="stable")
    sizes = np.bincount(strata)
    size = sizes[strata]
    place = np.empty(len(order), dtype=np.int64)
    place[by_stratum] = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[strata[by_stratum]]
    first, second = (size * 0.6).astype(np.int64), (size * 0.8).astype(np.int64)
    return {
        "train": order[place < first],
        "validation": order[(place >= first) & (place < second)],
        "test": order[place >= second],
    }


def random_users(users: Ints, num_users: int, num_domains: int) -> Ints:
    """Domain of each row where users are dealt to domains at random.

    Args:
        users (Ints): [n], the rows' users.
        num_users (int): number of users.
        num_domains (int): N.

    Returns:
        Ints: [n], in [0, N), the same for all rows of a user; domains differ by at most one user.
    """
    result: Ints = (np.random.default_rng(SPLIT_SEED).permutation(num_users) % num_domains).astype(np.int32)[users]
    return result


def activity(users: Ints, train: Ints, num_users: int) -> Ints:
    """Domain of each row under `activity`: 1 where the user has more ratings than the median user.

    Only training rows are counted, so that the division tells nothing about the other splits (MultiLoRA, data sets).

    Args:
        users (Ints): [n], the rows' users.
        train (Ints): the training rows.
        num_users (int): number of users.

    Returns:
        Ints: [n], 0 or 1.
    """
    counts = np.bincount(users[train], minlength=num_users)
    median = np.median(counts[counts > 0]) if len(train) else 0
    result: Ints = (counts > median).astype(np.int32)[users]
    return result
