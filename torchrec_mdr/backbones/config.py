"""The options that backbones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from torchrec_mdr.backbones.layers import OverArch
from torchrec_mdr.data.schema import Schema

WIDEST = 2**20  # layer; wider ones are mistyped


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """Options of a backbone without its data: what differs by data set comes in at build time.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.

    Raises:
        ValueError: no hidden layer, or a width below 1.
    """

    hidden: tuple[int, ...] = (256, 128)

    def __post_init__(self) -> None:
        check_layer_sizes("hidden", self.hidden)

    @abstractmethod
    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """Builds the model.

        Args:
            schema (Schema): the features of the data.
            embedding_dim (int): width of every embedding, a multiple of 4.

        Returns:
            nn.Module: `forward(dense_features [B, num_dense], sparse_features KeyedJaggedTensor) -> logits [B, 1]`.
            Embedding tables lie on the meta device, to be sharded or materialised by the caller; the rest on the CPU.
        """


@dataclass(frozen=True)
class HiddenConfig(BackboneConfig):
    """Options of a backbone whose MLP part is made of this package's `HiddenLayers`.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.
        dropout (float): share of a hidden layer's linear output that is dropped in training, in [0, 1).
        batch_norm (bool): whether each hidden layer normalises before its activation.

    Raises:
        ValueError: no hidden layer, a width below 1, or a dropout outside [0, 1).
    """

    dropout: float = 0.0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def over_arch(self, in_features: int) -> OverArch:
        """The MLP part, for an input of this width."""
        return OverArch(in_features, self.hidden, self.dropout, self.batch_norm)


def flat_width(schema: Schema, embedding_dim: int) -> int:
    """Width of the flat embeddings with the dense features beside them."""
    return len(schema.sparse_features) * embedding_dim + len(schema.dense_features)


def check_layer_sizes(option: str, sizes: tuple[int, ...]) -> None:
    """Raises ValueError where an option holds no layer width, or one below 1 or above WIDEST."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{option} must name at least one layer, each at least 1 wide, not {list(sizes)}")
    if max(sizes) > WIDEST:
        raise ValueError(f"{option} has a layer {max(sizes)} wide; the widest that can be had is {WIDEST}")


def check_positive(option: str, value: int) -> None:
    """Raises ValueError where an option that counts something is below 1."""
    if value < 1:
        raise ValueError(f"{option} must be at least 1, not {value}")
