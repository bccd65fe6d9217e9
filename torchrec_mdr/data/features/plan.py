"""What was decided about the columns of a table: `features.yaml`, which turns raw rows into ids and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import yaml

from torchrec_mdr.data.feature_files import FEATURES_FILE, VOCABULARIES_FILE
from torchrec_mdr.data.features.fields import built
from torchrec_mdr.data.features.keys import Form, Marks, Unit
from torchrec_mdr.data.features.vocabulary import Vocabularies
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.storage import isfile, read_text, write_text

if TYPE_CHECKING:
    from torchrec_mdr.data.features.encode import EncodedRows, Encoder

FORMAT_VERSION = 1
MISSING, UNKNOWN, FIRST_KNOWN = 0, 1, 2
TIME_PARTS = {"hour": 24, "weekday": 7, "month": 12}


@dataclass(frozen=True)
class LabelPlan:
    """The label: a column, or a rule over columns.

    Args:
        name (str): its name in the prepared data.
        column (str | None): the raw column; None where a rule makes the label.
        rule (str | None): a condition in SQL's words; rows where it holds are positive.
        negative (int): what a column's negative rows hold, 0 or -1; 1 is positive.
    """

    name: str
    column: str | None = None
    rule: str | None = None
    negative: int = 0


@dataclass(frozen=True)
class SparsePlan:
    """A categorical feature.

    Args:
        name (str): of the feature.
        column (str): the raw column.
        num_embeddings (int): ids lie below it.
        kind (Literal): `category`, `list` (several a row), `time` (a part of a moment) or `domain` (the
            row's domain; an unknown one has the id after the last, if there is one).
        form (Form): what its categories are; see :func:`torchrec_mdr.data.features.keys.key`.
        vocabulary (str | None): name of its vocabulary; None where ids are hashed, a part's number, or a domain's.
        has_missing (bool): whether training rows lack a value; if none does, a missing value is an unknown one.
        unknown (int | None): the id of unknown values; None where there is none, so that rows with them are bad.
        separator (str | None): between the entries of a list that is written as text.
        max_length (int): most entries of a list that are taken.
        pooling (Literal): how a list's embeddings become one, `mean` or `sum`.
        part (str | None): of a moment: hour, weekday (from Monday) or month.
        unit (Unit | None): of a moment that is a number since 1970.
        division (str | None): whose domains a feature of kind `domain` holds.
    """

    name: str
    column: str
    num_embeddings: int
    kind: Literal["category", "list", "time", "domain"] = "category"
    form: Form = "text"
    vocabulary: str | None = None
    has_missing: bool = True
    unknown: int | None = UNKNOWN
    separator: str | None = None
    max_length: int = 0
    pooling: Literal["mean", "sum"] = "mean"
    part: str | None = None
    unit: Unit | None = None
    division: str | None = None


@dataclass(frozen=True)
class DensePlan:
    """A number: ((log1p of) value - mean) / std, cut to [-clip, clip]; or 1 where the value is missing.

    mean and std may also be a smallest value and a range, as some data sets have it.

    Args:
        name (str): of the feature.
        column (str): the raw column.
        kind (Literal): `number`, or `missing` for the column that marks missing values.
        least (float): what smaller values are raised to, before all else.
        log1p (bool): takes `sign(x) log(1 + |x|)` first.
        median (float): of the training rows, for missing values.
        mean (float): of the training rows, after log1p.
        std (float): the same.
        clip (float): largest magnitude after scaling.
        marks (Marks): how text writes it; see :func:`torchrec_mdr.data.features.keys.number`.
    """

    name: str
    column: str
    kind: Literal["number", "missing"] = "number"
    least: float = -math.inf
    log1p: bool = False
    median: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    clip: float = 10.0
    marks: Marks = "plain"


@dataclass(frozen=True)
class DivisionPlan:
    """A division: one domain a value, in the vocabulary `domain_NAME`.

    Args:
        name (str): of the division.
        column (str): the raw column.
        names (tuple[str, ...]): the domains' names, in id order.
        form (Form): see :class:`SparsePlan`.
        missing (int | None): the domain of rows without a value; None where such rows are unknown.
        others (int | None): the domain of values that the vocabulary lacks; None where such rows are unknown.
    """

    name: str
    column: str
    names: tuple[str, ...]
    form: Form = "text"
    missing: int | None = None
    others: int | None = None

    @property
    def vocabulary(self) -> str:
        """Name of its vocabulary."""
        return f"domain_{self.name}"


@dataclass(frozen=True)
class FeaturePlan:
    """All decisions about the columns of a table, and what they need to know of the training rows.

    The same code encodes the prepared splits and the rows to be scored: :meth:`encode`.

    Args:
        dataset (str): name of the data set.
        label (LabelPlan): the label.
        sparse (tuple[SparsePlan, ...]): categorical features, in the schema's order.
        dense (tuple[DensePlan, ...]): numbers, in the schema's order.
        divisions (tuple[DivisionPlan, ...]): the natural one first.
        weight (str | None): raw column of the rows' weights.
        weight_mean (float): mean weight of the training rows, by which weights are divided.
        left_out (dict[str, str]): raw columns that are no features, and why.
        vocabularies (Vocabularies): ids by value.
    """

    dataset: str
    label: LabelPlan
    sparse: tuple[SparsePlan, ...]
    dense: tuple[DensePlan, ...]
    divisions: tuple[DivisionPlan, ...]
    weight: str | None = None
    weight_mean: float = 1.0
    left_out: dict[str, str] = field(default_factory=dict)
    vocabularies: Vocabularies = field(default_factory=Vocabularies, compare=False, metadata={"beside": True})

    def save(self, folder: str) -> None:
        """Writes `features.yaml` and `vocabularies.parquet` into a folder."""
        content = {name: value for name, value in _plain(self).items() if name != "vocabularies"}
        sizes = self.vocabularies.sizes
        self.vocabularies.save(f"{folder}/{VOCABULARIES_FILE}")
        text = yaml.safe_dump(
            {"format_version": FORMAT_VERSION, **content, "vocabularies": sizes}, sort_keys=False, allow_unicode=True
        )
        write_text(f"{folder}/{FEATURES_FILE}", text)

    @staticmethod
    def load(folder: str) -> FeaturePlan:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: a file is missing, damaged, or of another version.
        """
        path = f"{folder.rstrip('/')}/{FEATURES_FILE}"
        if not isfile(path):
            raise ValueError(
                f"{folder} has no {FEATURES_FILE}, which says how raw rows become features; it is there where the data "
                "came from python -m torchrec_mdr.prepare --input"
            )
        try:
            raw = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else raw
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, not {found!r}; prepare the data anew")
        sizes = raw.pop("vocabularies", {})
        raw.pop("format_version")
        try:
            plan: FeaturePlan = built(FeaturePlan, raw, "the file")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        vocabularies = Vocabularies.load(f"{folder.rstrip('/')}/{VOCABULARIES_FILE}")
        empty = pl.DataFrame(schema={"value": pl.String, "id": pl.Int64})  # of which a file has no row
        without = {name: empty for name, size in sizes.items() if not size}
        vocabularies = Vocabularies({**without, **vocabularies.tables})
        if vocabularies.sizes != sizes:
            raise ValueError(
                f"{folder}/{VOCABULARIES_FILE} does not belong to {FEATURES_FILE}; restore both from one preparation"
            )
        object.__setattr__(plan, "vocabularies", vocabularies)
        return plan

    def raw_columns(self, need_label: bool = False) -> list[str]:
        """The raw columns that :meth:`encode` needs."""
        columns = [division.column for division in self.divisions]
        columns += [feature.column for feature in self.sparse] + [feature.column for feature in self.dense]
        if need_label:
            columns += self.label_columns() + ([self.weight] if self.weight is not None else [])
        return list(dict.fromkeys(columns))

    def label_columns(self) -> list[str]:
        """The raw columns that the label is made from."""
        if self.label.rule is not None:
            return list(pl.sql_expr(self.label.rule).meta.root_names())
        assert self.label.column is not None
        return [self.label.column]

    def schema(self, rows: Mapping[str, int], source: Mapping[str, Any] | None = None) -> Schema:
        """The schema of the encoded rows.

        Args:
            rows (Mapping[str, int]): rows of each split.
            source (Mapping[str, Any] | None): how the data were made.
        """
        return Schema(
            dataset=self.dataset,
            label=self.label.name,
            sparse_features=tuple(
                SparseFeature(feature.name, feature.num_embeddings, feature.kind == "list", feature.pooling)
                for feature in self.sparse
            ),
            dense_features=tuple(feature.name for feature in self.dense),
            divisions=tuple(Division(division.name, names=division.names) for division in self.divisions),
            rows=dict(rows),
            source=dict(source or {}),
            weight=None if self.weight is None else WEIGHT,
        )

    def encode(self, frame: pl.DataFrame, need_label: bool = False) -> EncodedRows:
        """Turns raw rows into the columns of the prepared data.

        Args:
            frame (pl.DataFrame): raw rows, in any types; columns that are not needed are ignored.
            need_label (bool): whether to encode the label and, where there is one, the weight.

        Returns:
            EncodedRows: as many rows, in the same order.

        Raises:
            ValueError: a column that is needed is missing.
        """
        return self._encoder(frame, need_label)

    @cached_property
    def _encoder(self) -> Encoder:
        from torchrec_mdr.data.features.encode import Encoder

        return Encoder(self)


WEIGHT = "row_weight"


def _plain(plan: FeaturePlan) -> dict[str, Any]:
    """A plan as YAML has it: tuples are lists, and what has its default is left out."""
    content = {name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "vocabularies"}
    return {name: _simple(value) for name, value in content.items()}


def _simple(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_simple(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        defaults = {name: f.default for name, f in value.__dataclass_fields__.items()}
        return {
            name: _simple(entry)
            for name, entry in ((name, getattr(value, name)) for name in asdict(value))
            if entry != defaults[name]
        }
    return value
