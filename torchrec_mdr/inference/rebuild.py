"""The serving model of a run or of a bundle, from what its folder holds."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.served import ServedLowRank
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.inference.bundle import BACKBONE_FILE, Manifest, load_tensors
from torchrec_mdr.inference.freeze import ServingModel, freeze
from torchrec_mdr.inference.tables import ServedTables
from torchrec_mdr.storage import isfile
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import load
from torchrec_mdr.training.run_folder import CONFIG_FILE


def give_places(model: ServingModel, places: tuple[int, ...]) -> None:
    """Gives a frozen model tables for so many adapters of each division, all of them empty."""
    for _, bank in model.banks():
        bank.resize(places[bank.division])


def change_types(model: ServingModel, adapter_dtype: str, int8: bool) -> None:
    """Makes low-rank adapters bfloat16, and tables one byte a number, where wanted."""
    for module in model.modules():
        if isinstance(module, ServedLowRank):
            module.to(getattr(torch, adapter_dtype))
        elif isinstance(module, ServedTables) and int8:
            module.quantize()


def rebuild(bundle: str, manifest: Manifest) -> ServingModel:
    """A bundle's model with its shared weights, and with empty tables of adapters.

    Raises:
        ValueError: the weights are not those of the manifest, or the model was no run's.
    """
    path = os.path.join(bundle, CONFIG_FILE)
    if not isfile(path):
        raise ValueError(
            f"{bundle} has no {CONFIG_FILE}, by which a run's model is built again: its model.pt2 alone scores it; "
            "where it is not there, or of another machine, export the model again"
        )
    options = load(path)
    experiment = Experiment.of_schema(options, Schema.load(bundle), bundle)
    divisions = experiment.divisions
    reach = experiment.method.reach()
    if reach is not None:  # the tables are emptied anyway: one domain is as good as a million
        least = Division(divisions[0].name, min(reach, divisions[0].num_domains))
        experiment = replace(experiment, divisions=(least, *divisions[1:]))
    with torch.random.fork_rng():
        plain = experiment.build_model()
    for module in plain.modules():
        if isinstance(module, nn.EmbeddingBag) and module.weight.is_meta:
            module.to_empty(device="cpu")
    model = freeze(plain.eval(), manifest.features, manifest.unknown_ids, manifest.mean_ids)
    model.divisions = divisions
    change_types(model, manifest.adapter_dtype, manifest.int8)
    give_places(model, manifest.places)
    load_shared(model, load_tensors(os.path.join(bundle, BACKBONE_FILE)))
    return model


def shared_state(model: ServingModel) -> dict[str, Tensor]:
    """What domains share: all tensors, and of the tables of adapters the row of unknown domains alone."""
    own = {f"{name}.{table}" for name, bank in model.banks() for table in bank.tables}
    return {name: (t[:1] if name in own else t).contiguous() for name, t in model.state_dict().items()}


def load_shared(model: ServingModel, state: dict[str, Tensor]) -> None:
    """The opposite of :func:`shared_state`."""
    wanted = shared_state(model)
    different = sorted(set(wanted) ^ set(state)) or [n for n, t in wanted.items() if t.shape != state[n].shape]
    if different:
        raise ValueError(f"{BACKBONE_FILE} is of another model: '{different[0]}' differs; export the run again")
    for name, tensor in model.state_dict().items():
        (tensor[: len(state[name])] if tensor.dim() else tensor).copy_(state[name])


def empty_tables(bundle: str, manifest: Manifest) -> dict[str, Tensor]:
    """The tables of adapters for a compiled package: the rows of unknown domains, and empty places."""
    shared = load_tensors(os.path.join(bundle, BACKBONE_FILE), manifest.tables)
    tables: dict[str, Tensor] = {}
    for name, (division, dtype, shape) in manifest.tables.items():
        tables[name] = torch.zeros(1 + manifest.places[division], *shape, dtype=getattr(torch, dtype))
        tables[name][0] = shared[name][0]
    return tables
