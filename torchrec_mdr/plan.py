"""What fits where: `python -m torchrec_mdr.plan --gpus 128 --hbm 80GB ...` plans a run for a cluster not at hand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tabulate import tabulate

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.data.schema import SCHEMA_FILE, Division, Schema, SparseFeature
from torchrec_mdr.distributed.planning import Cluster, Load, Plan, expected_distinct, plan_stage
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.storage import isfile
from torchrec_mdr.training.bank_choice import stage_banks
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import Options, parse
from torchrec_mdr.training.prepared_stage import prepare_stage
from torchrec_mdr.training.stage_runtime import bank_training

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_RANKS = 16384


@dataclass(frozen=True)
class PlanOptions:
    """Which sizes are planned for; all other options are those of `train`.

    Args:
        gpus: numbers of GPUs, with commas between; of processes with --device cpu.
        hbm: memory of one, as 80GB; with --device cpu, of one process.
        ddr: memory of a machine.
        gpus_per_node: GPUs of a machine.
        device: cuda or cpu.
        num_domains: domains of the natural division, in place of the data's.
        distinct: distinct domains among a rank's rows; by default as many as equally frequent domains would give. Each
            counts K experts behind a top_k gate.
        table_rows: rows of each embedding table, with commas between, in place of a data set.
        num_dense: dense features beside --table_rows.
        pooling: ids of a sparse feature in a row.
    """

    gpus: str = "8,16,32,64,128"
    hbm: str = "80GB"
    ddr: str = "1TB"
    gpus_per_node: int = 8
    device: str = "cuda"
    num_domains: int | None = None
    distinct: float | None = None
    table_rows: str | None = None
    num_dense: int = 13
    pooling: float = 1.0


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table of what fits, a line for each stage and number of GPUs; returns 1 where nothing fits, 0 else."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = _split(given)
    parser = SentenceParser(
        prog="python -m torchrec_mdr.plan",
        description="TorchRec's plan of a run for a cluster that is not at hand. All options of train are taken, too.",
    )
    parser.add_class_arguments(PlanOptions, as_group=False)
    wanted = PlanOptions(**vars(parser.parse_args(own)))
    clusters = _clusters(wanted)
    options = parse(rest)
    experiment = _experiment(options, wanted)
    plans = {
        stage.name: [_plan(experiment, stage, wanted, cluster) for cluster in clusters] for stage in experiment.stages()
    }
    print(_heading(experiment, wanted))
    print(_table(plans))
    for name, of_stage in plans.items():
        for plan in of_stage:
            if plan.refused is not None:
                print(f"{name} on {plan.cluster.ranks}: {plan.refused}", file=sys.stderr)
    return 0 if any(all(p[i].refused is None for p in plans.values()) for i in range(len(clusters))) else 1


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's own options, and train's."""
    names = {f"--{name}" for name in PlanOptions.__dataclass_fields__} | {"--help", "-h"}
    own: list[str] = []
    rest: list[str] = []
    takes = False
    for argument in given:
        is_own = takes or argument.partition("=")[0] in names
        (own if is_own else rest).append(argument)
        takes = not takes and is_own and "=" not in argument and argument not in ("--help", "-h")
    return own, rest


def _clusters(wanted: PlanOptions) -> list[Cluster]:
    if wanted.device not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, not '{wanted.device}'")
    counts = _numbers("--gpus", wanted.gpus)
    if max(counts) > MOST_RANKS:
        raise ValueError(f"--gpus {max(counts)} is more than {MOST_RANKS}, the most that is planned for")
    if wanted.gpus_per_node < 1:
        raise ValueError(f"--gpus_per_node must be at least 1, not {wanted.gpus_per_node}")
    for count in counts:
        if count > wanted.gpus_per_node and count % wanted.gpus_per_node:
            raise ValueError(
                f"--gpus {count} does not fill machines of {wanted.gpus_per_node}; give a multiple, or --gpus_per_node"
            )
    memory, host = _bytes("--hbm", wanted.hbm), _bytes("--ddr", wanted.ddr)
    return [
        Cluster(count, memory, host // min(count, wanted.gpus_per_node), wanted.gpus_per_node, wanted.device)
        for count in counts
    ]


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in str(text).strip("[]").split(",")]
    if not all(re.fullmatch(r"[0-9]+", part) and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be whole numbers above 0 with commas between, not '{text}'")
    return [int(part) for part in parts]


def _bytes(option: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", str(text).strip())
    if match is None or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise ValueError(f"{option} must be a size such as 80GB or 512GiB, not '{text}'")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _experiment(options: Options, wanted: PlanOptions) -> Experiment:
    """The run on the sizes that are planned for; no row is read."""
    dataset = options.run.dataset
    if wanted.table_rows is not None:
        rows = _numbers("--table_rows", wanted.table_rows)
        if wanted.num_domains is None:
            raise ValueError(
                "--table_rows names the sizes of tables alone; give the number of domains by --num_domains"
            )
        if wanted.num_dense < 0:
            raise ValueError(f"--num_dense must be at least 0, not {wanted.num_dense}")
        names = [options.run.division or "domain"]
        names += [f"auxiliary_{i}" for i in range(1, options.method.min_divisions)]
        options = replace(options, run=replace(options.run, division=names[0], auxiliary_division=names[1:] or None))
        schema = Schema(
            "sizes",
            "label",
            tuple(SparseFeature(f"sparse_{i}", size) for i, size in enumerate(rows)),
            tuple(f"dense_{i}" for i in range(wanted.num_dense)),
            tuple(Division(name, 2) for name in names),
            {},
        )
    elif isfile(os.path.join(dataset, SCHEMA_FILE)):
        schema = Schema.load(dataset)
    else:
        raise ValueError(
            f"--dataset {dataset} is no folder of prepared data; name one, or sizes by --table_rows and --num_domains"
        )
    if wanted.num_domains is not None:
        if wanted.num_domains < 1:
            raise ValueError(f"--num_domains must be at least 1, not {wanted.num_domains}")
        natural = options.run.division or schema.divisions[0].name
        schema.division(natural)
        schema = replace(
            schema,
            divisions=tuple(Division(d.name, wanted.num_domains) if d.name == natural else d for d in schema.divisions),
        )
    banks: Literal["replicated", "sharded"] = "replicated" if options.run.banks == "replicated" else "sharded"
    return replace(Experiment.of_schema(options, schema, dataset), banks=banks)


def _plan(experiment: Experiment, stage: Stage, wanted: PlanOptions, cluster: Cluster) -> Plan:
    config, settings = experiment.config, experiment.settings(stage)
    if config.batch_size < cluster.ranks:
        raise ValueError(f"--batch_size {config.batch_size} gives not each of {cluster.ranks} ranks a row; take more")
    with torch.device("meta"):  # so that sizes take no memory
        model = stage_banks(experiment, stage).build_model()
    prepare_stage(model, stage)
    banks = bank_training(model, stage, settings, config.bank_optimizer)
    rows = config.batch_size / cluster.ranks
    size = experiment.divisions[stage.division].num_domains
    distinct = min(expected_distinct(size, rows) if wanted.distinct is None else wanted.distinct, size, rows)
    chosen = experiment.method.adapters_per_row(stage)
    if chosen > 1:  # each domain its own ones, and others that no other domain of the rank has chosen
        experts = max((bank.num_adapters for bank in model.modules() if isinstance(bank, Bank)), default=size)
        distinct = min(chosen * distinct, experts)
    load = Load(
        config.batch_size,
        distinct,
        stage.trains_embeddings,
        stage.trains_backbone,
        model.bank_tables is not None,
        wanted.pooling,
    )
    return plan_stage(model, experiment.embeddings(), banks, load, cluster)


def _heading(experiment: Experiment, wanted: PlanOptions) -> str:
    tables = sum(feature.num_embeddings for feature in experiment.schema.sparse_features)
    config, natural = experiment.config, experiment.divisions[0]
    return (
        f"{config.method} on {config.backbone}, {natural.num_domains:,} domains, banks {experiment.banks}; {tables:,} "
        f"embedding rows of {config.embeddings.dim}; {config.batch_size:,} rows a step; {wanted.hbm} a rank"
    )


def _table(plans: dict[str, list[Plan]]) -> str:
    heads = ["stage", "ranks", "fits", "tables GB", "banks GB", "dense GB", "buffers GB", "total GB", "host GB"]
    heads += ["saving GB"]
    lines = []
    for stage, of_stage in plans.items():
        for plan in of_stage:
            parts = [plan.tables, plan.banks, plan.dense, plan.buffers, plan.total, plan.host, plan.saving]
            sizes = [f"{part / 1e9:.3f}" for part in parts] if plan.refused is None else [""] * len(parts)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted((plan.kinds or {}).items()))
            sent = "" if plan.refused is not None else f"{plan.sent / 1e6:.2f}"
            fits = "yes" if plan.refused is None else "no"
            lines.append([stage, plan.cluster.ranks, fits, *sizes, sent, kinds])
    return tabulate(lines, [*heads, "sent MB a step", "sharding"], disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
