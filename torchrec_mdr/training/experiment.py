"""What a run is made of, put together from its options: data, backbone, method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.data.checks import check_splits
from torchrec_mdr.data.labels import check_labels
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.data.shuffle import Folds
from torchrec_mdr.distributed.bank_sharding import DATA_TYPES
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import METRICS
from torchrec_mdr.training.config import RunConfig, StageConfig
from torchrec_mdr.training.datasets import open_dataset
from torchrec_mdr.training.options import Options

LARGE_TABLES = 5_000_000  # rows of all tables together, above which Adam's two moments a weight are too dear
Banks = Literal["replicated", "sharded"]
NUM_FOLDS = 20  # of the training rows, for the adaptation slice


class DivisionsClash(ValueError):
    """A run names a division twice; the same method may go with others."""


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
        banks (str | None): where the banks are, see `with_banks`; None where nobody has said, which no trainer takes.
    """

    config: RunConfig
    folder: str
    schema: Schema
    divisions: tuple[Division, ...]
    backbone: BackboneConfig
    method: Method
    banks: Banks | None = None

    @staticmethod
    def prepare_data(options: Options) -> str:
        """The folder of the run's data set, prepared on first use; on one process."""
        run = options.run
        common = {"data_dir": run.data_dir, "division": run.division, "protocol": run.protocol}
        return open_dataset(run.dataset, **common, **options.dataset)

    @staticmethod
    def from_options(options: Options, folder: str) -> Experiment:
        """What the command line asks for, on prepared data.

        Raises:
            ValueError: divisions or domains that the data do not have, a split without rows, or a metric that there is
                not.
        """
        run, schema = options.run, Schema.load(folder)
        experiment = Experiment.of_schema(options, schema, folder)
        divisions = experiment.divisions
        for domain in run.domains or []:
            size = divisions[0].num_domains
            if not 0 <= domain < size:
                raise ValueError(
                    f"--domains names {domain}, outside division '{divisions[0].name}' with domains 0 to {size - 1}"
                )
        for name in run.metrics:
            METRICS.check(name, "--metrics", "; AUC, WAUC, log loss, NE and calibration are always there")
        experiment.new_metrics()  # a metric that cannot be imported fails here, and not after an epoch
        check_splits(folder, schema, [division.name for division in divisions])
        check_labels(folder, schema)
        return experiment

    @staticmethod
    def of_schema(options: Options, schema: Schema, folder: str) -> Experiment:
        """What the options ask for on data of this schema, whose rows are not looked at.

        Raises:
            ValueError: divisions that the schema does not have.
        """
        run, auxiliary = options.run, options.run.auxiliary_division or []
        names = [run.division or schema.divisions[0].name, *([auxiliary] if isinstance(auxiliary, str) else auxiliary)]
        if len(set(names)) != len(names):
            raise DivisionsClash(f"the divisions {', '.join(names)} must differ from each other")
        divisions = tuple(schema.division(name) for name in names)
        return Experiment(run, folder, schema, divisions, options.backbone, options.method)

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
        """The model with its initial values, the same on every rank; embedding tables lie on the meta device.

        Where nobody has said where the banks are, they are in the model.
        """
        torch.manual_seed(self.config.seed)
        backbone = self.backbone.build(self.schema, self.config.embeddings.dim)
        targets, bank_type = self.config.target_modules, DATA_TYPES[self.config.bank_type]
        return MultiDomainModel(backbone, self.method, self.divisions, targets, self.banks or "replicated", bank_type)

    def outline(self) -> MultiDomainModel | None:
        """The model on the meta device, where sizes take no memory; random states stay as they are.

        Returns:
            MultiDomainModel | None: None where a backbone of another package needs its values while it is built.
        """
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return self.build_model()
        except (NotImplementedError, RuntimeError):
            return None

    def new_metrics(self, division: int = 0) -> DomainMetrics:
        """The metrics of an evaluation by the domains of a division, without rows."""
        further = {name: METRICS[name] for name in self.config.metrics}
        return DomainMetrics(self.divisions[division].domain_names, further)

    def train_loader(self, stage: Stage, environment: Environment, seed: int) -> DomainLoader:
        """The rows a stage learns from."""
        held_out = min(max(round(self.config.adaptation_share * NUM_FOLDS), 1), NUM_FOLDS - 1)
        folds = {
            "all": None,
            "adaptation": Folds(NUM_FOLDS, tuple(range(held_out))),
            "pretraining": Folds(NUM_FOLDS, tuple(range(held_out, NUM_FOLDS))),
        }[self.settings(stage).training_rows]
        domains = self.config.domains if stage.per_domain else None
        return self._loader(
            "train",
            self.config.batch_size,
            environment,
            seed=seed,
            shuffle=True,
            folds=folds,
            domains=domains,
            static_shapes=self.config.static_shapes,
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
            pin_memory=environment.device.type == "cuda",
            grouped=self.banks != "sharded",
            **options,
        )
