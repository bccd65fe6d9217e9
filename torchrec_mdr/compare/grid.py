"""Reads a grid file: which runs there are, and what they are compared with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import yaml

from torchrec_mdr.compare.figures import BACKBONE_ROW
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS
from torchrec_mdr.storage import located, read_text
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.datasets import FOLDER_HINT, is_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
# options that the grid sets in a way of its own
_OWN = {
    "method": "name it under 'methods'",
    "backbone": "name it under 'backbones'",
    "seed": "name it under 'seeds'",
    "output_dir": "the comparison chooses the folders",
    "resume": "interrupted runs are continued without it",
    "stage": "a comparison runs all stages",
    "init_checkpoint": "the comparison shares pretrained backbones itself",
    "config": "write the options here",
}


@dataclass(frozen=True)
class Cell:
    """One run as the grid file asks for it.

    Args:
        variant (str): the name it is compared under.
        method (str): a key of METHODS.
        backbone (str): a key of BACKBONES.
        options (Mapping[str, Any]): all options of `torchrec_mdr.train`, by dotted names.
        seed (int): of the run.
        place (str): where in the file, for errors.
        own (frozenset[str]): options that the variant's own entry names.
    """

    variant: str
    method: str
    backbone: str
    options: Mapping[str, Any]
    seed: int
    place: str
    own: frozenset[str] = frozenset()

    def arguments(self) -> list[str]:
        """The command line of `torchrec_mdr.train`, without folders."""
        chosen = {"method": self.method, "backbone": self.backbone, "seed": self.seed}
        return [f"--{name}={_argument(value)}" for name, value in {**chosen, **self.options}.items()]


@dataclass(frozen=True)
class Grid:
    """What a grid file says.

    Args:
        title (str): of the report.
        cells (tuple[Cell, ...]): the runs, in the file's order.
        variants (Mapping[str, str]): the method of each variant.
        baselines (tuple[str, ...]): variants that the best baseline is chosen from.
        published (Mapping[str, Mapping[str, float]]): figures by label, then by `VARIANT` or
            `VARIANT/BACKBONE/DIVISION`.
        text (str): the file.
        unequal (bool): whether variants may differ in settings that they do not name.
    """

    title: str
    cells: tuple[Cell, ...]
    variants: Mapping[str, str]
    baselines: tuple[str, ...]
    published: Mapping[str, Mapping[str, float]]
    text: str
    unequal: bool = False


def read_grid(path: str, data_dir: str | None = None) -> Grid:
    """Reads a grid file.

    Args:
        path (str): a YAML file.
        data_dir (str | None): folder of original files, for the data sets that are made from some.

    Raises:
        ValueError: the file cannot be read, or says something that has no meaning; one sentence.
    """
    try:
        text = read_text(located(path))
    except ValueError as error:
        raise ValueError(f"the grid file {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the grid file {path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _grid(content, text, os.path.splitext(os.path.basename(path))[0], data_dir)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _grid(content: Any, text: str, stem: str, data_dir: str | None) -> Grid:
    top = _mapping(
        content, "the file", ("title", "options", "seeds", "grids", "published", "baselines", "unequal"), ("grids",)
    )
    title = top.get("title", stem)
    if not isinstance(title, str):
        raise ValueError(f"title is {title!r}; write a line of text")
    common = _options(top.get("options"), "options")
    seeds = _seeds(top.get("seeds", [0]), "seeds")
    variants: dict[str, tuple[str, Mapping[str, Any]]] = {}
    cells: list[Cell] = []
    for number, entry in enumerate(_list(top["grids"], "grids")):
        cells += _cells(entry, f"grids[{number}]", common, seeds, variants, data_dir)
    methods = {name: method for name, (method, _) in variants.items()}
    default = [name for name, method in methods.items() if METHODS[method].is_baseline]
    baselines = tuple(_list(top["baselines"], "baselines") if top.get("baselines") is not None else default)
    for name in baselines:
        _known(name, methods, "baselines")
    unequal = top.get("unequal", False)
    if not isinstance(unequal, bool):
        raise ValueError(f"unequal is {unequal!r}; write true or false")
    return Grid(title, tuple(cells), methods, baselines, _published(top.get("published"), cells), text, unequal)


def _cells(
    entry: Any,
    place: str,
    common: Mapping[str, Any],
    seeds: list[int],
    variants: dict[str, tuple[str, Mapping[str, Any]]],
    data_dir: str | None,
) -> Iterator[Cell]:
    known = ("backbones", "divisions", "datasets", "methods", "options", "seeds")
    grid = _mapping(entry, place, known, ("backbones", "methods"))
    backbones = _list(grid["backbones"], f"{place}.backbones")
    for name in backbones:
        _known(name, BACKBONES, f"{place}.backbones")
    mine = {**common, **_options(grid.get("options"), f"{place}.options")}
    datasets = _list(grid.get("datasets", [mine.get("dataset", RunConfig.dataset)]), f"{place}.datasets")
    for name in datasets:
        if not (isinstance(name, str) and is_folder(name)):
            _known(name, DATASETS, f"{place}.datasets", FOLDER_HINT)
    divisions = _list(grid.get("divisions", [mine.get("division")]), f"{place}.divisions")
    own_seeds = _seeds(grid.get("seeds", seeds), f"{place}.seeds")
    entries = _list(grid["methods"], f"{place}.methods")
    named = [_variant(one, f"{place}.methods[{i}]", variants) for i, one in enumerate(entries)]
    # backbones outside, variants inside: what shares a pretrained backbone runs one after the other
    for dataset, division, backbone, seed in product(datasets, divisions, backbones, own_seeds):
        for name, method, extra in named:
            options = {**_protocol(dataset, named), **mine, "dataset": dataset, **extra}
            if division is not None:
                options["division"] = division
            if data_dir is not None and _reads_files(dataset):
                options["data_dir"] = data_dir
            where = f"{place}, variant '{name}' on '{backbone}'"
            yield Cell(name, method, backbone, options, seed, where, frozenset(extra))


def _protocol(dataset: str, named: list[tuple[str, str, Mapping[str, Any]]]) -> dict[str, str]:
    """The one protocol of all variants where the grid names none: that of the first method that is no baseline."""
    protocols = DATASETS[dataset].protocols if dataset in DATASETS else ()
    if not protocols:
        return {}
    methods = [METHODS[method] for _, method, _ in named]
    first = next((method for method in methods if not method.is_baseline), methods[0])
    return {"protocol": DATASETS[dataset].default_protocol(first.paper)}


def _variant(
    entry: Any, place: str, variants: dict[str, tuple[str, Mapping[str, Any]]]
) -> tuple[str, str, Mapping[str, Any]]:
    """Name, method and options of an entry under 'methods'; noted in `variants`."""
    if isinstance(entry, str):
        entry = {"method": entry}
    content = _mapping(entry, place, ("name", "method", "options"), ("method",))
    method = content["method"]
    _known(method, METHODS, place)
    name = content.get("name", method)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BACKBONE_ROW:
        raise ValueError(
            f"{place} is named {name!r}; use letters, digits and _ . + -, and not '{BACKBONE_ROW}', which is the "
            "pretrained one in reports"
        )
    options = _options(content.get("options"), f"{place}.options")
    if variants.setdefault(name, (method, options)) != (method, options):
        raise ValueError(f"{place}: variant '{name}' stands for two different things; give one of them another name")
    return name, method, options


def _published(content: Any, cells: list[Cell]) -> dict[str, dict[str, float]]:
    labels = _mapping(content or {}, "published")
    for label, figures in labels.items():
        place = f"published '{label}'"
        for key, value in _mapping(figures, place).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{place}: '{key}' is {value!r}; write a number")
            _check_figure(key, cells, place)
    return {label: {key: float(value) for key, value in figures.items()} for label, figures in labels.items()}


def _check_figure(key: str, cells: list[Cell], place: str) -> None:
    """Refuses a figure whose key stands for no group of runs, or for several."""
    variant, *group = key.split("/", 2)
    if len(group) == 1:
        raise ValueError(f"{place}: write '{key}' as VARIANT or as VARIANT/BACKBONE/DIVISION")
    _known(variant, [*dict.fromkeys(cell.variant for cell in cells), BACKBONE_ROW], place)
    meant = [cell for cell in cells if variant in (cell.variant, BACKBONE_ROW)]
    groups = {(cell.options["dataset"], cell.backbone, cell.options.get("division")) for cell in meant}
    if not group and len(groups) > 1:
        raise ValueError(f"{place}: '{variant}' runs in several places; write {variant}/BACKBONE/DIVISION")
    if group and not any(group[0] == backbone and division in (None, group[1]) for _, backbone, division in groups):
        raise ValueError(f"{place}: the grid has no run '{key}'; correct the name, or leave the figure out")


def _options(content: Any, place: str) -> dict[str, Any]:
    """Options by dotted names, whether they are written dotted or nested."""
    flat: dict[str, Any] = {}
    for name, value in _mapping({} if content is None else content, place).items():
        inner = _options(value, f"{place}.{name}") if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{rest}".rstrip("."): one for rest, one in inner.items()}
    for name, mend in _OWN.items():
        if name in flat:
            raise ValueError(f"{place} holds '{name}'; leave it out: {mend}")
    return flat


def _mapping(
    content: Any, place: str, known: tuple[str, ...] | None = None, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{place} is no mapping of names to values")
    for key in content:
        if known is not None and key not in known:
            raise ValueError(f"{place} has '{key}', which means nothing here; choose from {', '.join(known)}")
    for key in required:
        if key not in content:
            raise ValueError(f"{place} lacks '{key}'; add it")
    return content


def _list(content: Any, place: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"{place} is no list; write at least one entry in [ ]")
    return content


def _seeds(content: Any, place: str) -> list[int]:
    seeds = _list(content, place)
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"{place} is {seeds}; write whole numbers, each once")
    return seeds


def _known(name: Any, known: Any, place: str, hint: str = "") -> None:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{place} names {name!r}, which is unknown; choose one of {', '.join(known)}{hint}")


def _reads_files(dataset: str) -> bool:
    return dataset in DATASETS and any(field.name == "data_dir" for field in fields(DATASETS[dataset]))


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def data_name(dataset: str) -> str:
    """A data set's name, or that of the folder it lies in.

    Example::

        >>> data_name("./somewhere/my_data/")
        'my_data'
    """
    return os.path.basename(os.path.normpath(dataset))
