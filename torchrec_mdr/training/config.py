"""The options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.registry import HOOKS
from torchrec_mdr.storage import expand

TrainingRows = Literal["all", "pretraining", "adaptation"]
_LEAST = {
    "epochs": 0,
    "learning_rate": 0,
    "embedding_learning_rate": 0,
    "weight_decay": 0,
    "embedding_l2": 0,
    "ema_decay": 0,
    "patience": 1,
    "validations_per_epoch": 1,
}


@dataclass
class StageConfig:
    """How one kind of stage is fitted; ValueError where a value is impossible.

    Args:
        epochs: most passes over the stage's rows; 0 keeps the start.
        learning_rate: of Adam, for everything but embeddings.
        embedding_learning_rate: of the embeddings' optimizer, where they train.
        weight_decay: L2 added to the gradients of all that trains; in fused embedding optimizers, of looked-up rows.
        embedding_l2: l in l * (sum of squares of the embeddings looked up) / batch, added to the loss.
        ema_decay: decay of the moving average of all that trains, which is evaluated and kept in place of the last
            weights; 0 keeps the weights themselves.
        patience: validations without a better result before the stage (or, in adapt stages, a domain) stops.
        validations_per_epoch: how often validation looks, and a checkpoint is written.
        monitor: what has to get better: AUC over all rows, or the unweighted mean of the domains' AUC. Adapt stages
            look at each domain's own AUC.
        backbone_noise: where the backbone is frozen, whether its dropout acts, and domain norms go by the statistics
            of the batch; otherwise nothing is dropped, and domain norms keep the statistics they start with and learn
            scale and shift. What trains behind noise learns to make up for it, and in use it is not there.
        training_rows: what to learn from: all training rows, all but the adaptation slice, or that slice (see
            adaptation_share).
        hooks: what happens beside training, by name: `leave_one_out` shows each row to the stage as if frozen
            embeddings had not been learned from it (where embeddings train, it does nothing).
    """

    epochs: int = 10
    learning_rate: float = 1e-3
    embedding_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    embedding_l2: float = 0.0
    ema_decay: float = 0.0
    patience: int = 3
    validations_per_epoch: int = 1
    monitor: Literal["auc", "mean_domain_auc"] = "auc"
    backbone_noise: bool = True
    training_rows: TrainingRows = "all"
    hooks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for option, least in _LEAST.items():
            if not getattr(self, option) >= least:
                raise ValueError(f"{option} must be at least {least}, not {getattr(self, option)}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay must be below 1, not {self.ema_decay}")
        for name in self.hooks:
            HOOKS.check(name, "hooks:")


@dataclass
class StagesConfig:
    """The settings of each kind of stage."""

    pretrain: StageConfig = field(default_factory=StageConfig)
    adapt: StageConfig = field(default_factory=StageConfig)
    fuse: StageConfig = field(default_factory=StageConfig)
    gate: StageConfig = field(default_factory=StageConfig)
    joint: StageConfig = field(default_factory=StageConfig)


@dataclass
class RunConfig:
    """One run: data set x backbone x method; ValueError where a value is impossible.

    Args:
        method: a name in METHODS.
        backbone: a name in BACKBONES.
        dataset: a name in DATASETS, or a folder of prepared data, which has a slash in its name.
        data_dir: folder of the data set's original files.
        output_dir: where results go; a new folder under runs/ by default.
        division: the natural division.
        auxiliary_division: one or several more divisions, for methods that combine them.
        protocol: how the data are labelled and split, for data sets that know several ways; their sizes are the
            defaults.
        recipe: `paper` trains all stages on the same rows; `recommended` is this project's own.
        seed: of initial values, order of rows and dropout.
        stage: run this stage alone, from its predecessor's checkpoint.
        resume: go on where an interrupted run in output_dir stopped.
        init_checkpoint: a stage's checkpoint, or a state_dict file of the backbone, in place of pretraining.
        domains: train the adapters of these domains only, by id; all others stay bitwise as they are.
        batch_size: rows of a training step over all ranks.
        eval_batch_size: rows of an evaluation step over all ranks.
        adaptation_share: share of the training rows in the adaptation slice.
        target_modules: layers to adapt, patterns over module names; by default what the backbone says.
        metrics: further metrics of evaluations, by name.
        embeddings: the embedding tables.
        stages: how each kind of stage is fitted.
    """

    method: str = "mlora"
    backbone: str = "mlp"
    dataset: str = "synthetic"
    data_dir: str | None = None
    output_dir: str | None = None
    division: str | None = None
    auxiliary_division: str | list[str] | None = None
    protocol: str | None = None
    recipe: Literal["paper", "recommended"] = "recommended"
    seed: int = 0
    stage: str | None = None
    resume: bool = False
    init_checkpoint: str | None = None
    domains: list[int] | None = None
    batch_size: int = 1024
    eval_batch_size: int = 16384
    adaptation_share: float = 0.15
    target_modules: list[str] | None = None
    metrics: list[str] = field(default_factory=list)
    embeddings: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)

    def __post_init__(self) -> None:
        for option in ("dataset", "data_dir", "output_dir", "init_checkpoint"):
            path = getattr(self, option)
            if path == "":
                raise ValueError(f"--{option} is empty; leave it out, or name a folder")
            if path is not None:
                setattr(self, option, expand(path))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must lie between 0 and 2**63 - 1, not {self.seed}")
        for option in ("batch_size", "eval_batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option} must be at least 1, not {getattr(self, option)}")
        if not 0.0 < self.adaptation_share < 1.0:
            raise ValueError(f"--adaptation_share must lie between 0 and 1, not {self.adaptation_share}")
