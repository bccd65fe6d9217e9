"""How a model's embedding tables are spread over ranks, and its dense part replicated."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable, PooledEmbeddingsReduceScatter
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.distributed.bank_sharding import (
    COUNTED_AS,
    FUSED_OPTIMIZERS,
    BankTraining,
    bank_constraints,
    bank_sharder,
    bank_tables,
)
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.mean_pooling import MeanPoolingCollection
from torchrec_mdr.model import is_lookup

EmbeddingOptimizer = Literal["auto", "adam", "rowwise_adagrad", "adagrad", "sgd"]
Sharding = Literal["auto", "data_parallel", "table_wise", "column_wise", "row_wise"]
_INIT_BLOCK = 1 << 16  # rows drawn at once; part of the definition of the initial values


@dataclass
class EmbeddingConfig:
    """The embedding tables and how they are spread over ranks.

    Args:
        dim: width of all tables, a multiple of 4.
        optimizer: `adam` is fused on GPU; on CPU it needs data-parallel tables, since fbgemm has no fused Adam there.
            `auto` is the papers' `adam` for small tables and `rowwise_adagrad` for large ones.
        sharding: of all tables; `auto` leaves the choice to TorchRec's planner.
        table_sharding: of single tables, by feature name.
    """

    dim: int = 16
    optimizer: EmbeddingOptimizer = "auto"
    sharding: Sharding = "auto"
    table_sharding: dict[str, Sharding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dim < 1 or self.dim % 4:
            raise ValueError(f"dim must be a positive multiple of 4, not {self.dim}")


class EvenReduceScatter(PooledEmbeddingsReduceScatter):
    """TorchRec's reduce-scatter for gloo, whose collectives cannot scatter unequal shares: zeros fill up."""

    def forward(self, local_embs: Tensor, input_splits: list[int] | None = None) -> PooledEmbeddingsAwaitable:
        """Embeddings [rows of all ranks, dim] -> awaitable of this rank's, summed over ranks."""
        if not input_splits or len(set(input_splits)) == 1:
            return super().forward(local_embs, input_splits)
        most, own = max(input_splits), input_splits[dist.get_rank(self._pg)]
        shares = [F.pad(share, (0, 0, 0, most - share.shape[0])) for share in local_embs.split(input_splits)]
        awaitable = super().forward(torch.cat(shares))
        awaitable.callbacks.append(lambda embeddings: embeddings[:own])
        return awaitable


class RowWiseOnCPU(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which runs row-wise sharding with the fused kernel on CPU but does not list it there."""

    def shard(
        self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: str | None = None
    ) -> ShardedEmbeddingBagCollection:
        """Shards one collection."""
        sharded = MeanPoolingCollection(
            module,
            params,
            env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        for output in sharded._output_dists:
            if isinstance(output, RwPooledEmbeddingDist) and sharded._device.type == "cpu":
                output._dist = EvenReduceScatter(output._pg)
        return sharded

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types the planner may choose from."""
        types = super().sharding_types(compute_device_type)
        return types if ShardingType.ROW_WISE.value in types else [*types, ShardingType.ROW_WISE.value]


def shard(
    module: nn.Module,
    config: EmbeddingConfig,
    learning_rate: float,
    weight_decay: float,
    frozen: bool,
    environment: Environment,
    banks: BankTraining | None = None,
) -> DistributedModelParallel:
    """Shards the embedding tables of a module, those of sharded banks among them, and replicates the rest.

    Args:
        module (nn.Module): its embedding tables may lie on the meta device.
        config (EmbeddingConfig): optimizer and sharding of the tables.
        learning_rate (float): of the tables' optimizer.
        weight_decay (float): of a fused optimizer, for rows looked up.
        frozen (bool): tables do not train: no optimizer state is made for them.
        environment (Environment): rank, world size, device.
        banks (BankTraining | None): how sharded banks train; they are read only where left out.

    Raises:
        ValueError: an optimizer or a sharding type that cannot be had, or an unknown table.
    """
    assert config.optimizer != "auto", "the recipe chooses the optimizer"
    fused_params: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.0}
    if not frozen:
        fused_params = {
            "optimizer": FUSED_OPTIMIZERS[config.optimizer],
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
        }
    constraints = {
        table: ParameterConstraints(sharding_types=types)
        for table, types in sharding_types(module, config, environment, frozen).items()
    }
    banks = banks or BankTraining(frozen=True)
    constraints |= bank_constraints(module, environment.world_size)
    sharders = [
        cast(ModuleSharder[nn.Module], RowWiseOnCPU(fused_params=fused_params)),
        bank_sharder(banks, environment.device),
    ]
    planner = EmbeddingShardingPlanner(topology=_topology(environment), constraints=constraints, debug=False)
    process_group = dist.group.WORLD
    assert process_group is not None
    counted = None if frozen else COUNTED_AS[config.optimizer]
    with counted_optimizers(module, counted, banks.counted_as):
        try:
            plan = planner.collective_plan(module, sharders, process_group)
        except PlannerError as error:
            raise ValueError(
                f"TorchRec finds no way to place the embedding tables on {environment.world_size} ranks: "
                f"{' '.join(str(error).split())[:300]}; take more ranks, a smaller --embeddings.dim or smaller "
                "vocabularies"
            ) from error
    in_tables = {id(table) for table in tables_of(module)}
    dense_trains = any(p.requires_grad for p in module.parameters() if id(p) not in in_tables)
    # one rank has nobody to share gradients with, and would copy all of them; a model that is frozen is refused
    shares_gradients = dense_trains and environment.world_size > 1
    model = DistributedModelParallel(
        module, device=environment.device, plan=plan, sharders=sharders, init_data_parallel=shares_gradients
    )
    if not shares_gradients:  # DistributedDataParallel would have moved it
        model.to(environment.device)
    if environment.world_size == 1:
        _unwrap_lookups(model)
    return model


def rank_memory(environment: Environment) -> int:
    """Bytes of memory that a rank's device has; on CPU, its share of the machine's."""
    if environment.device.type == "cuda":
        return int(torch.cuda.get_device_properties(environment.device).total_memory)
    ranks = environment.local_world_size or environment.world_size
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


def _topology(environment: Environment) -> Topology:
    """The machines as they are: TorchRec's defaults know neither this card, nor how many ranks share this machine."""
    local = environment.local_world_size or environment.world_size
    memory = {"ddr_cap": rank_memory(replace(environment, device=torch.device("cpu")))}
    if environment.device.type == "cuda":
        memory["hbm_cap"] = rank_memory(environment)
    return Topology(environment.world_size, environment.device.type, local_world_size=local, **memory)


def tables_of(module: nn.Module) -> list[Any]:
    """The weights of all embedding tables."""
    return [table for child in module.modules() if is_lookup(child) for table in child.parameters()]


@contextmanager
def counted_optimizers(
    module: nn.Module, of_tables: type[torch.optim.Optimizer] | None, of_banks: type[torch.optim.Optimizer] | None
) -> Iterator[None]:
    """Lets the planner count optimizers' states, which it looks for on the tables; fused_params it does not see."""
    banks = bank_tables(module)
    own = set() if banks is None else {id(table) for table in banks.parameters()}
    counted = {table: of_banks if id(table) in own else of_tables for table in tables_of(module)}
    counted = {table: optimizer for table, optimizer in counted.items() if optimizer is not None}
    for table, optimizer in counted.items():
        table._optimizer_classes = [optimizer]
    try:
        yield
    finally:
        for table in counted:
            del table._optimizer_classes  # or sharding would take it for an optimizer of the table's own


def _unwrap_lookups(model: nn.Module) -> None:
    """Takes DistributedDataParallel, which TorchRec puts around lookups of data-parallel tables, off again."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for place, lookup in enumerate(module._lookups):
                if isinstance(lookup, DistributedDataParallel):
                    module._lookups[place] = lookup.module


def sharding_types(
    module: nn.Module, config: EmbeddingConfig, environment: Environment, frozen: bool
) -> dict[str, list[str]]:
    """Per table, the sharding types the planner may choose from."""
    tables = [
        table
        for child in module.modules()
        if isinstance(child, EmbeddingBagCollection)
        for table in child.embedding_bag_configs()
    ]
    features = {feature for table in tables for feature in table.feature_names}
    for name in config.table_sharding:
        if name not in features:
            raise ValueError(
                f"table_sharding names '{name}', which is no sparse feature; they are {', '.join(sorted(features))}"
            )
    automatic = [t.value for t in (ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE, ShardingType.ROW_WISE)]
    if environment.world_size == 1 and environment.device.type == "cpu":
        # there is nothing to cut, and where tables are only read nothing to send
        automatic = [ShardingType.DATA_PARALLEL.value if frozen else ShardingType.TABLE_WISE.value]
    types: dict[str, list[str]] = {}
    for table in tables:
        wanted: Sharding = config.table_sharding.get(table.feature_names[0], config.sharding)
        if config.optimizer == "adam" and environment.device.type == "cpu" and not frozen:
            if wanted not in ("auto", "data_parallel"):
                raise ValueError(
                    f"sharding '{wanted}' of table '{table.name}' needs a fused optimizer, and fbgemm has no fused "
                    "Adam on CPU; use data_parallel, or the optimizer rowwise_adagrad, adagrad or sgd"
                )
            wanted = "data_parallel"
        if wanted == "data_parallel" and config.optimizer != "adam" and not frozen:
            raise ValueError(
                f"sharding 'data_parallel' of table '{table.name}' trains with Adam only; choose the optimizer adam or "
                "another sharding"
            )
        # a fused optimizer never serves data-parallel tables
        types[table.name] = automatic if wanted == "auto" else [wanted]
    return types


@torch.no_grad()
def init_embeddings(model: DistributedModelParallel, seed: int) -> None:
    """Draws the initial values of all embedding tables, the same for every world size and sharding.

    Values are those each table's configuration asks for: uniform in +-1 / sqrt(num_embeddings) by TorchRec's default,
    or zero where its init_fn says so.

    Args:
        model (DistributedModelParallel): a sharded model.
        seed (int): values depend on it, the table's name and the row.
    """
    bounds: dict[str, float] = {}
    for module in model.modules():
        configs = getattr(module, "_embedding_bag_configs", None)
        for config in configs or []:
            zero = config.init_fn is nn.init.zeros_
            bounds[config.name] = 0.0 if zero else config.get_weight_init_max()
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if len(parts) < 2 or parts[-2] not in bounds or parts[-1] != "weight":
            continue
        table = parts[-2]
        if isinstance(value, ShardedTensor):
            width = value.size(1)
            for piece in value.local_shards():
                (row, column), (rows, columns) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
                _fill(piece.tensor, table, seed, bounds[table], row, rows, width, column, columns)
        else:
            _fill(value, table, seed, bounds[table], 0, value.shape[0], value.shape[1], 0, value.shape[1])


def _fill(
    target: Tensor, table: str, seed: int, bound: float, row: int, rows: int, width: int, column: int, columns: int
) -> None:
    for block in range(row // _INIT_BLOCK, (row + rows - 1) // _INIT_BLOCK + 1):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
        first, last = max(row, block * _INIT_BLOCK), min(row + rows, (block + 1) * _INIT_BLOCK)
        values = torch.rand(last - block * _INIT_BLOCK, width, generator=generator).mul_(2 * bound).sub_(bound)
        target[first - row : last - row].copy_(values[first - block * _INIT_BLOCK :, column : column + columns])
