"""The command line of a run: typed options, configuration files, and what method, backbone and data set add."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Protocol

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.data.datasets.base import COMMON_OPTIONS, Choice, Dataset, prepared_dataset
from torchrec_mdr.methods.base import Method
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS
from torchrec_mdr.storage import expand
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.datasets import FOLDER_HINT, is_folder

RECIPES = ("recommended", "paper")
_CHOSEN = {"method": "mlora", "backbone": "mlp", "dataset": "synthetic", "protocol": None, "recipe": "recommended"}


class _Main(Protocol):
    def __call__(self, args: Sequence[str] | None = None) -> int: ...


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Args:
        run (RunConfig): options of every run.
        method (Method): the method with its own options.
        backbone (BackboneConfig): the backbone with its own options.
        dataset (dict[str, Any]): the data set's own options; none for a folder of prepared data.
        resolved (str): all of it as YAML, to be run again with --config.
    """

    run: RunConfig
    method: Method
    backbone: BackboneConfig
    dataset: dict[str, Any]
    resolved: str


def parse(args: Sequence[str]) -> Options:
    """Reads command-line arguments: defaults, then configuration files in their order, then options.

    Args:
        args (Sequence[str]): the arguments; `--help` and `--print_config` end the process.

    Raises:
        ValueError: an option is unknown or has an impossible value, or a file cannot be read; one sentence.
    """
    paths, given = _split(args)
    stored: dict[str, Any] = {}
    for path in paths:
        stored = _merged(stored, _read(path))
    chosen = {name: _last(given, name, stored.get(name)) or default for name, default in _CHOSEN.items()}
    method, backbone, dataset = _kinds(chosen)
    parser = _Parser(prog="torchrec_mdr.train", description="Trains one model for many domains.", exit_on_error=True)
    parser.add_argument("--config", action="config", help="options from YAML files; the later ones win")
    parser.add_class_arguments(RunConfig, as_group=False)
    parser.add_class_arguments(method, "method_options")
    parser.add_class_arguments(backbone, "backbone_options")
    if chosen["dataset"] in DATASETS:
        parser.add_class_arguments(dataset, "dataset_options", skip=set(COMMON_OPTIONS), instantiate=False)
    natural = _last(given, "division", stored.get("division"))
    parser.set_defaults(_defaults(chosen, natural, method, backbone, dataset))
    values = parser.parse_object(stored)
    values = parser.parse_args(given, namespace=values)
    for name, value in chosen.items():
        assert values[name] == value, f"{name} was read as {value} and as {values[name]}"
    built = parser.instantiate_classes(values)
    known = {name: value for name, value in vars(built).items() if name in RunConfig.__dataclass_fields__}
    values.pop("config", None)
    return Options(
        RunConfig(**known),
        built.method_options,
        built.backbone_options,
        dict(vars(values.get("dataset_options") or Namespace())),
        parser.dump(values, skip_none=False),
    )


def fail_with_sentence(main: Callable[[Sequence[str] | None], int]) -> _Main:
    """Makes a command end with one sentence on stderr and exit code 2 where its input is bad."""

    @functools.wraps(main)
    def run(args: Sequence[str] | None = None) -> int:
        try:
            return main(args)
        except (ValueError, OSError, ArgumentError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return run


class _Parser(ArgumentParser):
    """Says what is wrong in one sentence, without the list of all options that --help gives."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{' '.join(message.split())} (all options: --help)")


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files, in order, and the other arguments."""
    paths: list[str] = []
    given: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--config":
            paths.append(next(rest, ""))
        elif arg.startswith("--config="):
            paths.append(arg.removeprefix("--config="))
        else:
            given.append("--resume=true" if arg == "--resume" else arg)  # a flag here, a value in a file
    return paths, given


def _last(given: Sequence[str], name: str, stored: Any) -> Any:
    """The last value that arguments give an option; what is stored where they give none."""
    for i in reversed(range(len(given))):
        if given[i].startswith(f"--{name}="):
            return given[i].removeprefix(f"--{name}=")
        if given[i] == f"--{name}" and i + 1 < len(given):
            return given[i + 1]
    return stored


def _read(path: str) -> dict[str, Any]:
    try:
        with open(expand(path), encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no options, but {type(content).__name__}")
    return _nested(content, path)


def _nested(content: Mapping[Any, Any], path: str) -> dict[str, Any]:
    """Options as nested mappings, whether they are written dotted or nested."""
    nested: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"--config {path} has the option {name!r}, which is no name")
        *outer, last = name.split(".")
        inner: dict[str, Any] = {last: _nested(value, path) if isinstance(value, dict) else value}
        for one in reversed(outer):
            inner = {one: inner}
        nested = _merged(nested, inner)
    return nested


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings in one; the second wins."""
    merged = dict(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _kinds(chosen: dict[str, Any]) -> tuple[type[Method], type[BackboneConfig], type[Dataset]]:
    """The classes of method, backbone and data set; fills in the data set's protocol."""
    METHODS.check(chosen["method"], "--method")
    BACKBONES.check(chosen["backbone"], "--backbone")
    method: type[Method] = METHODS[chosen["method"]]
    if chosen["recipe"] not in RECIPES:
        raise ValueError(f"--recipe '{chosen['recipe']}' is unknown; choose one of {', '.join(RECIPES)}")
    if is_folder(str(chosen["dataset"])):
        dataset = prepared_dataset(expand(chosen["dataset"]))
    else:
        DATASETS.check(chosen["dataset"], "--dataset", FOLDER_HINT)
        dataset = DATASETS[chosen["dataset"]]
    if chosen["protocol"] is None:
        chosen["protocol"] = dataset.default_protocol(method.paper)
    elif chosen["protocol"] not in dataset.protocols:
        allowed = f"choose one of {', '.join(dataset.protocols)}" if dataset.protocols else "leave it out"
        raise ValueError(f"--protocol '{chosen['protocol']}' is unknown to data set '{chosen['dataset']}'; {allowed}")
    return method, BACKBONES[chosen["backbone"]], dataset


def _defaults(
    chosen: Mapping[str, Any],
    natural: str | None,
    method: type[Method],
    backbone: type[BackboneConfig],
    dataset: type[Dataset],
) -> dict[str, Any]:
    """Default values of options, by dotted names: the data set's, and what the method asks for."""
    choice = Choice(chosen["method"], chosen["backbone"], method.paper, chosen["protocol"], chosen["recipe"])
    divisions = dataset.default_divisions(choice.protocol)
    natural = natural or divisions[0]
    auxiliary = [name for name in divisions if name != natural][: method.min_divisions - 1]
    values = {**dataset.defaults(choice), **method.stage_settings}
    options = {f"backbone_options.{field.name}" for field in fields(backbone)}
    values = {k: v for k, v in values.items() if not k.startswith("backbone_options.") or k in options}
    return values | dict(chosen) | {"division": natural, "auxiliary_division": auxiliary or None}
