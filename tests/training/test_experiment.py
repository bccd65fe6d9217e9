"""What a recipe makes of a run's options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.bank_choice import with_banks
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.experiment import LARGE_TABLES, Experiment
from torchrec_mdr.training.trainer import Trainer


def recipe(rows: int, optimizer: str) -> Experiment:
    schema = Schema("d", "label", (SparseFeature("a", rows - 1), SparseFeature("b", 1)), (), (Division("s", 2),), {})
    embeddings = EmbeddingConfig(optimizer=optimizer)  # type: ignore[arg-type]
    config = RunConfig(embeddings=embeddings)
    return Experiment(config, "", schema, schema.divisions, BACKBONES["mlp"](), MLoRA())


@pytest.mark.parametrize(
    ("rows", "asked", "used"),
    [
        (LARGE_TABLES, "auto", "adam"),
        (LARGE_TABLES + 1, "auto", "rowwise_adagrad"),
        (LARGE_TABLES + 1, "sgd", "sgd"),
    ],
)
def test_auto_is_adam_for_small_tables_and_rowwise_adagrad_for_large_ones(rows: int, asked: str, used: str) -> None:
    made = recipe(rows, asked)
    assert made.embeddings().optimizer == used
    assert dataclasses.replace(made.embeddings(), optimizer="auto") == EmbeddingConfig(optimizer="auto")


def test_a_trainer_takes_no_experiment_that_leaves_open_where_its_banks_are(tmp_path: Path) -> None:
    environment = Environment(0, 1, torch.device("cpu"))
    open_one = recipe(10, "adam")
    with pytest.raises(ValueError, match=r"does not say where its banks are.*with_banks\(experiment, environment\)"):
        Trainer(open_one, str(tmp_path), environment)
    chosen = with_banks(open_one, environment)
    assert chosen.banks == "replicated" and Trainer(chosen, str(tmp_path), environment).experiment is chosen
