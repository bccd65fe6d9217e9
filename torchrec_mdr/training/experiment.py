"""What a run is made of, put together from its options: data, backbone, method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.data.shuffle import Folds
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.config import EmbeddingConfig, RunConfig, StageConfig

LARGE_TABLES = 5_000_000  # rows of all tables together, above which Adam's two moments a weight are too dear
NUM_FOLDS = 20  # of the training rows, for the adaptation slice


@dataclass(frozen=True)
class Experiment:
    """Data set x backbone x method.

    Args:
        config (RunConfig): the run's options.
        folder (str): the prepared data set.
        schema (Schema): of that data set.
        divisions (tuple[Division, ...]): those the run uses, the natural one first.
        backbone (BackboneConfig): options of the backbone.
        method (Method): options of the method.
    """

    config: RunConfig
    folder: str
    schema: Schema
    divisions: tuple[Division, ...]
    backbone: BackboneConfig
    method: Method

    def stages(self) -> list[Stage]:
        """The method's stages."""
        return self.method.stages(self.divisions)

    def settings(self, stage: Stage) -> StageConfig:
        """How a stage is fitted."""
        settings: StageConfig = getattr(self.config.stages, stage.settings)
        return settings

    def embeddings(self) -> EmbeddingConfig:
        """Optimizer and sharding of the tables, with the choice that `auto` stands for."""
        config = self.config.embeddings
        if config.optimizer != "auto":
            return config
        rows = sum(feature.num_embeddings for feature in self.schema.sparse_features)
        return replace(config, optimizer="rowwise_adagrad" if rows > LARGE_TABLES else "adam")

    def build_model(self) -> MultiDomainModel:
        """The model with its initial values, the same on every rank; embedding tables lie on the meta device."""
        torch.manual_seed(self.config.seed)
        backbone = self.backbone.build(self.schema, self.config.embeddings.dim)
        return MultiDomainModel(backbone, self.method, self.divisions, self.config.target_modules)

    def train_loader(self, stage: Stage, environment: Environment, seed: int) -> DomainLoader:
        """The rows a stage learns from."""
        held_out = min(max(round(self.config.adaptation_share * NUM_FOLDS), 1), NUM_FOLDS - 1)
        folds = {
            "all": None,
            "left_out": None,
            "adaptation": Folds(NUM_FOLDS, tuple(range(held_out))),
            "pretraining": Folds(NUM_FOLDS, tuple(range(held_out, NUM_FOLDS))),
        }[self.settings(stage).rows]
        domains = self.config.domains if stage.per_domain else None
        return self._loader(
            "train", self.config.batch_size, environment, seed=seed, shuffle=True, folds=folds, domains=domains
        )

    def eval_loader(self, split: str, environment: Environment) -> DomainLoader:
        """All rows of a split, in order."""
        return self._loader(split, self.config.eval_batch_size, environment, seed=0, shuffle=False)

    def _loader(self, split: str, batch_size: int, environment: Environment, **options: Any) -> DomainLoader:
        return DomainLoader(
            self.folder,
            self.schema,
            split,
            [division.name for division in self.divisions],
            batch_size,
            rank=environment.rank,
            world_size=environment.world_size,
            **options,
        )
