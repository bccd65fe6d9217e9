"""Runs a method's stages, one after the other or one alone, and writes what they gave."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.adapters.gate import CombiningAdapter
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.methods.stage import BACKBONE, EMBEDDINGS, Stage
from torchrec_mdr.storage import write_json
from torchrec_mdr.training.combination import Combination, CombinationWeights
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.new_domains import check_divisions, load_with_new_domains, stored_divisions
from torchrec_mdr.training.stage_runtime import StageRuntime
from torchrec_mdr.training.stage_trainer import StageTrainer, domain_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run has come to; `metrics.json` and `combination.json` are written.

    Args:
        metrics (dict): the content of `metrics.json`.
        combination (Combination | None): what fusion or gates have learnt, where the method combines components.
    """

    metrics: dict[str, Any]
    combination: Combination | None


class Trainer:
    """Runs the stages of an experiment in an output folder.

    Every stage is built anew and starts from its predecessor's checkpoint, whether that was written a moment ago or by
    another job: a stage boundary is a resume.

    Args:
        experiment (Experiment): what is run.
        output_dir (str): holds checkpoints, events and results.
        environment (Environment): rank, world size, device.
    """

    def __init__(self, experiment: Experiment, output_dir: str, environment: Environment) -> None:
        self.experiment = experiment
        self.output_dir = output_dir
        self.environment = environment
        self.stages = experiment.stages()
        self._shared: dict[Any, Any] = {}  # what hooks keep while the backbone stays as it is

    def run(self) -> RunResult | None:
        """Runs the stages that are left to run.

        Returns:
            RunResult | None: None where the run stopped before the last stage.

        Raises:
            ValueError: an impossible option, a checkpoint that does not fit, or a loss that is not finite.
        """
        config = self.experiment.config
        wanted = self._wanted_stages()
        result: RunResult | None = None
        for stage in wanted:
            self._check_domains(stage)
            finished = os.path.isdir(self._checkpoint(stage))
            if finished and not config.resume:
                raise ValueError(
                    f"stage '{stage.name}' is finished in {self.output_dir}; name another output folder, or evaluate it"
                    " again with --resume"
                )
            if finished and config.resume and stage is not self.stages[-1]:
                logger.info("stage '%s' is finished, going on with the next one", stage.name)
                continue
            result = self._run_stage(stage, finished=finished and config.resume)
        return result

    def _wanted_stages(self) -> list[Stage]:
        config = self.experiment.config
        names = [stage.name for stage in self.stages]
        if config.stage is not None:
            if config.stage not in names:
                raise ValueError(
                    f"method '{config.method}' has no stage '{config.stage}' here; its stages are {', '.join(names)}"
                )
            return [self.stages[names.index(config.stage)]]
        if config.init_checkpoint is not None and self.stages[0].name == "pretrain":
            return self.stages[1:]
        return self.stages

    def _check_domains(self, stage: Stage) -> None:
        """Raises ValueError where the run names domains of another division than a stage's."""
        divisions = self.experiment.divisions
        if self.experiment.config.domains is not None and stage.per_domain and stage.division:
            raise ValueError(
                f"--domains names domains of division '{divisions[0].name}', but stage '{stage.name}' trains those of "
                f"'{divisions[stage.division].name}'; leave out --domains, or run another stage alone with --stage"
            )

    def _checkpoint(self, stage: Stage) -> str:
        return os.path.join(self.output_dir, "checkpoints", stage.name)

    def _run_stage(self, stage: Stage, finished: bool) -> RunResult | None:
        config, environment = self.experiment.config, self.environment
        model = self.experiment.build_model()
        weights = None
        if stage.per_domain:
            loader = self.experiment.train_loader(stage, environment, config.seed)
            weights = domain_weights(
                torch.as_tensor(loader.domain_counts(self.experiment.divisions[stage.division].name))
            )
        runtime = StageRuntime(
            model,
            stage,
            self.experiment.settings(stage),
            self.experiment.embeddings(),
            weights,
            config.seed,
            environment,
            config.stages.pretrain.embedding_l2,
        )
        writer = SummaryWriter(os.path.join(self.output_dir, "events")) if environment.is_main else None
        progress = os.path.join(self.output_dir, "checkpoints", f"{stage.name}.progress")
        if stage.trains_backbone or stage.trains_embeddings:
            self._shared.clear()
        fit = StageTrainer(stage, self.experiment, runtime, progress, writer, environment, self._shared)
        if finished:
            self._load(runtime, self._checkpoint(stage))
        else:
            self._load_predecessor(runtime, stage)
            runtime.model.start_stage(stage.route, stage.division, config.domains)
            if environment.is_main and not config.resume:
                fit.close()
            if environment.is_main:
                os.makedirs(progress, exist_ok=True)
            dist.barrier()
            fit.run(config.resume)
            self._finish_stage(stage, fit, runtime)
        result = self._finish_run(fit, runtime) if stage is self.stages[-1] else None
        if writer is not None:
            writer.close()
        return result

    # Checkpoints

    def _load_predecessor(self, runtime: StageRuntime, stage: Stage) -> None:
        config = self.experiment.config
        position = self.stages.index(stage)
        path = self._checkpoint(self.stages[position - 1]) if position else None
        if config.init_checkpoint is not None and (config.stage is not None or position <= 1):
            path = config.init_checkpoint
        if path is None:
            return
        if os.path.isfile(path):
            backbone = runtime.state(frozenset({EMBEDDINGS, BACKBONE}))
            named = {n.removeprefix("backbone."): t for n, t in backbone.items() if n.startswith("backbone.")}
            checkpoint.load_state_dict_file(path, named)
            return
        if not os.path.isdir(path):
            raise ValueError(
                f"stage '{stage.name}' needs a checkpoint, but {path} does not exist; run the stage before it, or name "
                "one with --init_checkpoint"
            )
        self._load(runtime, path)

    def _load(self, runtime: StageRuntime, path: str) -> None:
        info = checkpoint.read_info(path)
        stored = {ParameterGroup(name) for name in info.get("groups", [])}
        state = runtime.state(frozenset(stored))
        if stored <= {EMBEDDINGS, BACKBONE}:
            modules = runtime.model.modules()
            if any(isinstance(module, DomainModule) and module.widens_tables for module in modules):
                load_with_new_domains(path, state, runtime.model)  # from tables without copies for the domains, too
            else:
                checkpoint.load(path, state)
        elif check_divisions(path, info["divisions"], self.experiment.divisions, self.experiment.config.domains):
            load_with_new_domains(path, state, runtime.model)
        else:
            checkpoint.load(path, state)

    def _finish_stage(self, stage: Stage, fit: StageTrainer, runtime: StageRuntime) -> None:
        validation = fit.evaluate("validation", stage.route, 0 if stage.route is not Route.DOMAIN else stage.division)
        trained = {group for s in self.stages[: self.stages.index(stage) + 1] for group in s.trains}
        groups = frozenset(trained | {EMBEDDINGS, BACKBONE})
        counts = runtime.parameter_counts
        info = {
            "method": self.experiment.config.method,
            "backbone": self.experiment.config.backbone,
            "dataset": self.experiment.config.dataset,
            "divisions": stored_divisions(self.experiment.divisions),
            "groups": sorted(group.value for group in groups),
            "entry": {
                "name": stage.name,
                "epochs": fit.progress.epochs_run,
                "steps": fit.progress.step,
                "seconds": round(fit.seconds, 3),
                "samples_per_second": fit.progress.samples_per_second,
                "trainable_parameters": runtime.trainable_parameters,
                "share_of_backbone": _share(runtime.trainable_parameters, counts["embeddings"] + counts["backbone"]),
                "share_of_interaction": _share(runtime.trainable_parameters, counts["backbone"]),
                "validation": validation.to_dict(),
            },
        }
        checkpoint.save(self._checkpoint(stage), runtime.state(groups), info)
        fit.close()

    # Results

    def _finish_run(self, fit: StageTrainer, runtime: StageRuntime) -> RunResult:
        experiment = self.experiment
        config, natural = experiment.config, experiment.divisions[0]
        layers = {n: m for n, m in runtime.model.named_modules() if isinstance(m, CombiningAdapter)}
        weights = CombinationWeights(layers, natural.num_domains)
        test = fit.evaluate("test", experiment.method.route, combination=weights).to_dict()
        components = experiment.method.components(experiment.divisions)
        combination = weights.compute(natural.domain_names, components)
        pretrained = any(stage.name == "pretrain" for stage in self.stages) and all(
            stage.keeps_pretrained for stage in self.stages if stage.name != "pretrain"
        )
        metrics = {
            "method": config.method,
            "backbone": config.backbone,
            "dataset": config.dataset,
            "divisions": [division.name for division in experiment.divisions],
            "seed": config.seed,
            "world_size": self.environment.world_size,
            "parameters": runtime.parameter_counts,
            "stages": [
                checkpoint.read_info(self._checkpoint(stage))["entry"]
                for stage in self.stages
                if os.path.isdir(self._checkpoint(stage))
            ],
            "test": test,
            "test_backbone": fit.evaluate("test", Route.BASE).to_dict() if pretrained else None,
        }
        if self.environment.is_main:
            write_json(os.path.join(self.output_dir, "metrics.json"), metrics)
            if combination is not None:
                write_json(os.path.join(self.output_dir, "combination.json"), combination.to_dict())
        return RunResult(metrics, combination)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6)
