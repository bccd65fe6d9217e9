"""What this package's own backbones share."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.backbones.layers import OverArch


class Backbone(nn.Module):
    """Embeddings, an MLP whose hidden layers adapters may wrap, and what else a model is made of.

    A model says in `forward` how its parts go together, and declares the types of those beside the MLP.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): F tables of one width D.
        **archs (nn.Module): the other parts, by their names in the model and its state dict; among them `over_arch`.
    """

    adapter_targets: ClassVar[tuple[str, ...]] = ("over_arch.hidden.*.linear",)
    over_arch: OverArch

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection, **archs: nn.Module) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        for name, arch in archs.items():
            self.add_module(name, arch)
