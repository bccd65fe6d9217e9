"""Runs a method's stages, one after the other or one alone, and writes what they gave."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.gate import CombiningAdapter
from torchrec_mdr.data.domain_feature import domain_feature
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment, on_main
from torchrec_mdr.distributed.execution import set_float32_products
from torchrec_mdr.methods.stage import BACKBONE, EMBEDDINGS, Stage
from torchrec_mdr.metrics import DomainMetrics, Metrics
from torchrec_mdr.metrics.gains import domain_offsets, paired_gains
from torchrec_mdr.storage import is_whole, make_folder
from torchrec_mdr.training.bank_choice import stage_banks
from torchrec_mdr.training.combination import Combination, CombinationWeights
from torchrec_mdr.training.curves import Curves
from torchrec_mdr.training.domain_file import domain_table
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.init_adapters import init_adapters
from torchrec_mdr.training.lessons import nothing_learned
from torchrec_mdr.training.new_domains import stored_divisions
from torchrec_mdr.training.preemption import Preempted, stop_signals
from torchrec_mdr.training.run_folder import write_results
from torchrec_mdr.training.stage_checkpoint import remove_progress
from torchrec_mdr.training.stage_loading import load_stage, load_start
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
        experiment (Experiment): what is run, as :func:`~torchrec_mdr.training.bank_choice.with_banks` gives it.
        output_dir (str): holds checkpoints, events and results.
        environment (Environment): rank, world size, device.
        resumes (bool): whether it goes on with a run that was interrupted.
        check (Callable): called on the main process before anything is written; raises where the folder is another's.

    Raises:
        ValueError: the experiment does not say where its banks are.
    """

    def __init__(
        self,
        experiment: Experiment,
        output_dir: str,
        environment: Environment,
        resumes: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if experiment.banks is None:
            raise ValueError(
                "the experiment does not say where its banks are, which --banks decides with the memory there is; "
                "give the trainer what with_banks(experiment, environment) makes of it"
            )
        self.experiment = experiment
        self.output_dir = output_dir
        self.environment = environment
        self.resumes = resumes
        self.check = check
        self.stages = experiment.stages()
        set_float32_products(experiment.config.precision, environment.device)
        self.has_trained = False  # or has begun to
        self._shared: dict[Any, Any] = {}  # what hooks keep while the backbone stays as it is

    def run(self, evaluate_test: bool = True) -> RunResult | None:
        """Runs the stages that are left to run.

        Args:
            evaluate_test (bool): whether the last stage is followed by an evaluation on test rows, and the results.

        Returns:
            RunResult | None: None where the run stopped before the last stage.

        Raises:
            ValueError: an impossible option, a checkpoint that does not fit, or a loss that is not finite.
        """
        wanted = self._wanted_stages()
        result: RunResult | None = None
        for stage in wanted:
            self._check_domains(stage)
            finished = on_main(partial(is_whole, self._checkpoint(stage)), self.environment)
            if finished and self.environment.is_main:  # a kill may have left them
                remove_progress(self._progress(stage))
            if finished and stage is not self.stages[-1]:
                logger.info("stage '%s' is finished, going on with the next one", stage.name)
                continue
            result = self._run_stage(stage, finished, evaluate_test)
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

    def _progress(self, stage: Stage) -> str:
        return f"{self._checkpoint(stage)}.progress"

    def _run_stage(self, stage: Stage, finished: bool, evaluate_test: bool) -> RunResult | None:
        config, environment = self.experiment.config, self.environment
        experiment = stage_banks(self.experiment, stage)
        model = experiment.build_model()
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
            config.precision,
            config.compile,
            config.bank_optimizer,
        )
        progress = self._progress(stage)
        if stage.trains_backbone or stage.trains_embeddings:
            self._shared.clear()
        fit = StageTrainer(stage, experiment, runtime, progress, environment, self._shared, self.check)
        saved = fit.checkpoints.newest() if self.resumes and not finished else None
        if finished:
            load_stage(self._checkpoint(stage), runtime, self.experiment)
        else:
            self._load_predecessor(runtime, stage)
            runtime.prepared.start(config.domains)
            natural = self.experiment.divisions[0]
            started = None
            if config.init_adapters is not None:
                started = init_adapters(config.init_adapters, stage, runtime, fit, natural)
            if not self.resumes:
                fit.close()
            on_main(lambda: make_folder(progress, "--output_dir"), environment)
            self.has_trained = True
            if environment.is_main:
                # what an interrupted run has drawn from there on is drawn anew
                purge = 0 if saved is None else saved[1].step + 1
                fit.writer = Curves(os.path.join(self.output_dir, "events", stage.name), purge)
            fit.run(saved)
            self._finish_stage(stage, fit, runtime, {} if started is None else {"init_adapters": started})
            signal = on_main(lambda: stop_signals.received, environment)
            if signal is not None:  # during the stage's last evaluations
                raise Preempted(f"stopped by {signal} after stage '{stage.name}', which is finished")
        result = self._finish_run(fit, runtime) if evaluate_test and stage is self.stages[-1] else None
        if fit.writer is not None:
            fit.writer.close()
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
        load_start(path, stage, runtime, self.experiment)

    def _finish_stage(self, stage: Stage, fit: StageTrainer, runtime: StageRuntime, further: dict[str, Any]) -> None:
        validation = fit.evaluate("validation", stage.route, 0 if stage.route is not Route.DOMAIN else stage.division)
        note = nothing_learned(stage, fit.settings, fit.improved, fit.progress.step, fit.train_rows, validation)
        if note is not None and self.environment.is_main:
            logger.warning(note)
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
                **further,
                "note": note,
            },
        }
        checkpoint.save(self._checkpoint(stage), runtime.state(groups), info, self.check)
        fit.close()

    # Results

    def _entries(self) -> list[dict[str, Any]]:
        """What `metrics.json` says of the stages that are finished."""
        paths = [self._checkpoint(stage) for stage in self.stages]
        return [checkpoint.read_info(path, "entry")["entry"] for path in paths if is_whole(path)]

    def _finish_run(self, fit: StageTrainer, runtime: StageRuntime) -> RunResult:
        experiment = self.experiment
        config, natural = experiment.config, experiment.divisions[0]
        layers = {n: m for n, m in runtime.model.named_modules() if isinstance(m, CombiningAdapter)}
        weights = CombinationWeights(layers, natural.num_domains)
        test = fit.collect("test", experiment.method.route, combination=weights)
        found = test.compute()
        components = experiment.method.components(experiment.divisions)
        combination = weights.compute(natural.domain_names, components)
        pretrained = experiment.method.keeps_backbone(experiment.divisions)
        metrics = {
            "method": config.method,
            "backbone": config.backbone,
            "dataset": config.dataset,
            "divisions": [division.name for division in experiment.divisions],
            "seed": config.seed,
            "world_size": self.environment.world_size,
            "parameters": runtime.parameter_counts,
            "stages": on_main(self._entries, self.environment),
            "test": found.to_dict(),
            "test_backbone": None,
        }
        table = domain_table(found)
        if pretrained:
            compared, table = self._against_backbone(fit, test, found)
            metrics |= compared
        content = None if combination is None else combination.to_dict()
        on_main(self.check, self.environment)
        on_main(lambda: write_results(self.output_dir, metrics, content, table), self.environment)
        return RunResult(metrics, combination)

    def _against_backbone(
        self, fit: StageTrainer, test: DomainMetrics, result: Metrics
    ) -> tuple[dict[str, Any], pa.Table | None]:
        """What the pretrained backbone alone gives on the test rows, what the run gains, and how much of it is news.

        Beside it the table of very many domains.
        """
        experiment, natural = self.experiment, self.experiment.divisions[0]
        backbone, listed = fit.collect("test", Route.BASE), result.listed_domains()
        feature = on_main(lambda: domain_feature(experiment.folder, experiment.schema, natural.name), self.environment)
        with_offsets = None
        if feature is None and natural.num_domains > 1:
            offsets = domain_offsets(*fit.collect("validation", Route.BASE).all_rows(), natural.num_domains)
            logits, labels, domains, row_weights = backbone.all_rows()
            shifted = DomainMetrics(natural.domain_names, sync_on_compute=False)  # every rank has all rows
            columns = (torch.from_numpy(column) for column in (logits + offsets[domains], labels, domains, row_weights))
            shifted.update(*columns)
            found = shifted.compute()
            with_offsets = {"auc": found.auc, "logloss": found.logloss}
        base, gains = backbone.compute(), paired_gains(test, backbone)
        compared = {
            "test_backbone": {**base.to_dict(), "domains": {n: base.domains[n].to_dict() for n in listed}},
            "gain": gains.to_dict(listed),
            "domain_feature": feature,
            "test_backbone_with_offsets": with_offsets,
        }
        return compared, domain_table(result, base, gains)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6)
