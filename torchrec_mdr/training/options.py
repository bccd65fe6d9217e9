"""The command line: typed options, a configuration file, the chosen method's, backbone's and data set's own options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from torchrec_mdr.backbones import BACKBONES
from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.data.prepare import COMMON_OPTIONS, DATASETS
from torchrec_mdr.methods import METHODS, Method
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.presets import default_protocol, defaults

_CHOICES: dict[str, dict[str, Any]] = {"method": METHODS, "backbone": BACKBONES, "dataset": DATASETS}


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Args:
        run (RunConfig): options of every run.
        method (Method): the method with its own options.
        backbone (BackboneConfig): the backbone with its own options.
        dataset (dict[str, Any] | None): the data set's own options; None for a folder of prepared data.
        resolved (str): all of it as YAML, to be run again with --config.
    """

    run: RunConfig
    method: Method
    backbone: BackboneConfig
    dataset: dict[str, Any] | None
    resolved: str


def parse(args: Sequence[str]) -> Options:
    """Reads command-line arguments.

    Exits with a usage message where an option is unknown or has an impossible value.
    """
    chosen = _first_look(args)
    parser = _Parser(prog="torchrec_mdr.train", description="Trains one model for many domains.", exit_on_error=True)
    parser.add_argument("--config", action="config", help="options from a YAML file")
    parser.add_class_arguments(RunConfig, as_group=False)
    parser.add_class_arguments(METHODS[chosen["method"]], "method_options")
    parser.add_class_arguments(BACKBONES[chosen["backbone"]], "backbone_options")
    known_data = chosen["dataset"] in DATASETS
    if known_data:
        data = DATASETS[chosen["dataset"]]
        parser.add_class_arguments(data, "dataset_options", skip=set(COMMON_OPTIONS), instantiate=False)
    parser.set_defaults({**defaults(**chosen), **chosen})
    # a flag on the command line, a value in a configuration file
    values = parser.parse_args(["--resume=true" if arg == "--resume" else arg for arg in args])
    try:
        built = parser.instantiate_classes(values)
        known = {name: value for name, value in vars(built).items() if name in RunConfig.__dataclass_fields__}
        run = RunConfig(**known)
    except ValueError as error:
        fail(str(error))
    return Options(
        run,
        built.method_options,
        built.backbone_options,
        dict(vars(values.get("dataset_options") or Namespace())) if known_data else None,
        parser.dump(_without_config(values), skip_none=False),
    )


class _Parser(ArgumentParser):
    """Says what is wrong in one sentence, without the list of all options that --help gives."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process; see :func:`fail`."""
        fail(f"{message.strip()} (all options: --help)")


def _first_look(args: Sequence[str]) -> dict[str, str]:
    """The options that decide which other options there are, with their defaults."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("method", "backbone", "dataset", "protocol", "recipe")
    for name in (*names, "config"):
        early.add_argument(f"--{name}")
    found = {name: value for name, value in vars(early.parse_known_args(list(args))[0]).items() if value is not None}
    path = found.pop("config", None)
    if path is not None:
        try:
            with open(path) as file:
                stored = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            fail(f"--config {path} cannot be read: {error}")
        if not isinstance(stored, dict):
            fail(f"--config {path} holds no options, but {type(stored).__name__}")
        found = {name: stored[name] for name in names if stored.get(name) is not None} | found
    chosen = {"method": "mlora", "backbone": "mlp", "dataset": "synthetic", "recipe": "recommended"} | found
    for name, known in _CHOICES.items():
        if chosen[name] not in known and not (name == "dataset" and "/" in chosen[name]):
            hint = "; a folder of prepared data is named with a slash in it" if name == "dataset" else ""
            fail(f"--{name} '{chosen[name]}' is unknown; choose one of {', '.join(known)}{hint}")
    chosen.setdefault("protocol", default_protocol(chosen["method"]))
    for name, allowed in (("protocol", ("mlora", "multilora")), ("recipe", ("paper", "recommended"))):
        if chosen[name] not in allowed:
            fail(f"--{name} '{chosen[name]}' is unknown; choose one of {', '.join(allowed)}")
    return chosen


def _without_config(values: Namespace) -> Namespace:
    values = values.clone()
    values.pop("config", None)
    return values


def fail(sentence: str) -> NoReturn:
    """Ends the process with one sentence on stderr and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
