"""What a data set is to the rest of the package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torchrec_mdr.data.schema import Schema

COMMON_OPTIONS = ("data_dir", "division", "protocol")  # of a run, which a data set takes where it has such a field
STAGES = ("pretrain", "adapt", "fuse", "gate", "joint")

# of neutral settings
STEPS_AN_EPOCH = 64
FEWEST_VALIDATION_ROWS, MOST_VALIDATION_ROWS = 3_000, 1_000_000
POOLED_BELOW = 500
MOST_ROWS = 200_000  # that few rows are passed over for, again and again
NEUTRAL_OPTIONS = {"method_options.gate_start": "own"}  # of methods that have them, on data that nothing was chosen on

# what the papers publish; of MultiLoRA's grid, one setting (docs/departures.md)
_PAPERS: dict[str, dict[str, Any]] = {
    "mlora": {
        "embeddings.dim": 8,
        "batch_size": 1024,
        "backbone_options.hidden": [256, 128, 64],
        "backbone_options.dropout": 0.5,
    },
    "multilora": {
        "embeddings.dim": 16,
        "batch_size": 4096,
        "backbone_options.hidden": [256, 128],
        "backbone_options.batch_norm": True,
    },
}
_PAPERS_STAGES: dict[str, dict[str, Any]] = {
    "mlora": {"epochs": 30, "patience": 3, "learning_rate": 1e-3, "monitor": "mean_domain_auc", "embedding_l2": 1e-5},
    "multilora": {"epochs": 30, "patience": 5, "learning_rate": 1e-3, "weight_decay": 1e-5},
}


class Choice(NamedTuple):
    """What defaults depend on, by name.

    Args:
        method (str): the method.
        backbone (str): the backbone.
        paper (str): whose settings the method is published with, `mlora` or `multilora`.
        protocol (str | None): of the data set, where it knows several.
        recipe (str): `recommended` or `paper`.
    """

    method: str
    backbone: str
    paper: str
    protocol: str | None
    recipe: str


@dataclass(frozen=True)
class Dataset(ABC):
    """Options of a data set, its defaults, and how it is written in prepared form.

    A field named `data_dir`, `division` or `protocol` takes the run's option of that name; other fields are the data
    set's own options. Defaults are plain values by dotted names of options, as `--print_config` shows them.
    """

    protocols: ClassVar[tuple[str, ...]] = ()  # how the data may be labelled and split; none where there is one way
    origin: ClassVar[str] = ""  # where its original files come from, for those who lack one

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of the files that the data set is made from."""
        return ()

    @abstractmethod
    def write(self, folder: str) -> None:
        """Writes the three splits and `schema.json` into an existing folder.

        Raises:
            ValueError: a source file is missing or faulty.
        """

    @classmethod
    def default_protocol(cls, paper: str) -> str | None:
        """The protocol of a run that names none: the paper's own where the data set knows it."""
        return paper if paper in cls.protocols else next(iter(cls.protocols), None)

    @classmethod
    @abstractmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """The natural division and the auxiliary ones of a run that names none, in the order to take them."""

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """Default values of options, by dotted names: the paper's, or neutral ones that hold for any data."""
        return paper_defaults(choice.paper) if choice.recipe == "paper" else dict(NEUTRAL_OPTIONS)


def prepared_dataset(folder: str) -> type[Dataset]:
    """A folder of prepared data as a data set: its schema's divisions, and neutral defaults.

    Raises:
        ValueError: the folder holds no prepared data.
    """
    schema = Schema.load(folder)

    class Prepared(Dataset):
        @classmethod
        def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
            return tuple(division.name for division in schema.divisions)

        @classmethod
        def defaults(cls, choice: Choice) -> dict[str, Any]:
            if choice.recipe == "paper":
                return paper_defaults(choice.paper)
            return neutral_defaults(schema.rows["train"])

        def write(self, folder: str) -> None:
            raise ValueError(f"{folder} is prepared already")

    return Prepared


def neutral_defaults(train_rows: int) -> dict[str, Any]:
    """Settings for data that nobody has tuned anything on, by dotted names of options; docs/recipes.md says why these.

    What counts steps elsewhere counts rows here, so that few rows are trained on long enough, and many not too long.

    Args:
        train_rows (int): of the data set.

    Example::

        >>> neutral_defaults(3200)["batch_size"], neutral_defaults(8_000_000)["batch_size"]
        (64, 4096)
    """
    power = round(math.log2(max(train_rows, 1) / STEPS_AN_EPOCH))
    validation_rows = min(max(train_rows, FEWEST_VALIDATION_ROWS), MOST_VALIDATION_ROWS)
    settings = {
        "epochs": min(max(MOST_ROWS // max(train_rows, 1), 20), 200),
        "learning_rate": 1e-3,
        "embedding_l2": 0.01,
        "ema_rows": max(train_rows // 2, 1),
        "validation_rows": validation_rows,
        "patience_rows": 5 * validation_rows,
        "logloss_tolerance": 0.01,
        "pooled_below": POOLED_BELOW,
    }
    values = {"embeddings.dim": 16, "batch_size": 2 ** min(max(power, 6), 12), **NEUTRAL_OPTIONS}
    return values | stage_defaults(settings) | stage_defaults({"learning_rate": 1e-2}, ("gate",))


def paper_defaults(paper: str) -> dict[str, Any]:
    """A paper's published settings, by dotted names of options.

    Example::

        >>> paper_defaults("mlora")["stages.adapt.monitor"]
        'mean_domain_auc'
    """
    return _PAPERS[paper] | stage_defaults(_PAPERS_STAGES[paper])


def stage_defaults(settings: dict[str, Any], stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
    """Settings of stages, by dotted names of options.

    Example::

        >>> stage_defaults({"epochs": 3}, ("adapt",))
        {'stages.adapt.epochs': 3}
    """
    return {f"stages.{stage}.{option}": value for stage in stages for option, value in settings.items()}
