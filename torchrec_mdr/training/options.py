"""The command line of a run: typed options, configuration files, and what method, backbone and data set add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml
from jsonargparse import Namespace

from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.data.datasets.base import COMMON_OPTIONS, Choice, Dataset, prepared_dataset
from torchrec_mdr.methods.base import Method
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS
from torchrec_mdr.storage import located, read_text
from torchrec_mdr.training.command import SentenceParser
from torchrec_mdr.training.config import RunConfig, StageConfig, StagesConfig
from torchrec_mdr.training.datasets import FOLDER_HINT, is_folder

RECIPES = ("recommended", "paper")
# what decides which other options there are, and their defaults
_CHOSEN = {"method": "mlora", "backbone": "mlp", "dataset": "synthetic", "protocol": None, "recipe": "recommended"}


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
    paths, chosen, given = _split(args)
    files = [(path, _read(path)) for path in paths]
    stored: dict[str, Any] = {}
    for _, content in files:
        stored = _merged(stored, content)
    chosen = {name: _first_known(chosen.get(name), stored.get(name), default) for name, default in _CHOSEN.items()}
    method, backbone, dataset = _kinds(chosen)
    parser = SentenceParser(prog="torchrec_mdr.train", description="Trains one model for many domains.")
    parser.add_argument("--config", action="config", help="options from YAML files; the later ones win")
    parser.add_class_arguments(RunConfig, as_group=False)
    parser.add_class_arguments(method, "method_options")
    parser.add_class_arguments(backbone, "backbone_options")
    if chosen["dataset"] in DATASETS:
        parser.add_class_arguments(dataset, "dataset_options", skip=set(COMMON_OPTIONS), instantiate=False)
    natural = _first_known(_last(given, "division"), stored.get("division"))
    parser.set_defaults(_defaults(chosen, natural, method, backbone, dataset))
    for path, content in files:  # each by itself, so that an error names the file
        try:
            parser.parse_object(_without_chosen(content))
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from error
    values = parser.parse_args(given, namespace=parser.parse_object(_without_chosen(stored)))
    for stage in fields(StagesConfig):
        try:
            StageConfig(**vars(values["stages"][stage.name]))
        except ValueError as error:
            raise ValueError(f"--stages.{stage.name}.{error}") from error
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


def load(path: str) -> Options:
    """What a run's resolved configuration says, without a look at the data set that it names.

    Args:
        path (str): the `config.yaml` of a run folder.

    Returns:
        Options: its options; those of the data set as they stand there.

    Raises:
        ValueError: the file cannot be read, or says what this version does not know.
    """
    content = _read(path)
    try:
        METHODS.check(content.get("method"), "method")
        BACKBONES.check(content.get("backbone"), "backbone")
        dataset = content.pop("dataset_options", None) or {}
        parser = SentenceParser()
        parser.add_class_arguments(RunConfig, as_group=False)
        parser.add_class_arguments(METHODS[content["method"]], "method_options")
        parser.add_class_arguments(BACKBONES[content["backbone"]], "backbone_options")
        built = parser.instantiate_classes(parser.parse_object(content))
    except ValueError as error:
        raise ValueError(f"{path} is no configuration of a run: {error}") from error
    known = {name: value for name, value in vars(built).items() if name in RunConfig.__dataclass_fields__}
    return Options(RunConfig(**known), built.method_options, built.backbone_options, dataset, read_text(path))


def _split(args: Sequence[str]) -> tuple[list[str], dict[str, str | None], list[str]]:
    """The configuration files in their order, the last values of the options in _CHOSEN, and the other arguments."""
    paths: list[str] = []
    chosen: dict[str, str | None] = {}
    given: list[str] = []
    rest = iter(_with_values(args))
    for arg in rest:
        name, has_value, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in ("config", *_CHOSEN):
            given.append(arg)
            continue
        if not has_value:
            value = next(rest, "")
        if not value or value.startswith("--"):
            raise ValueError(f"--{name} has no value; write --{name}=VALUE")
        if name == "config":
            paths.append(value)
        else:
            chosen[name] = None if value == "null" else value
    return paths, chosen, given


def _with_values(args: Sequence[str]) -> list[str]:
    """Arguments in which `--resume` has a value, `true` where it is a flag."""
    written: list[str] = []
    for arg in args:
        if written and written[-1] == "--resume":
            flag = arg not in ("auto", "true", "false", "null")
            written[-1] = f"--resume={'true' if flag else arg}"
            if not flag:
                continue
        written.append(arg)
    return [*written[:-1], "--resume=true"] if written and written[-1] == "--resume" else written


def _last(given: Sequence[str], name: str) -> str | None:
    """The last value that arguments give an option; None where they give none."""
    for i in reversed(range(len(given))):
        if given[i].startswith(f"--{name}="):
            value = given[i].removeprefix(f"--{name}=")
        elif given[i] == f"--{name}" and i + 1 < len(given):
            value = given[i + 1]
        else:
            continue
        return None if value == "null" else value
    return None


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _read(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(located(path))) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} is no file of options in YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path} holds no options, but a {type(content).__name__}; write each as a line NAME: VALUE"
        )
    if "config" in content:
        raise ValueError(f"--config {path} has the option 'config'; name further files with another --config")
    options = _nested(content, path)
    for name in (*_CHOSEN, "division"):
        if not isinstance(options.get(name), str | None):
            raise ValueError(f"--config {path}: {name} must be a name, not {options[name]!r}")
    return options


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


def _without_chosen(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in _CHOSEN}


def _kinds(chosen: dict[str, Any]) -> tuple[type[Method], type[BackboneConfig], type[Dataset]]:
    """The classes of method, backbone and data set; fills in the data set's protocol."""
    METHODS.check(chosen["method"], "--method")
    BACKBONES.check(chosen["backbone"], "--backbone")
    method: type[Method] = METHODS[chosen["method"]]
    if chosen["recipe"] not in RECIPES:
        raise ValueError(f"--recipe '{chosen['recipe']}' is unknown; choose one of {', '.join(RECIPES)}")
    if is_folder(chosen["dataset"]):
        dataset = prepared_dataset(located(chosen["dataset"]))
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
    several = auxiliary[0] if len(auxiliary) == 1 else auxiliary or None
    values = {**dataset.defaults(choice), **method.stage_settings}
    for group, kind in (("backbone_options.", backbone), ("method_options.", method)):
        options = {group + field.name for field in fields(kind)}
        values = {k: v for k, v in values.items() if not k.startswith(group) or k in options}
    return values | dict(chosen) | {"division": natural, "auxiliary_division": several}
