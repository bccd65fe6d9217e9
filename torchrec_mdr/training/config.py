"""The options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrec_mdr.distributed.bank_sharding import BankOptimizer, BankType
from torchrec_mdr.distributed.execution import Precision
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.registry import HOOKS
from torchrec_mdr.storage import located

BankPlacement = Literal["replicated", "sharded", "auto"]
TrainingRows = Literal["all", "pretraining", "adaptation"]
MOST_ROWS = 2**31 - 1  # of a step: places of ids are 32 bits wide
_LEAST = {
    "epochs": 0,
    "learning_rate": 0,
    "embedding_learning_rate": 0,
    "weight_decay": 0,
    "embedding_l2": 0,
    "ema_decay": 0,
    "patience": 1,
    "validations_per_epoch": 1,
    "ema_rows": 0,
    "patience_rows": 0,
    "validation_rows": 0,
    "pooled_below": 0,
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
        ema_rows: the same in training rows that the average reaches over; 0 goes by ema_decay.
        patience: validations without a better result before the stage (or, in adapt stages, a domain) stops.
        patience_rows: the same in training rows; 0 goes by patience.
        validations_per_epoch: how often validation looks, and a checkpoint is written.
        validation_rows: training rows from one validation to the next, to whole epochs or whole parts of one; 0 goes by
            validations_per_epoch.
        monitor: what has to get better: AUC over all rows, the unweighted mean of the domains' AUC, or log loss. Adapt
            stages look at each domain's own AUC, or log loss.
        logloss_tolerance: how far, as a share, the log loss of what is kept may lie above the lowest so far; without
            one, AUC alone decides. In adapt stages of each domain.
        pooled_below: validation rows of a domain below which an adapt stage judges it together with all others like it,
            since by itself it would keep what was lucky on a few rows; 0 judges each by itself.
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
    ema_rows: int = 0
    patience: int = 3
    patience_rows: int = 0
    validations_per_epoch: int = 1
    validation_rows: int = 0
    monitor: Literal["auc", "mean_domain_auc", "logloss"] = "auc"
    logloss_tolerance: float | None = None
    pooled_below: int = 0
    backbone_noise: bool = True
    training_rows: TrainingRows = "all"
    hooks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for option, least in _LEAST.items():
            if not getattr(self, option) >= least:
                raise ValueError(f"{option} must be at least {least}, not {getattr(self, option)}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay must be below 1, not {self.ema_decay}")
        if self.logloss_tolerance is not None and not self.logloss_tolerance >= 0:
            raise ValueError(f"logloss_tolerance must be at least 0, not {self.logloss_tolerance}")
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
        resume: go on where an interrupted run in output_dir stopped; `auto` does so where there is one, begins where
            there is none, and is the default under a launcher that starts failed runs again.
        checkpoint_seconds: most seconds of training between two checkpoints, beside those of validations; 0 writes
            none.
        keep_checkpoints: how many of the newest checkpoints of a stage under way stay, beside its best.
        hang_seconds: how long a process may not be heard of, or not get on, before the run ends and names it.
        init_checkpoint: a stage's checkpoint, or a state_dict file of the backbone, in place of pretraining.
        precision: of products: `fp32`; `tf32`, as NVIDIA GPUs multiply float32 faster; `bf16`, training under autocast
            over float32 weights, and evaluation in `fp32`, since logits in bfloat16 tie.
        compile: whether torch.compile compiles what holds no embedding table; the first steps of a stage then take
            longer, and results differ by rounding.
        init_adapters: a stage's checkpoint of an earlier run, whose adapters this run's start from, domain by domain by
            their names; the backbone may be a newer one.
        static_shapes: training batches of exactly batch_size rows, as CUDA graphs want them; the rows left at the end
            of an epoch, fewer than a batch, do not come in it.
        banks: where adapters are: `replicated`, on every rank; `sharded`, rows of embedding tables that TorchRec
            spreads over ranks, for very many domains; `auto` shards those that would take a quarter of a rank's memory.
        bank_optimizer: of sharded banks, fused into the backward pass: `auto` is row-wise Adagrad; `adam` needs a GPU.
        bank_type: of sharded banks' numbers; `fp16` takes half the memory.
        domains: train the adapters of these domains only, by id; all others stay bitwise as they are.
        batch_size: rows of a training step over all ranks.
        eval_batch_size: rows of an evaluation step over all ranks.
        adaptation_share: share of the training rows in the adaptation slice.
        target_modules: layers to adapt, patterns over module names; by default what the backbone says.
        metrics: further metrics of evaluations, by name.
        adapter_files: write each domain's adapter as a file of its own, in output_dir/adapters.
        tune: settings to try on validation rows before the run itself; 0 or 1 tries none.
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
    resume: bool | Literal["auto"] | None = None
    checkpoint_seconds: float = 600.0
    keep_checkpoints: int = 2
    hang_seconds: float = 600.0
    init_checkpoint: str | None = None
    precision: Precision = "fp32"
    compile: bool = False
    init_adapters: str | None = None
    static_shapes: bool = False
    banks: BankPlacement = "auto"
    bank_optimizer: BankOptimizer = "auto"
    bank_type: BankType = "fp32"
    domains: list[int] | None = None
    batch_size: int = 1024
    eval_batch_size: int = 16384
    adaptation_share: float = 0.15
    target_modules: list[str] | None = None
    metrics: list[str] = field(default_factory=list)
    adapter_files: bool = False
    tune: int = 0
    embeddings: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)

    def __post_init__(self) -> None:
        for option in ("dataset", "data_dir", "output_dir", "init_checkpoint", "init_adapters"):
            path = getattr(self, option)
            if path == "":
                raise ValueError(f"--{option} is empty; leave it out, or name a folder")
            if path is not None:
                setattr(self, option, located(path))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must lie between 0 and 2**63 - 1, not {self.seed}")
        if self.tune < 0:
            raise ValueError(f"--tune must be at least 0, not {self.tune}")
        if self.tune > 1 and self.stage is not None:
            raise ValueError("--tune tries whole runs; leave out --stage, or --tune")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"--checkpoint_seconds must be at least 0, not {self.checkpoint_seconds}")
        if self.keep_checkpoints < 1:
            raise ValueError(f"--keep_checkpoints must be at least 1, not {self.keep_checkpoints}")
        if not self.hang_seconds >= 5:
            raise ValueError(f"--hang_seconds must be at least 5, not {self.hang_seconds}")
        for option in ("batch_size", "eval_batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option} must be at least 1, not {getattr(self, option)}")
            if getattr(self, option) > MOST_ROWS:
                raise ValueError(f"--{option} must be at most {MOST_ROWS}, not {getattr(self, option)}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("--target_modules names no layer; leave it out, or name at least one")
        if not 0.0 < self.adaptation_share < 1.0:
            raise ValueError(f"--adaptation_share must lie between 0 and 1, not {self.adaptation_share}")
