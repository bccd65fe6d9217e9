"""Whether a run's banks are replicated or sharded."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.bank_tables import BankTables
from torchrec_mdr.distributed.bank_sharding import BankTraining
from torchrec_mdr.distributed.environment import Environment, on_main
from torchrec_mdr.distributed.sharding import rank_memory
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.experiment import Banks, Experiment

FEW_DOMAINS = 1000  # of all divisions, below which nobody needs tables
REPLICATED_NUMBERS = 4  # a number of a bank that trains: itself, its gradient, and Adam's two moments
MOST_EXPERTS = 5000  # that a gate may weigh
LARGE_SHARE = 0.25  # of a rank's memory


def with_banks(experiment: Experiment, environment: Environment, begun: Banks | None = None) -> Experiment:
    """The experiment, with its banks where they are; called by all ranks, for which the main process decides.

    Args:
        experiment (Experiment): method, divisions and options.
        environment (Environment): rank, world size, device.
        begun (str | None): where they were when the run began; with `auto`, they stay there, whatever memory is now.
    """
    if begun is not None and experiment.config.banks == "auto":
        return replace(experiment, banks=begun)
    return replace(experiment, banks=on_main(lambda: choose_banks(experiment, environment), environment))


def choose_banks(experiment: Experiment, environment: Environment) -> Banks:
    """Where the run's banks are; nothing of their size is allocated.

    Args:
        experiment (Experiment): method, divisions and options.
        environment (Environment): rank, world size, device.

    Raises:
        ValueError: sharded banks are asked for, and cannot be had.
    """
    config = experiment.config
    few = sum(division.num_domains for division in experiment.divisions) < FEW_DOMAINS
    if config.banks == "replicated" or (config.banks == "auto" and few):
        return "replicated"
    try:
        tables = sharded_tables(experiment)
    except ValueError as error:
        if config.banks == "auto":
            return "replicated"
        raise ValueError(f"--banks sharded: {error}") from error
    if config.banks == "auto":
        numbers = sum(table.numel() for table in tables.parameters())
        is_large = 4 * REPLICATED_NUMBERS * numbers > LARGE_SHARE * rank_memory(environment)
        return "sharded" if is_large else "replicated"
    BankTraining(config.bank_optimizer).fused_params(environment.device)  # refuses what the device has not
    return "sharded"


def sharded_tables(experiment: Experiment) -> BankTables:
    """The tables that a run's banks would be.

    Raises:
        ValueError: they cannot be sharded; with the mend.
    """
    config = experiment.config
    for option in ("compile", "static_shapes"):
        if getattr(config, option):
            raise ValueError(f"the number of domains in a batch differs from step to step; leave out --{option}")
    model = sharded_model(experiment)
    experts = max(bank.num_adapters for bank in model.backbone.modules() if isinstance(bank, Bank))
    for stage in experiment.stages():
        runs = config.stage in (None, stage.name)
        if runs and experts > MOST_EXPERTS and experiment.method.reads_all_adapters(stage):
            raise ValueError(
                f"stage '{stage.name}' has all {experts} experts on every rank, and more than {MOST_EXPERTS} are too "
                "many; let the gate choose by domain with --method_options.top_k 4 (one gate for all layers), or run "
                "the stages before it alone with --stage"
            )
    assert model.bank_tables is not None
    return model.bank_tables


def sharded_model(experiment: Experiment) -> MultiDomainModel:
    """The run's model with sharded banks, without their values; the backbone has some where it cannot do without."""
    sharded = replace(experiment, banks="sharded")
    model = sharded.outline()
    if model is None:
        with torch.random.fork_rng(devices=[]):
            model = sharded.build_model()
    return model


def stage_banks(experiment: Experiment, stage: Stage) -> Experiment:
    """The experiment of one stage: where each row goes through all adapters, they are on every rank."""
    return replace(experiment, banks="replicated") if experiment.method.reads_all_adapters(stage) else experiment
