"""Samples per second of mlora's stages, compiled by torch.compile against eager."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.report import Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import build_runtime, click_schema, random_batches, training
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.registry import BACKBONES

EAGER, COMPILED, WRITTEN = "eager", "compiled", "eager, gradients written"


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        backbones: keys of BACKBONES.
        rows: embedding rows of all tables together.
        dim: width of the tables.
        num_sparse: tables.
        num_dense: dense features.
        domains: of the division.
        hidden: widths of the MLP part's hidden layers.
        batch_size: rows.
        batches: steps of a round; both forms have the same batches.
        rounds: of each form.
    """

    backbones: tuple[str, ...] = ("dlrm", "dlrm_dcn", "mlp")
    rows: int = 10_000_000
    dim: int = 16
    num_sparse: int = 26
    num_dense: int = 13
    domains: int = 20
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    batches: int = 5
    rounds: int = 15


def measure(options: Options) -> Report:
    """Times mlora's pretrain and adapt stages with `--compile` and without, in the sharded pipeline.

    What is compiled holds no table: lookups are the same in both forms. Time to compile is left out. Eager code hands
    the banks' gradients to Adam as factors; compiled code writes them, so eager code that does is measured, too.
    """
    report = Report("compiled", "samples per second", options)
    divisions = (Division("scenario", options.domains),)
    schema = click_schema(options.rows, options.num_sparse, options.num_dense, divisions)
    batches = random_batches(schema, options.batch_size, options.batches)
    method = MLoRA()
    cases = [(backbone, stage) for backbone in options.backbones for stage in method.stages(divisions)]
    with process_group() as environment:
        for backbone, stage in tqdm(cases, desc="compiled", unit="stage", disable=None):
            runs = {}
            for form in (EAGER, COMPILED, *([WRITTEN] if stage.settings == "adapt" else [])):
                model = BACKBONES[backbone](hidden=options.hidden).build(schema, options.dim)
                runtime = build_runtime(
                    model, method, divisions, stage, "rowwise_adagrad", options.dim, environment, form == COMPILED
                )
                banks = runtime.stage_optimizer.by_name.get("banks")
                if form == WRITTEN and isinstance(banks, BankAdam):
                    banks.factors.clear()
                runs[form] = training(runtime, batches)
            timings = interleave(runs, options.rounds)
            for form in list(runs)[1:]:
                case = {"backbone": backbone, "stage": stage.name}
                report.add(Line(case, form, EAGER, timings.speed(form, EAGER)))
            gc.collect()  # sharded models hold themselves in cycles, and their tables are large
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("compiled", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
