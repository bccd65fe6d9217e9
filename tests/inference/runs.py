"""Runs with random weights, as the trainer leaves them, without its minutes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed.checkpoint as dcp

from tests.helpers import randomise
from tests.inference.models import SCHEMA, randomise_model, rows_for
from torchrec_mdr.adapters import ParameterGroup
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.data.writer import write_split
from torchrec_mdr.inference.adapter_file import AdapterFile
from torchrec_mdr.inference.hand_over import all_adapters
from torchrec_mdr.inference.run import Run
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.storage import write_json
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.new_domains import stored_divisions
from torchrec_mdr.training.options import load, parse

SMALL = ["--backbone_options.hidden=[10,5]", "--embeddings.dim=8"]
ROWS = 400


def finished(folder: Path, method: str, *given: str, seed: int = 0, schema: Schema = SCHEMA) -> Run:
    """A run's folder with options, schema, checkpoint, results and data, and its model with random weights.

    Labels are drawn by the model's own logits times two, so that calibration has something to find.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    schema = replace(schema, rows=dict.fromkeys(SPLITS, ROWS))
    for path in (data, folder):
        schema.save(str(path))
    options = parse([f"--dataset={data}/", f"--method={method}", *SMALL, *given])
    (folder / "config.yaml").write_text(options.resolved)
    experiment = Experiment.of_schema(load(str(folder / "config.yaml")), schema, str(folder))
    model = experiment.build_model().eval()
    materialize_tables(model)
    randomise_model(model, seed)
    for place, split in enumerate(SPLITS):
        write_split(str(data), split, [_columns(model, schema, place + 1)])
    names = experiment.divisions[0].domain_names
    results: dict[str, Any] = {name: {"auc": 0.7, "logloss": 0.5, "rows": 10} for name in names}
    write_json(str(folder / "metrics.json"), {"stages": [{"validation": {"domains": results}}]})
    save(folder, experiment, model)
    return Run(str(folder), experiment, model)


def save(folder: Path, experiment: Experiment, model: MultiDomainModel) -> None:
    """Writes the last stage's checkpoint."""
    path = folder / "checkpoints" / experiment.stages()[-1].name
    dcp.save(dict(model.state_dict()), checkpoint_id=str(path), no_dist=True)
    groups = sorted({group.value for group in parameter_groups(model).values()})
    write_json(str(path / "stage.json"), {"groups": groups, "divisions": stored_divisions(experiment.divisions)})


@torch.no_grad()
def _columns(model: MultiDomainModel, schema: Schema, seed: int) -> dict[str, Any]:
    dense, features, ids = rows_for(model, ROWS, seed)
    logits = model(dense, features, ids).flatten()
    labels = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed)) < torch.sigmoid(2 * logits)
    columns: dict[str, Any] = {schema.label: labels.float().numpy(), "x": dense[:, 0].numpy(), "y": dense[:, 1].numpy()}
    for v, division in enumerate(schema.divisions):
        own = ids[:, v] if v < ids.shape[1] else torch.zeros(ROWS, dtype=torch.int64)
        columns[f"domain_{division.name}"] = own.numpy()
    for name, own in features.to_dict().items():
        values, offsets = own.values().int().numpy(), own.offsets().int().numpy()
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) if name == "b" else values
    return columns


def other_adapters(run: Run, seed: int) -> list[AdapterFile]:
    """Adapters of all domains as another training of them would leave them, behind the same backbone."""
    changed = replace(run, model=copy.deepcopy(run.model))
    model = changed.model
    groups = parameter_groups(model)
    experts_are_shared = any(name.endswith("domain_embedding") for name in groups)  # then a domain has its gate's row
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if (name.endswith("domain_embedding") if experts_are_shared else groups[name] is ParameterGroup.ADAPTERS)
    }
    randomise(own, seed)
    return list(all_adapters(changed))
