"""Whether a model fits into memory, found before any of it is there."""

from __future__ import annotations

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.domain_module import AllDomainsModule, ParameterGroup
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import rank_memory, tables_of
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.experiment import Experiment

_TRAINED = 3  # a parameter trained by Adam, and its two moments
_AVERAGED = 2  # the average, and the copy of it that a checkpoint takes


def check_memory(experiment: Experiment, environment: Environment) -> None:
    """Refuses a model that cannot fit, by its sizes alone; what fits barely may still fail later.

    Args:
        experiment (Experiment): data set x backbone x method, see :func:`with_banks`.
        environment (Environment): the processes and their device.

    Raises:
        ValueError: embedding tables or adapters are too large; it names the feature or division that makes them so.
    """
    model = experiment.outline()
    if model is None:
        return
    memory = rank_memory(environment)
    groups = parameter_groups(model)
    tables = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if groups[name] is ParameterGroup.EMBEDDINGS
    )
    embeddings = experiment.embeddings()
    copies, spread = 1, environment.world_size
    if embeddings.optimizer == "adam":
        copies, spread = _TRAINED, 1 if environment.device.type == "cpu" else spread  # where each process has it all
    taken = tables * copies // spread
    if taken > memory:
        features = experiment.schema.sparse_features
        largest = max(features, key=lambda one: one.num_embeddings)
        what = f"sparse feature '{largest.name}' has num_embeddings of {largest.num_embeddings:,}"
        rows = sum(feature.num_embeddings for feature in features)
        if tables > 8 * experiment.config.embeddings.dim * rows:  # twice what one model of them has
            what += f", and the method has tables for each of {experiment.divisions[0].num_domains:,} domains"
        raise ValueError(
            f"the embedding tables take {_shown(taken)} in each process, which has {_shown(memory)}: {what}; correct "
            "schema.json, hash ids, or take more processes, a smaller --embeddings.dim or another method"
        )
    config = experiment.config
    starts = config.init_checkpoint is not None  # in place of pretraining
    runs = [
        stage
        for stage in experiment.stages()
        if stage.name == config.stage or (config.stage is None and not (stage.name == "pretrain" and starts))
    ]
    division = max(experiment.divisions, key=lambda one: one.num_domains)
    domains = f"division '{division.name}' has {division.num_domains:,} domains"
    mend = "pool rare ones, as prepare --min_rows does, or take another --division, another method or smaller layers"
    for stage in runs:
        others = _dense_bytes(model, groups, stage, experiment.settings(stage), environment.world_size)
        if others > memory:
            raise ValueError(
                f"the model takes {_shown(others)} in each process in stage '{stage.name}', which has "
                f"{_shown(memory)}: {domains}; {mend}"
            )
        train, evaluate = _row_bytes(model, stage)
        sizes = experiment.schema.rows
        batch = min(config.batch_size, sizes["train"])
        eval_batch = min(config.eval_batch_size, max(sizes["validation"], sizes["test"]))
        for option, size, a_row in (("", batch, train), ("eval_", eval_batch, evaluate)):
            most = a_row * -(-size // environment.world_size)
            if most and others + most > memory:
                raise ValueError(
                    f"a batch of {size:,} rows takes {_shown(most)} beside {_shown(others)} of the model in each "
                    f"process in stage '{stage.name}', which has {_shown(memory)}: each row goes through the parts of "
                    f"all domains, and {domains}; lower --{option}batch_size, or {mend}"
                )


def _dense_bytes(
    model: MultiDomainModel,
    groups: dict[str, ParameterGroup],
    stage: Stage,
    settings: StageConfig,
    world_size: int,
) -> int:
    """What a process holds in a stage of all that is no embedding table, at least."""
    replicated = [bank for bank in model.modules() if isinstance(bank, Bank) and bank.table is None]
    banks = {id(own): bank for bank in replicated for own in bank.parameters(False)}
    factored = {id(own) for bank in replicated for pair in bank.factored_tables() for own in pair}
    in_tables = {id(table) for table in tables_of(model)}
    kept = stage.per_domain + (_AVERAGED if settings.ema_rows or settings.ema_decay else 0)
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        bank = banks.get(id(parameter))
        if groups[name] is ParameterGroup.EMBEDDINGS:
            continue
        if id(parameter) in in_tables:  # of sharded banks
            total += size // world_size
        elif groups[name] not in stage.trains or not (bank is None or bank.trains_on(stage.route, stage.division)):
            total += size
        else:
            in_factors = id(parameter) in factored and world_size == 1
            step = 0 if in_factors else 1 + (0 if bank is None else bank.step_tensors)
            total += size * (_TRAINED + kept + step)
    return total


def _row_bytes(model: MultiDomainModel, stage: Stage) -> tuple[int, int]:
    """What a row takes in training and in evaluation, in modules that send it through the parts of all domains."""
    widths = [4 * module.row_numbers(stage.route) for module in model.modules() if isinstance(module, AllDomainsModule)]
    return sum(widths), max(widths, default=0)


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e12 else f"{size / 1e12:,.1f} TB"
