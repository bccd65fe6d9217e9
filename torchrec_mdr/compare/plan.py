"""From a grid's cells to runs that can be started: options resolved, data prepared, impossible pairs found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from tqdm import tqdm

from torchrec_mdr.compare.grid import Cell, data_name
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.training.experiment import DivisionsClash, Experiment
from torchrec_mdr.training.options import parse

PRETRAIN = "pretrain"
# where things lie, and what the comparison sets itself: no part of what a run is
_PLACES = ("output_dir", "data_dir", "init_checkpoint", "resume", "stage")


@dataclass(frozen=True)
class Run:
    """One run, ready to be started.

    Args:
        cell (Cell): what the grid says.
        division (str): the natural division.
        resolved (Mapping[str, Any]): all options with their values, by dotted names, but those of stages that the
            method does not have.
        backbone_key (str | None): of the pretrained backbone that it shares; None where the method pretrains none.
        plain (bool): whether its pretrained backbone is one that any other method can take up.
        refusal (str | None): why it cannot be run.
    """

    cell: Cell
    division: str
    resolved: Mapping[str, Any]
    backbone_key: str | None
    plain: bool
    refusal: str | None

    @property
    def key(self) -> str:
        """Names its folder and its log."""
        cell = self.cell
        return f"{_place_name(cell, self.division)}-{cell.variant}-seed{cell.seed}"


def plan(cells: Sequence[Cell]) -> list[Run]:
    """Resolves the options of all cells, prepares their data, and builds each model once to see whether it can be.

    Raises:
        ValueError: an option is unknown or impossible, data are missing, or two different runs have one name.
    """
    runs: dict[str, Run] = {}
    for cell in tqdm(cells, desc="checking the grid", leave=False):
        try:
            run = _run(cell)
        except ValueError as error:
            raise ValueError(f"{cell.place}: {error}") from error
        other = runs.setdefault(run.key, run)
        differences = different_options(other.resolved, run.resolved)
        if differences:
            raise ValueError(
                f"{cell.place}: the grid has a run {run.key} with other options already ({differences}); give one of "
                "the variants another name"
            )
    return list(runs.values())


def different_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Says which options differ, of those that both have; empty where none does.

    Options that one side lacks are left out: they came into being, or went, between two versions of the project.

    Example::

        >>> different_options({"seed": 0, "batch_size": 8}, {"seed": 0, "batch_size": 16, "new": 1})
        'batch_size: 8 and 16'
    """
    names = [name for name in one if name in other and name not in _PLACES and one[name] != other[name]]
    return ", ".join(f"{name}: {one[name]} and {other[name]}" for name in names)


def flat_options(text: str) -> dict[str, Any]:
    """The options of a run's `config.yaml`, by dotted names."""
    flat: dict[str, Any] = {}

    def add(prefix: str, content: Any) -> None:
        if isinstance(content, dict) and content:
            for name, value in content.items():
                add(f"{prefix}.{name}" if prefix else name, value)
        else:
            flat[prefix] = content

    add("", yaml.safe_load(text))
    return flat


def _run(cell: Cell) -> Run:
    options = parse(cell.arguments())
    folder = Experiment.prepare_data(options)
    division = options.run.division or Schema.load(folder).divisions[0].name
    resolved, plain = flat_options(options.resolved), options.method.needs_backbone_targets
    try:
        experiment = Experiment.from_options(options, folder)
    except DivisionsClash as error:
        return Run(cell, division, resolved, None, plain, str(error))
    stages = experiment.stages()
    used = {stage.settings for stage in stages}
    resolved = {name: value for name, value in resolved.items() if _concerns(name, used)}
    try:
        experiment.build_model()
    except ValueError as error:
        return Run(cell, division, resolved, None, plain, str(error))
    shares = stages[0].name == PRETRAIN
    key = _backbone_key(cell, division, resolved, stages[0].settings) if shares else None
    return Run(cell, division, resolved, key, plain, None)


def _concerns(name: str, settings: set[str]) -> bool:
    """Whether an option is one of a run with these settings of stages.

    Example::

        >>> _concerns("stages.gate.epochs", {"pretrain"}), _concerns("seed", {"pretrain"})
        (False, True)
    """
    parts = name.split(".")
    return parts[0] != "stages" or parts[1] in settings


def _backbone_key(cell: Cell, division: str, resolved: Mapping[str, Any], pretraining: str) -> str:
    """Names a pretrained backbone by all that reaches it: not what the method and its later stages are."""

    def reaches(name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == "stages":
            return rest.partition(".")[0] == pretraining
        return first not in (*_PLACES, "method", "method_options", "auxiliary_division", "domains")

    what = {name: value for name, value in resolved.items() if reaches(name)}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    return f"{_place_name(cell, division)}-seed{cell.seed}-{digest}"


def _place_name(cell: Cell, division: str) -> str:
    """Data set, division and backbone, as part of a file's name."""
    return f"{data_name(cell.options['dataset'])}-{division}-{cell.backbone}".replace("/", "%2F")
