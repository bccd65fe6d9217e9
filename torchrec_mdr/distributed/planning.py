"""What TorchRec's planner makes of a model on a cluster that is not at hand: memory of a rank, and what it sends."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingCollection

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.distributed.bank_sharding import COUNTED_AS, BankTraining, bank_constraints, bank_sharder
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import (
    EmbeddingConfig,
    RowWiseOnCPU,
    counted_optimizers,
    sharding_types,
    tables_of,
)

RESERVED = 0.15  # of a rank's memory, for activations, the allocator and what the libraries take: TorchRec's own share
ID_BYTES, NUMBER_BYTES = 8, 4
PROCESS_BYTES = 900_000_000  # of a training process on CPU with next to no model, as measured here
_ROWS_BY_RANK = ("row_wise", "table_row_wise", "grid_shard")


@dataclass(frozen=True)
class Cluster:
    """Ranks that a model may be planned for.

    Args:
        ranks (int): number of ranks: GPUs, or processes.
        memory (int): bytes of a rank's device.
        host_memory (int): bytes of a rank's share of its machine.
        ranks_per_node (int): on one machine.
        device (str): `cuda` or `cpu`.
    """

    ranks: int
    memory: int
    host_memory: int
    ranks_per_node: int = 8
    device: str = "cuda"


@dataclass(frozen=True)
class Load:
    """What a stage does in a step.

    Args:
        batch_size (int): rows of a step over all ranks.
        distinct (float): distinct adapters that a rank's rows go through, in each bank.
        trains_tables (bool): whether the backbone's tables train.
        trains_dense (bool): whether the backbone's dense part trains.
        looks_up_banks (bool): whether the stage's route goes through adapters.
        pooling (float): ids of a sparse feature in a row.
    """

    batch_size: int
    distinct: float
    trains_tables: bool
    trains_dense: bool
    looks_up_banks: bool
    pooling: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What became of a model on a cluster; bytes of the rank that has most.

    Args:
        cluster (Cluster): for which it was made.
        refused (str | None): why nothing fits; all else is then 0 or of no meaning.
        tables (int): the backbone's tables on the device, with their optimizer's state.
        banks (int): the banks, likewise, sharded or replicated.
        dense (int): everything else that the model has, with gradients and optimizer state.
        buffers (int): ids and embeddings of a step, by TorchRec's estimate.
        host (int): on the host, where tables are too large for devices.
        saving (int): on the host while a checkpoint is written: copies of two shards of tables at a time, which DCP
            makes one after the other.
        process (int): on CPU, what Python and the libraries take.
        sent (float): bytes that a rank sends in a step.
        kinds (dict[str, int]): tables by how they are sharded.
    """

    cluster: Cluster
    refused: str | None = None
    tables: int = 0
    banks: int = 0
    dense: int = 0
    buffers: int = 0
    host: int = 0
    saving: int = 0
    process: int = 0
    sent: float = 0.0
    kinds: dict[str, int] | None = None

    @property
    def total(self) -> int:
        """On the device; on CPU all of it."""
        kept = self.tables + self.banks + self.dense + self.buffers
        return kept if self.cluster.device == "cuda" else kept + self.saving + self.process


def expected_distinct(domains: int, rows: float) -> float:
    """Distinct domains among rows, where all domains are equally frequent: the most there can be.

    Example::

        >>> round(expected_distinct(1_000_000, 4096)), round(expected_distinct(10, 4096))
        (4088, 10)
    """
    return float(domains * -torch.expm1(rows * torch.log1p(torch.tensor(-1.0 / domains, dtype=torch.float64))))


def plan_stage(
    module: nn.Module, embeddings: EmbeddingConfig, banks: BankTraining, load: Load, cluster: Cluster
) -> Plan:
    """Plans a stage on a cluster, with the constraints and sharders that :func:`shard` has.

    Args:
        module (nn.Module): a MultiDomainModel, prepared for the stage; tables on the meta device.
        embeddings (EmbeddingConfig): optimizer and sharding of the tables.
        banks (BankTraining): how sharded banks train.
        load (Load): what a step does.
        cluster (Cluster): on which ranks.
    """
    device = torch.device(cluster.device)
    environment = Environment(0, cluster.ranks, device, cluster.ranks_per_node)
    local_batch = max(load.batch_size // cluster.ranks, 1)
    types = sharding_types(module, embeddings, environment, frozen=not load.trains_tables)
    constraints = {
        name: ParameterConstraints(sharding_types=kinds, pooling_factors=[load.pooling])
        for name, kinds in types.items()
    }
    for name, own in bank_constraints(module, cluster.ranks).items():
        own.pooling_factors = [load.distinct / local_batch if load.looks_up_banks else 0.0]
        constraints[name] = own
    sharders = [
        cast(ModuleSharder[nn.Module], RowWiseOnCPU(fused_params={})),
        bank_sharder(BankTraining(frozen=True), device),  # what trains them is counted below
    ]
    replicated, dense = _replicated_bytes(module)
    is_gpu = cluster.device == "cuda"
    of_device = "hbm" if is_gpu else "ddr"
    sizes = {"hbm_cap": cluster.memory, "ddr_cap": cluster.host_memory} if is_gpu else {"ddr_cap": cluster.memory}
    per_node = min(cluster.ranks, cluster.ranks_per_node)
    counted = COUNTED_AS[embeddings.optimizer] if load.trains_tables else None
    with _quiet(), counted_optimizers(module, counted, banks.counted_as):
        topology = Topology(cluster.ranks, cluster.device, local_world_size=per_node, **sizes)
        for rank in topology.devices:
            where = rank.storage
            setattr(where, of_device, getattr(where, of_device) - replicated - dense)
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=local_batch,
            constraints=constraints,
            storage_reservation=FixedPercentageStorageReservation(RESERVED),
            debug=False,
        )
        try:
            planner.plan(module, sharders)
        except PlannerError as error:
            needed = replicated + dense + sum(t.numel() * t.element_size() for t in tables_of(module)) / cluster.ranks
            why = " ".join(str(error).split()).split(". ")[0]
            return Plan(cluster, f"{why}; weights alone take {needed / 1e9:.1f} GB a rank, however they are spread")
        return _summed(planner._best_plan, module, (replicated, dense), load, cluster)


def _summed(
    chosen: list[ShardingOption], module: nn.Module, replicated: tuple[int, int], load: Load, cluster: Cluster
) -> Plan:
    tables, banks, buffers, host = (Counter[int]() for _ in range(4))
    copies: dict[int, list[int]] = {}
    for option in chosen:
        weights = option.tensor.element_size()
        is_bank = isinstance(option.module[1], EmbeddingCollection)
        state = _state_bytes(option.tensor, option.tensor.size(1))
        for shard in option.shards:
            rows, width = shard.size
            copies.setdefault(shard.rank, []).append(int(rows * width * weights))
            kept = int(rows * width * weights + rows * state * width / option.tensor.size(1))
            is_gpu, storage = cluster.device == "cuda", shard.storage
            on_device, on_host = (storage.hbm, storage.ddr) if is_gpu else (storage.ddr, 0)
            kept = min(kept, on_device)  # the rest, where a cache stands before a table on the host, is there
            (banks if is_bank else tables)[shard.rank] += kept
            buffers[shard.rank] += on_device - kept
            host[shard.rank] += on_host
    most = max(range(cluster.ranks), key=lambda rank: tables[rank] + banks[rank] + buffers[rank])
    return Plan(
        cluster,
        tables=tables[most],
        banks=banks[most] + replicated[0],
        dense=replicated[1],
        buffers=buffers[most],
        host=max(host.values(), default=0),
        saving=max((sum(sorted(own)[-2:]) for own in copies.values()), default=0),
        process=0 if cluster.device == "cuda" else PROCESS_BYTES,
        sent=_sent(chosen, module, load, cluster.ranks),
        kinds=dict(Counter(option.sharding_type for option in chosen)),
    )


def _sent(chosen: list[ShardingOption], module: nn.Module, load: Load, ranks: int) -> float:
    """Bytes that a rank sends in a step, on average: ids there, rows back, and gradients the way of rows."""
    away, local = (ranks - 1) / ranks, load.batch_size / ranks
    total = 0.0
    for option in chosen:
        width = option.tensor.size(1)
        if isinstance(option.module[1], EmbeddingCollection):
            if load.looks_up_banks:
                total += away * load.distinct * (ID_BYTES + 2 * width * NUMBER_BYTES)
            continue
        if option.sharding_type == "data_parallel":
            total += 2 * away * option.tensor.numel() * NUMBER_BYTES * load.trains_tables
            continue
        # where rows lie by ranks, each rank has a part of every row's sum
        rows = load.batch_size if option.sharding_type in _ROWS_BY_RANK else local
        ways = 2 if load.trains_tables else 1
        total += away * (local * load.pooling * ID_BYTES + ways * rows * width * NUMBER_BYTES)
    in_tables = {id(table) for table in tables_of(module)}
    shared = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in in_tables)
    return total + 2 * away * shared * NUMBER_BYTES


def _replicated_bytes(module: nn.Module) -> tuple[int, int]:
    """What every rank has of replicated banks, and of all else outside tables.

    That are the numbers, and of those that train the gradient, the buffer it is sent from, and Adam's two moments.
    """
    in_tables = {id(table) for table in tables_of(module)}
    of_banks = {id(t) for bank in module.modules() if isinstance(bank, Bank) for t in bank.row_tensors().values()}
    banks, dense = 0, 0
    for tensor in [*module.parameters(), *module.buffers()]:
        if id(tensor) in in_tables:
            continue
        size = tensor.numel() * tensor.element_size() * (5 if tensor.requires_grad else 1)
        banks, dense = (banks + size, dense) if id(tensor) in of_banks else (banks, dense + size)
    return banks, dense


def _state_bytes(table: Any, width: int) -> float:
    """Bytes of a fused optimizer's state for a row of a table."""
    optimizers = getattr(table, "_optimizer_classes", [])
    if not optimizers:
        return 0.0
    return {"Adam": 2.0 * width, "Adagrad": 1.0 * width, "RowWiseAdagrad": 1.0}.get(optimizers[0].__name__, 0.0) * 4


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the planner tells its own developers."""
    logger = logging.getLogger("torchrec")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
