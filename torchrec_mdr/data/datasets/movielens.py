"""What the MovieLens data sets share: ratings with users and movies, in the protocols of MultiLoRA and MLoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_mdr.data.datasets.base import Choice, Dataset, paper_defaults, stage_defaults
from torchrec_mdr.data.datasets.rating_features import rating_features
from torchrec_mdr.data.schema import SPLITS, Division, domain_column
from torchrec_mdr.data.splits import SPLIT_SEED, random_split, stratified_split
from torchrec_mdr.data.text_table import read_text_table, refuse_rows
from torchrec_mdr.data.writer import write_split

DEFAULT_DIVISIONS = {"multilora": "age3", "mlora": "gender"}
NATURAL_DIVISIONS = ("gender", "age", "age3", "occupation", "random3")
GENDERS = ("F", "M")
AGE_BRACKETS = (1, 18, 25, 35, 45, 50, 56)  # the age that each starts at
AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
AGE3_NAMES = ("under 25", "25-34", "35+")
AGE3_OF_BRACKET = (0, 0, 1, 2, 2, 2, 2)
RANDOM3_NAMES = ("a", "b", "c")
_OLDEST = 120
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
class Ratings:
    """The ratings in file order, joined with their users and movies; every id is contiguous from 0.

    Args:
        rows (pl.DataFrame): columns user, movie, rating, gender, bracket (index into AGE_BRACKETS), age, occupation,
            zip, genre.
        values (dict[str, list[str]]): of user, movie, gender, occupation, zip and genre: the values in id order.
        age_range (tuple[int, int]): youngest and oldest age of the users' file.
    """

    rows: pl.DataFrame
    values: dict[str, list[str]]
    age_range: tuple[int, int]


@dataclass(frozen=True)
class MovieLens(Dataset):
    """Ratings of movies by users whose gender, age and occupation are known.

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
    FILES: ClassVar[tuple[str, str, str]]  # of ratings, users and movies
    SEPARATOR: ClassVar[str]  # in the ratings' file
    OCCUPATIONS: ClassVar[tuple[str, ...]]  # in id order
    GENRES: ClassVar[tuple[str, ...]] = ()  # in id order; those of the movies, by alphabet, where left out

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
    def _users(self, path: str) -> pl.DataFrame:
        """The users' file: user, gender (F or M), age in years, occupation (index into OCCUPATIONS), zip."""

    @abstractmethod
    def _movies(self, path: str) -> pl.DataFrame:
        """The movies' file: movie, genre by its name."""

    def _read(self) -> Ratings:
        ratings_path, users_path, movies_path = self.sources
        users, movies = self._users(users_path), self._movies(movies_path)
        fields = ("user", "movie", "rating", "timestamp")
        ratings = read_text_table(ratings_path, self.SEPARATOR, fields, fields)
        refuse_rows(ratings, ratings_path, "rating", ~pl.col("rating").is_between(1, 5), "a number from 1 to 5")
        refuse_rows(users, users_path, "gender", ~pl.col("gender").is_in(GENDERS), "F or M")
        for table, path, name in ((users, users_path, "user"), (movies, movies_path, "movie")):
            refuse_rows(table, path, name, ~pl.col(name).is_first_distinct(), "a number that no earlier line has")
        genres = list(self.GENRES) or movies["genre"].unique().sort().to_list()
        zips = users["zip"].unique().sort().to_list()
        values = {
            "user": users["user"].cast(pl.String).to_list(),
            "movie": movies["movie"].cast(pl.String).to_list(),
            "gender": list(GENDERS),
            "occupation": list(self.OCCUPATIONS),
            "zip": zips,
            "genre": genres,
        }
        movies = movies.with_columns(_places("genre", genres))
        users = users.with_columns(
            _places("zip", zips),
            gender=(pl.col("gender") == GENDERS[1]).cast(pl.Int32),
            # a bracket starts at its age, except the first, which starts at birth
            bracket=pl.sum_horizontal(pl.col("age") >= age for age in AGE_BRACKETS[1:]).cast(pl.Int32),
        )
        rows = ratings
        for table, name, file in ((users, "user", self.FILES[1]), (movies, "movie", self.FILES[2])):
            rows = rows.join(table.with_row_index("index"), on=name, how="left", maintain_order="left")
            lost = rows["index"].is_null().arg_true()
            if len(lost):
                raise ValueError(
                    f"{ratings_path}, line {lost[0] + 1}: {name} {rows[name][lost[0]]} has no row in {file}; "
                    "restore the original files, all of the same data set"
                )
            rows = rows.drop(name).rename({"index": name})
        columns = ("user", "movie", "rating", "gender", "bracket", "age", "occupation", "zip", "genre")
        ages = (int(users["age"].min()), int(users["age"].max()))  # type: ignore[arg-type]
        return Ratings(rows.select(pl.col(name).cast(pl.Int32) for name in columns), values, ages)

    def write(self, folder: str) -> None:
        """Writes the three splits and `schema.json` into an existing folder.

        Raises:
            ValueError: a file is missing, or one of its lines is faulty.
        """
        ratings = self._read()
        columns = {name: ratings.rows[name].to_numpy() for name in ratings.rows.columns}
        num_users = len(ratings.values["user"])
        domains = {
            "gender": columns["gender"],
            "age": columns["bracket"],
            "age3": np.asarray(AGE3_OF_BRACKET)[columns["bracket"]],
            "occupation": columns["occupation"],
            "random3": random_users(columns["user"], num_users, len(RANDOM3_NAMES)),
        }
        divisions = {
            "gender": Division("gender", len(GENDERS), GENDERS),
            "age": Division("age", len(AGE_NAMES), AGE_NAMES),
            "age3": Division("age3", len(AGE3_NAMES), AGE3_NAMES),
            "occupation": Division("occupation", len(self.OCCUPATIONS), self.OCCUPATIONS),
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
        domains["activity"] = activity(columns["user"], splits["train"], num_users)
        table: Mapping[str, Ints | NDArray[np.floating[Any]]] = {
            "label": label.astype(np.float32),
            **{name: columns[name] for name in sparse},
            "domain": natural,
            **dense,
            **{domain_column(name): domains[name] for name in order},
        }
        for split in SPLITS:
            write_split(folder, split, [{name: values[splits[split]] for name, values in table.items()}])
        brackets = [sum(age >= start for start in AGE_BRACKETS[1:]) for age in range(_OLDEST + 1)]
        _, rows_of_users = np.unique(columns["user"], return_index=True)
        plan = rating_features(
            self.NAME,
            "rating > 3" if self.protocol == "multilora" else "rating = 5",
            ratings.values,
            sparse,
            ratings.age_range if dense else None,
            [divisions[name] for name in order],
            {
                "age": {str(age): bracket for age, bracket in enumerate(brackets)},
                "age3": {str(age): AGE3_OF_BRACKET[bracket] for age, bracket in enumerate(brackets)},
                **{
                    name: {
                        ratings.values["user"][columns["user"][row]]: int(domains[name][row]) for row in rows_of_users
                    }
                    for name in ("random3", "activity")
                },
            },
        )
        plan.save(folder)
        plan.schema(
            {split: len(rows) for split, rows in splits.items()},
            {
                "protocol": self.protocol,
                "label": "rating > 3" if self.protocol == "multilora" else "rating == 5",
                "split": "random 80/10/10" if self.protocol == "multilora" else "60/20/20 within each domain and label",
                "seed": SPLIT_SEED,
            },
        ).save(folder)


def _places(column: str, values: Sequence[str]) -> pl.Expr:
    """The place of each of a column's texts among values."""
    return pl.col(column).replace_strict(list(values), range(len(values)), return_dtype=pl.Int32)


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
