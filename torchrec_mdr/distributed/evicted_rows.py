"""What becomes of the adapters of domains that other ids have got."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.bank_rows import RowLayout, reset_rows
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import DomainModule
from torchrec_mdr.adapters.gate import GateModule
from torchrec_mdr.model import MultiDomainModel


@torch.no_grad()
def reset_domains(
    model: nn.Module,
    domains: Tensor,
    optimizers: Sequence[torch.optim.Optimizer | KeyedOptimizer] = (),
    seed: int = 0,
) -> None:
    """Gives domains of the natural division new adapters, which add exactly zero, whatever was there; in place.

    All ranks call it, with the same domains and seed. Of replicated banks all draw the same; of sharded ones each
    resets the rows it has.

    Args:
        model (nn.Module): a MultiDomainModel, or what is around it.
        domains (Tensor): int64 [E], distinct.
        optimizers (Sequence[torch.optim.Optimizer]): what trains the adapters, fused or not; the
            state of these rows becomes zero.
        seed (int): of what is drawn anew; another one each time.

    Raises:
        ValueError: the model has parts for domains that do not begin at zero, such as norms, or gates of domains.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec_mdr.data.schema import Division
        >>> from torchrec_mdr.methods import MLoRA
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=8), divisions=[Division("shop", 12)])
        >>> bank = next(module for module in model.modules() if isinstance(module, Bank))
        >>> _ = nn.init.ones_(bank.lora_B)
        >>> reset_domains(model, torch.tensor([3, 7]))
        >>> bank.lora_B.flatten(1).any(1).tolist().count(False)
        2
    """
    inner = next(module for module in get_unwrapped_module(model).modules() if isinstance(module, MultiDomainModel))
    banks = _banks(inner)
    num_domains = inner.divisions[0].num_domains
    tables = inner.bank_tables
    layouts = {} if tables is None else tables.layouts
    local = {} if tables is None else tables.local_rows(Route.FUSED, 0)
    pieces_of = {name.split(".")[-2]: pieces for name, pieces in local.items()}
    for name, bank in banks.items():
        layout = RowLayout.of(bank) if bank.table is None else layouts[bank.table]
        experts = torch.arange(0, bank.num_adapters, num_domains).unsqueeze(1)
        rows = (domains.cpu() + experts).flatten()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            drawn = reset_rows(bank, layout, torch.empty(len(rows), layout.width))
        if bank.table is not None:
            for first, piece in pieces_of[bank.table]:
                _put(piece, first, rows, drawn)
            for first, piece in _fused_state(bank.table, optimizers):
                _put(piece, first, rows, None)
            continue
        for role, part in layout.cut(drawn).items():
            parameter = bank.get_parameter(role)
            _put(parameter, 0, rows, part)
            for value in (v for own in optimizers for v in own.state.get(parameter, {}).values()):
                if isinstance(value, Tensor) and value.shape[:1] == parameter.shape[:1]:
                    _put(value, 0, rows, None)


def _banks(model: MultiDomainModel) -> dict[str, Bank]:
    """The banks of the natural division, by name; raises ValueError where a domain has anything else."""
    banks = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, Bank) and module.fits_table:
            banks[name] = module
        elif isinstance(module, DomainModule):
            what = "a gate that knows its domain" if isinstance(module, GateModule) else f"a {type(module).__name__}"
            raise ValueError(
                f"'{name}' has {what}, which cannot begin anew while others go on; domains of ids that come and go "
                "want low-rank adapters alone: take MLoRA, and a backbone without batch norm"
            )
    return {name: bank for name, bank in banks.items() if bank.division == 0}


def _fused_state(
    table: str, optimizers: Sequence[torch.optim.Optimizer | KeyedOptimizer]
) -> Iterator[tuple[int, Tensor]]:
    """This rank's rows of what fused optimizers keep of a table, and the first one's number."""
    for optimizer in optimizers:
        if not isinstance(optimizer, KeyedOptimizer):
            continue
        for name, roles in optimizer.state_dict()["state"].items():
            for value in roles.values() if name.split(".")[-2:-1] == [table] else ():
                if isinstance(value, ShardedTensor):
                    yield from ((one.metadata.shard_offsets[0], one.tensor) for one in value.local_shards())
                elif isinstance(value, Tensor) and value.dim():
                    yield 0, value


def _put(target: Tensor, first: int, rows: Tensor, values: Tensor | None) -> None:
    """Puts values [R, ...], or zeros, into rows of a tensor whose first one has a number."""
    here = (rows >= first) & (rows < first + len(target))
    places = (rows[here] - first).to(target.device)
    target.data[places] = 0.0 if values is None else values[here].to(target)
