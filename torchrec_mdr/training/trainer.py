"""Runs a method's stages, one after the other or one alone, and writes what they gave."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from torchrec_mdr.adapters.bank import CombiningAdapter, ParameterGroup
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.baselines.domain_tables import DomainSparseArch
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.experiments.leave_one_out.left_out import LeftOutEmbeddings
from torchrec_mdr.methods.stage import BACKBONE, EMBEDDINGS, Stage
from torchrec_mdr.report.combination import CombinationWeights, combination_table, draw_combination
from torchrec_mdr.report.tables import domain_table, parameter_table, stage_table
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.new_domains import check_new_domains, load_with_new_domains
from torchrec_mdr.training.stage_runtime import StageRuntime
from torchrec_mdr.training.stage_trainer import StageTrainer, domain_weights

MOST_DRAWN = 100  # domains in a picture
logger = logging.getLogger(__name__)


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
        self._seen: dict[tuple[int, ...] | None, LeftOutEmbeddings] = {}

    def run(self) -> dict[str, Any] | None:
        """Runs the stages that are left to run.

        Returns:
            dict | None: the content of `metrics.json`; None where the run stopped before the last stage.

        Raises:
            ValueError: an impossible option, a checkpoint that does not fit, or a loss that is not finite.
        """
        config = self.experiment.config
        wanted = self._wanted_stages()
        metrics: dict[str, Any] | None = None
        for stage in wanted:
            finished = os.path.isdir(self._checkpoint(stage))
            if finished and not config.resume:
                raise ValueError(
                    f"stage '{stage.name}' is finished in {self.output_dir}; name another output folder, or evaluate it"
                    " again with --resume"
                )
            if finished and config.resume and stage is not self.stages[-1]:
                logger.info("stage '%s' is finished, going on with the next one", stage.name)
                continue
            metrics = self._run_stage(stage, finished=finished and config.resume)
        return metrics

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

    def _checkpoint(self, stage: Stage) -> str:
        return os.path.join(self.output_dir, "checkpoints", stage.name)

    def _run_stage(self, stage: Stage, finished: bool) -> dict[str, Any] | None:
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
            self._seen.clear()
        fit = StageTrainer(stage, self.experiment, runtime, progress, writer, environment, self._seen)
        if finished:
            self._load(runtime, self._checkpoint(stage))
            info = checkpoint.read_info(self._checkpoint(stage))
        else:
            self._load_predecessor(runtime, stage)
            self._start_stage(stage, runtime)
            if environment.is_main and not config.resume:
                fit.close()
            if environment.is_main:
                os.makedirs(progress, exist_ok=True)
            dist.barrier()
            fit.run(config.resume)
            info = self._finish_stage(stage, fit, runtime)
        metrics = None
        if stage is self.stages[-1]:
            metrics = self._finish_run(fit, runtime, info)
        if writer is not None:
            writer.close()
        return metrics

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
        mine = self._domain_names()
        state = runtime.state(frozenset(stored))
        if stored <= {EMBEDDINGS, BACKBONE} and any(isinstance(m, DomainSparseArch) for m in runtime.model.modules()):
            load_with_new_domains(path, state, runtime.model)  # from tables without parts for the domains, too
            return
        if stored <= {EMBEDDINGS, BACKBONE} or info["divisions"] == mine:
            checkpoint.load(path, state)
            return
        check_new_domains(path, info["divisions"], mine, self.experiment.config.domains)
        load_with_new_domains(path, state, runtime.model)

    def _start_stage(self, stage: Stage, runtime: StageRuntime) -> None:
        """Gives parts that take up an earlier result their start: of the domains to train, where the run names some."""
        domains = self.experiment.config.domains
        if domains is None:
            runtime.model.start_stage(stage.route, stage.division)
            return
        banks, tables = runtime.banks.values(), runtime.owned_tables().values()
        kept = [{name: tensor.detach().clone() for name, tensor in bank.row_tensors().items()} for bank in banks]
        kept_tables = [rows.tensor.clone() for rows in tables]
        runtime.model.start_stage(stage.route, stage.division)
        size = self.experiment.divisions[stage.division].num_domains
        for bank, tensors in zip(banks, kept, strict=True):
            others = torch.ones(bank.num_adapters, dtype=torch.bool).view(-1, size)
            others[:, domains] = False
            with torch.no_grad():
                for name, tensor in bank.row_tensors().items():
                    tensor[others.flatten()] = tensors[name][others.flatten()]
        for rows, values in zip(tables, kept_tables, strict=True):
            other_rows = torch.isin(rows.owners.cpu(), torch.tensor(domains), invert=True)
            rows.tensor[other_rows] = values[other_rows]

    def _domain_names(self) -> dict[str, list[str]]:
        return {division.name: list(division.domain_names) for division in self.experiment.divisions}

    def _finish_stage(self, stage: Stage, fit: StageTrainer, runtime: StageRuntime) -> dict[str, Any]:
        validation = fit.evaluate("validation", stage.route, 0 if stage.route is not Route.DOMAIN else stage.division)
        trained = {group for s in self.stages[: self.stages.index(stage) + 1] for group in s.trains}
        groups = frozenset(trained | {EMBEDDINGS, BACKBONE})
        counts = runtime.parameter_counts
        info = {
            "method": self.experiment.config.method,
            "backbone": self.experiment.config.backbone,
            "dataset": self.experiment.config.dataset,
            "divisions": self._domain_names(),
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
        return info

    # Results

    def _finish_run(self, fit: StageTrainer, runtime: StageRuntime, info: dict[str, Any]) -> dict[str, Any]:
        config = self.experiment.config
        layers = {n: m for n, m in runtime.model.named_modules() if isinstance(m, CombiningAdapter)}
        combination = CombinationWeights(layers, self.experiment.divisions[0].num_domains)
        test = fit.evaluate("test", self.experiment.method.route, combination=combination).to_dict()
        self._write_combination(combination)
        pretrained = any(stage.name == "pretrain" for stage in self.stages) and all(
            stage.keeps_pretrained for stage in self.stages if stage.name != "pretrain"
        )
        backbone = fit.evaluate("test", Route.BASE).to_dict() if pretrained else None
        entries = []
        for stage in self.stages:
            if os.path.isdir(self._checkpoint(stage)):
                entries.append(checkpoint.read_info(self._checkpoint(stage))["entry"])
        metrics = {
            "method": config.method,
            "backbone": config.backbone,
            "dataset": config.dataset,
            "divisions": [division.name for division in self.experiment.divisions],
            "seed": config.seed,
            "world_size": self.environment.world_size,
            "parameters": runtime.parameter_counts,
            "stages": entries,
            "test": test,
            "test_backbone": backbone,
        }
        if self.environment.is_main:
            checkpoint.write_json(os.path.join(self.output_dir, "metrics.json"), metrics)
            print(domain_table(test, backbone))
            print(stage_table(entries))
            print(parameter_table(runtime.parameter_counts))
        return metrics

    def _write_combination(self, combination: CombinationWeights) -> None:
        """Writes what each domain draws from each part, as data and as a picture, where the method combines parts."""
        means = combination.compute()
        if not means or not self.environment.is_main:
            return
        domains = self.experiment.divisions[0].domain_names
        parts = self.experiment.method.parts(self.experiment.divisions)
        path = os.path.join(self.output_dir, "combination")
        checkpoint.write_json(f"{path}.json", combination_table(means, domains, parts))
        if len(domains) <= MOST_DRAWN:
            draw_combination(
                means, domains, parts, f"{self.experiment.config.method}: mean weights on test rows", f"{path}.png"
            )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6)
