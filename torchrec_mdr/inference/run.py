"""The model of a finished run, in one process and without a launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchrec_mdr.data.schema import SCHEMA_FILE, Division, Schema
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.inference.reach import Reach
from torchrec_mdr.inference.stored_collection import read_on_demand
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.storage import is_whole, isfile, located
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.new_domains import load_with_new_domains, stored_divisions
from torchrec_mdr.training.options import load
from torchrec_mdr.training.run_folder import CONFIG_FILE, check_files
from torchrec_mdr.training.stored_banks import has_tables, load_state


@dataclass(frozen=True)
class Run:
    """A finished run, taken from its folder.

    Args:
        folder (str): the run's output folder.
        experiment (Experiment): data set x backbone x method, as the run's files say.
        model (MultiDomainModel): the trained model: plain modules, evaluation mode, on the method's own route.
        chosen (tuple[int, ...] | None): ids in the data of the natural division's domains that the model has; None for
            all of them.
        complete (int | None): how many of these, the first ones, have all adapters that their rows go through; None for
            all of them.
    """

    folder: str
    experiment: Experiment
    model: MultiDomainModel
    chosen: tuple[int, ...] | None = None
    complete: int | None = None

    @property
    def config(self) -> RunConfig:
        """The run's options."""
        return self.experiment.config

    @property
    def schema(self) -> Schema:
        """Of the data the run was trained on."""
        return self.experiment.schema

    @property
    def divisions(self) -> tuple[Division, ...]:
        """Those of the run, the natural one first: the columns of `domain_ids`."""
        return self.experiment.divisions


def load_run(
    folder: str, device: torch.device | str = "cpu", only: Sequence[str] | None = None, on_demand: bool = False
) -> Run:
    """Builds the model of a finished run and gives it the weights of the last stage's checkpoint, bitwise.

    Needs neither the data set nor a process group. Embedding tables are TorchRec's own collections, not sharded. The
    weights are those that the run's test metrics belong to: the best ones by validation, averaged where the run
    averages.

    Args:
        folder (str): the run's output folder, with `config.yaml`, `schema.json` and `checkpoints/`; on a disk, or in an
            object store.
        device (torch.device | str): where the model goes.
        only (Sequence[str] | None): names of domains of the natural division. Of a run with sharded banks, the model
            gets these alone, and the others' adapters are not read; where a top-k gate sends their rows through other
            domains' experts, those come behind them. Of any other run, it gets all.
        on_demand (bool): whether a model of a run with sharded banks reads the adapters of a pass's domains when it
            comes to them, and holds none; it is for evaluation alone. One of another run holds all of them as ever.

    Returns:
        Run: the model, with the run's options and schema.

    Raises:
        ValueError: the folder holds no run, an unfinished one, or a damaged one.

    Example::

        >>> load_run("runs")
        Traceback (most recent call last):
        ...
        ValueError: runs holds no run: it has no config.yaml; name the --output_dir of a run
    """
    folder = located(folder)
    experiment = run_experiment(folder)
    last = experiment.stages()[-1].name
    path = os.path.join(folder, "checkpoints", last)
    if not is_whole(path):
        raise ValueError(f"the run in {folder} is not finished: stage '{last}' has no checkpoint; end it with --resume")
    info = checkpoint.read_info(path, "groups", "divisions")
    whole, chosen, complete = stored_divisions(experiment.divisions), None, None
    reach = experiment.method.reach()
    if only is not None and has_tables(path) and reach is not None:
        natural = experiment.divisions[0]
        places = {name: place for place, name in enumerate(natural.domain_names)}
        chosen = tuple(places[name] if name in places else natural.domain_id(name) for name in only)
        if reach > 1:
            complete, chosen = len(chosen), Reach(experiment, path).fill(chosen, reach * len(chosen))
        experiment = with_domains(experiment, chosen)
    elif on_demand and has_tables(path):
        experiment = replace(experiment, banks="sharded")
    with torch.random.fork_rng():
        model = experiment.build_model()
    _allocate_tables(model)
    if model.bank_tables is not None:
        read_on_demand(model, path)
    groups, stored = parameter_groups(model), set(info["groups"])
    missing = {group.value for group in groups.values()} - stored
    if missing or info["divisions"] != whole:
        raise ValueError(f"{path} is the checkpoint of another run; restore the folder, or train it anew")
    sources = None if chosen is None else torch.tensor(chosen)
    if complete is None:
        load_state(path, model, model.state_dict(), sources)
    else:
        load_with_new_domains(model, path, sources=sources)
    return Run(folder, experiment, model.to(device).eval(), chosen, complete)


def with_domains(experiment: Experiment, chosen: Sequence[int]) -> Experiment:
    """The experiment with some domains of its data's natural division, by their ids there, in this order."""
    natural, *others = experiment.divisions
    names = experiment.schema.division(natural.name).domain_names
    return replace(experiment, divisions=(Division(natural.name, names=[names[place] for place in chosen]), *others))


def run_experiment(folder: str) -> Experiment:
    """What a run's files say of it, without its weights.

    Raises:
        ValueError: the folder holds no run, or a damaged one.
    """
    folder = located(folder)
    for name in (CONFIG_FILE, SCHEMA_FILE):
        if not isfile(os.path.join(folder, name)):
            mend = "name the --output_dir of a run" if name == CONFIG_FILE else "copy that of its data set there"
            raise ValueError(f"{folder} holds no run: it has no {name}; {mend}")
    check_files(folder)
    return Experiment.of_schema(load(os.path.join(folder, CONFIG_FILE)), Schema.load(folder), folder)


def _allocate_tables(model: nn.Module) -> None:
    """Gives tables on the meta device memory, each by itself: to_empty() of the whole would lose the index buffers."""
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag) and module.weight.is_meta:
            module.to_empty(device="cpu")
