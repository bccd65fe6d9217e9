"""Models with random weights, and rows for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers import DIM, NUM_EMBEDDINGS, randomise
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES

SCENARIO, GENDER = Division("scenario", names=["home", "cart", "search"]), Division("gender", names=["f", "m"])
SCHEMA = Schema(
    "random",
    "label",
    (SparseFeature("a", NUM_EMBEDDINGS), SparseFeature("b", NUM_EMBEDDINGS, multi_hot=True), SparseFeature("c", 7)),
    ("x", "y"),
    (SCENARIO, GENDER),
    {},
)
METHODS: dict[str, Method] = {
    "mlora": MLoRA(rank=2),
    "multilora": MultiLoRA(rank=2),
    "multilora_avg": MultiLoRA(rank=2, fusion="avg"),
    "multilora_add": MultiLoRA(rank=2, fusion="add"),
    "single_lora": SingleLoRA(rank=2),
    "moe_mlora": MoEMLoRA(rank=2, experts_per_domain=2),
    "moe_mlora_layers": MoEMLoRA(rank=2, per_layer=True),
    "moe_mlora_top_k": MoEMLoRA(rank=2, experts_per_domain=2, top_k=3),
    "moe_mlora_input": MoEMLoRA(rank=2, gate_input="domain_and_input"),
    "moe_mlora_own": MoEMLoRA(rank=2, experts_per_domain=2, gate_input="domain_and_input", gate_start="own"),
    "moe_mlora_own_top_k": MoEMLoRA(rank=2, top_k=2, gate_start="own"),
}


def trained(method: str | Method, backbone: str, seed: int = 0) -> MultiDomainModel:
    """A model in evaluation mode with random weights and statistics; mlp with norms."""
    chosen = METHODS[method] if isinstance(method, str) else method
    options = {"batch_norm": True} if backbone == "mlp" else {}
    torch.manual_seed(0)
    plain = BACKBONES[backbone](hidden=(10, 5), **options).build(SCHEMA, DIM)
    divisions = SCHEMA.divisions[: 2 if isinstance(chosen, MultiLoRA) else 1]
    model = MultiDomainModel(materialize_tables(plain), chosen, divisions).eval()
    randomise_model(model, seed)
    if isinstance(chosen, MoEMLoRA):
        model.start_stage(Route.FUSED, 0)  # whose gate falls back on the own experts, if it can
    return model


def randomise_model(model: MultiDomainModel, seed: int = 0) -> None:
    """Gives a model random weights and statistics."""
    randomise({**dict(model.named_parameters()), **dict(model.named_buffers())}, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crossnet" in name:  # whose layers multiply: logits of order 1, as trained ones have
                parameter.mul_(0.3)


def rows_for(model: MultiDomainModel, num_rows: int, seed: int = 0) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """Dense features, ids (feature b has none to three a row) and domains of rows in no order."""
    generator = torch.Generator().manual_seed(1000 * seed + num_rows)
    columns = [torch.randint(d.num_domains, (num_rows,), generator=generator) for d in model.divisions]
    lengths = torch.ones(3, num_rows, dtype=torch.int64)
    lengths[1] = torch.randint(4, (num_rows,), generator=generator)
    counts = lengths.sum(1).tolist()
    sizes = (NUM_EMBEDDINGS, NUM_EMBEDDINGS, 7)
    values = torch.cat([torch.randint(size, (n,), generator=generator) for size, n in zip(sizes, counts, strict=True)])
    features = KeyedJaggedTensor(["a", "b", "c"], values, lengths=lengths.flatten(), stride=num_rows)
    return torch.rand(num_rows, 2, generator=generator), features, torch.stack(columns, 1)
