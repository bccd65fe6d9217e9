"""A training step of a wrapped DLRM whose adapters do not act, against a step of the DLRM itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import device, interleave
from torchrec_mdr import Division, MLoRA, MultiDomainModel, MultiDomainTrain, prepare_stage

Kind = Literal["dlrm", "dlrm_dcn"]
GOAL = Goal("<=", 1.03)
BATCHES = 8


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        kinds: of TorchRec's models.
        batch_size: rows of a step.
        rounds: interleaved pairs of steps.
        domains: number of domains.
        tables: embedding tables.
        num_embeddings: rows of each.
        dim: width of embeddings.
        hidden: widths of the over arch's hidden layers.
    """

    kinds: tuple[Kind, ...] = ("dlrm", "dlrm_dcn")
    batch_size: int = 4096
    rounds: int = 200
    domains: int = 20
    tables: int = 8
    num_embeddings: int = 10_000
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)


class Batch(NamedTuple):
    """Rows in any order, as a loop of one's own has them."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    domain_ids: Tensor


def batches(options: Options) -> list[Batch]:
    """Random rows."""
    names, rows = [f"f{i}" for i in range(options.tables)], options.batch_size
    found = []
    for _ in range(BATCHES):
        ids = torch.randint(options.num_embeddings, (options.tables * rows,))
        features = KeyedJaggedTensor.from_lengths_sync(names, ids, torch.ones_like(ids, dtype=torch.int32))
        labels, domains = torch.randint(2, (rows,)), torch.randint(options.domains, (rows,))
        dense = torch.rand(rows, 13)
        found.append(Batch(*(value.to(device()) for value in (dense, features, labels, domains))))
    return found


def build(kind: Kind, options: Options) -> DLRM:
    """The model, with tables on the meta device."""
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=options.dim, num_embeddings=options.num_embeddings, feature_names=[f"f{i}"]
        )
        for i in range(options.tables)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    layers: dict[str, Any] = {
        "dense_arch_layer_sizes": [64, options.dim],
        "over_arch_layer_sizes": [*options.hidden, 1],
    }
    if kind == "dlrm_dcn":
        return DLRM_DCN(collection, 13, **layers, dcn_num_layers=2, dcn_low_rank_dim=32)
    return DLRM(collection, 13, **layers)


def step_of(train_model: nn.Module, source: list[Batch]) -> Callable[[], object]:
    """One training step: row-wise Adagrad in the tables' backward pass, Adam for the dense part."""
    tables = [p for m in train_model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()]
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": 0.05})
    dmp = DistributedModelParallel(train_model, device=device()).train()
    dense = [p for _, p in in_backward_optimizer_filter(dmp.named_parameters()) if p.requires_grad]
    optimizer, rows = torch.optim.Adam(dense, lr=1e-3, fused=True), cycle(source)

    def step() -> None:
        optimizer.zero_grad()
        dmp(next(rows))[0].backward()
        optimizer.step()

    return step


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one rank, where there is none."""
    given = dist.is_initialized()
    if not given:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if not given:
            dist.destroy_process_group()


def measure(options: Options) -> Report:
    """Times a training step of a wrapped model in its stage `pretrain`, on the route BASE, against the plain model's.

    Both are in DistributedModelParallel on one rank and get the same batches, rows in any order.
    """
    report = Report("wrapping", "time of a training step", options)
    torch.manual_seed(0)
    source = batches(options)
    with alone():
        for kind in tqdm(options.kinds, desc="wrapping", unit="model", disable=None):
            model = MultiDomainModel(build(kind, options), MLoRA(rank=8), [Division("domain", options.domains)])
            prepare_stage(model, "pretrain")
            steps = {
                "plain": step_of(DLRMTrain(build(kind, options)), source),
                "wrapped": step_of(MultiDomainTrain(model, "domain_ids"), source),
            }
            timings = interleave(steps, options.rounds, warmup=10)
            case: dict[str, str | int] = {"model": kind, "batch": options.batch_size}
            goal = GOAL if options.batch_size == Options.batch_size else None
            context = {"ms": timings.milliseconds("wrapped")}
            report.add(Line(case, "wrapped, BASE", "plain", timings.ratio("wrapped", "plain"), goal, context))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("wrapping", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
