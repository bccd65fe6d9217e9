"""How sharded banks are spread over ranks, trained and given their initial values."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_mdr.adapters.bank_rows import reset_rows
from torchrec_mdr.adapters.bank_tables import BankTables
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.model import MultiDomainModel

BankOptimizer = Literal["auto", "rowwise_adagrad", "adagrad", "adam", "sgd"]
BankType = Literal["fp32", "fp16"]
DATA_TYPES: dict[str, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16}
FUSED_OPTIMIZERS: dict[str, EmbOptimType] = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "sgd": EmbOptimType.EXACT_SGD,
}
COUNTED_AS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
_INIT_BLOCK = 1 << 12  # rows drawn at once; part of the definition of the initial values


@dataclass(frozen=True)
class BankTraining:
    """How the tables of sharded banks train.

    Args:
        optimizer (str): fused into the backward pass; `auto` is row-wise Adagrad, with one number of state a row.
            Adam exists on GPUs alone, and counts its steps over all domains together.
        learning_rate (float): of that.
        weight_decay (float): L2 added to the gradients of rows that are looked up.
        frozen (bool): the tables are read only: no optimizer state is made for them.

    Raises:
        ValueError: an unknown optimizer.

    Example::

        >>> BankTraining(learning_rate=0.01).optimizer
        'auto'
    """

    optimizer: BankOptimizer = "auto"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in ("auto", *FUSED_OPTIMIZERS):
            raise ValueError(
                f"--bank_optimizer '{self.optimizer}' is unknown; choose one of auto, {', '.join(FUSED_OPTIMIZERS)}"
            )

    @property
    def chosen(self) -> str:
        """The optimizer that `auto` stands for."""
        return "rowwise_adagrad" if self.optimizer == "auto" else self.optimizer

    def fused_params(self, device: torch.device) -> dict[str, Any]:
        """What TorchRec's fused kernel is told.

        Raises:
            ValueError: Adam on CPU.
        """
        if self.frozen:
            return {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.0, "output_dtype": SparseType.FP32}
        if self.chosen == "adam" and device.type == "cpu":
            raise ValueError(
                "--bank_optimizer adam needs a GPU, since fbgemm has no fused Adam on CPU; choose rowwise_adagrad, "
                "adagrad or sgd"
            )
        return {
            "optimizer": FUSED_OPTIMIZERS[self.chosen],
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "output_dtype": SparseType.FP32,
        }

    @property
    def counted_as(self) -> type[torch.optim.Optimizer] | None:
        """The optimizer whose state the planner counts."""
        return None if self.frozen else COUNTED_AS[self.chosen]


class BankSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of EmbeddingCollections, for sharded banks: rows by ranks, or whole tables, never replicated.

    In a training loop of one's own it goes into DistributedModelParallel's `sharders`, and into the planner's, beside
    TorchRec's own. TorchRec runs row-wise sharding on CPU, too.

    Args:
        training (BankTraining): how the tables train.
        device (torch.device): where; the CPU where left out.

    Example::

        >>> BankSharder(BankTraining("sgd", 0.1)).sharding_types("cpu")
        ['row_wise', 'table_wise']
    """

    def __init__(self, training: BankTraining | None = None, device: torch.device | None = None) -> None:
        training = training or BankTraining()
        super().__init__(training.fused_params(device or torch.device("cpu")))

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types the planner may choose from; the columns of a row belong together."""
        return [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Kernels the planner may choose from: those that train and stay in a rank's own memory."""
        return ["fused"]


def bank_sharder(training: BankTraining, device: torch.device) -> ModuleSharder[nn.Module]:
    """A :class:`BankSharder`, as lists of sharders want it."""
    return cast(ModuleSharder[nn.Module], BankSharder(training, device))


def bank_constraints(model: nn.Module, world_size: int) -> dict[str, ParameterConstraints]:
    """What the planner may do with each table of sharded banks: rows by ranks, where there are several.

    Args:
        model (nn.Module): a MultiDomainModel, or what is around it; not sharded yet.
        world_size (int): number of ranks.
    """
    kind = ShardingType.ROW_WISE if world_size > 1 else ShardingType.TABLE_WISE
    tables = bank_tables(model)
    names = [] if tables is None else list(tables.layouts)
    return {name: ParameterConstraints(sharding_types=[kind.value]) for name in names}


def bank_tables(model: nn.Module) -> BankTables | None:
    """The tables of a model's sharded banks; None where banks are replicated."""
    inner = next((module for module in model.modules() if isinstance(module, MultiDomainModel)), None)
    return None if inner is None else inner.bank_tables


@torch.no_grad()
def init_banks(model: nn.Module, seed: int) -> None:
    """Draws the initial values of sharded banks' tables, the same for every world size and sharding.

    Values have the distribution that replicated banks have: a new adapter adds exactly zero.

    Args:
        model (nn.Module): a sharded model.
        seed (int): values depend on it, the table's name and the row.
    """
    tables = bank_tables(model)
    if tables is None:
        return
    banks = {bank.table: (bank, layout) for _, _, bank, layout in tables.rows_of_pass.places}
    for full_name, pieces in tables.local_rows(Route.FUSED, 0).items():
        table = full_name.split(".")[-2]
        for first, rows in pieces:
            last = first + len(rows)
            for block in range(first // _INIT_BLOCK, -(-last // _INIT_BLOCK)):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
                    drawn = reset_rows(*banks[table], torch.empty(_INIT_BLOCK, rows.shape[1]))
                begin, end = max(first, block * _INIT_BLOCK), min(last, (block + 1) * _INIT_BLOCK)
                rows[begin - first : end - first].copy_(drawn[begin - block * _INIT_BLOCK : end - block * _INIT_BLOCK])
