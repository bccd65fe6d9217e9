"""The parts that backbones are put together from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.adapters.norm import GlobalBatchNorm1d

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity}


class HiddenLayer(nn.Module):
    """One hidden layer: linear, dropout, normalisation, activation, in this order.

    Dropout acts on the linear's output, where MLoRA has it, so that an adapter's share is never dropped.

    Args:
        in_features (int): width of the input.
        out_features (int): width of the output.
        dropout (float): share of the linear's output that is dropped in training; 0 for no dropout.
        batch_norm (bool): whether to normalise, by the statistics of the batch over all ranks.
        activation (str): a key of `ACTIVATIONS`.

    Example::

        >>> HiddenLayer(8, 4, dropout=0.5, batch_norm=True)(torch.rand(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.dropout: nn.Module = FastDropout(dropout) if dropout > 0 else nn.Identity()
        self.norm: nn.Module = GlobalBatchNorm1d(out_features) if batch_norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        hidden = self.dropout(self.linear(features))
        if isinstance(self.norm, GlobalBatchNorm1d) and isinstance(self.activation, nn.ReLU):
            return self.norm(hidden, relu=True)  # in the norm's own pass over the rows
        return self.activation(self.norm(hidden))


class HiddenLayers(nn.Sequential):
    """Hidden layers, one after the other.

    Args:
        in_features (int): width of the input.
        layer_sizes (Sequence[int]): widths of the layers.
        dropout (float): see `HiddenLayer`.
        batch_norm (bool): see `HiddenLayer`.
        activation (str): see `HiddenLayer`.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: str = "relu",
    ) -> None:
        widths = [in_features, *layer_sizes]
        super().__init__(
            *(
                HiddenLayer(width, size, dropout, batch_norm, activation)
                for width, size in zip(widths[:-1], widths[1:], strict=True)
            )
        )


class OverArch(nn.Module):
    """The MLP part: hidden layers, then the layer that scores.

    Args:
        in_features (int): width of the input.
        layer_sizes (Sequence[int]): widths of the hidden layers, at least one.
        dropout (float): see `HiddenLayer`.
        batch_norm (bool): see `HiddenLayer`.

    Example::

        >>> OverArch(20, [8, 4])(torch.rand(3, 20)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self, in_features: int, layer_sizes: Sequence[int], dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.hidden = HiddenLayers(in_features, layer_sizes, dropout, batch_norm)
        self.output = nn.Linear(layer_sizes[-1], 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        return self.output(self.hidden(features))


def flatten(embeddings: Tensor, dense_features: Tensor) -> Tensor:
    """Embeddings [B, F, D], or any [B, ...], and dense features [B, num_dense] -> [B, F * D + num_dense]."""
    return torch.cat((embeddings.flatten(1), dense_features), dim=1)


def bi_interaction(embeddings: Tensor) -> Tensor:
    """The sum of the elementwise products of all pairs of embeddings, in linear time (He and Chua 2017, eq. 4).

    Args:
        embeddings (Tensor): [B, F, D].

    Returns:
        Tensor: [B, D]; its sum over D is the second-order term of a factorisation machine.
    """
    return 0.5 * (embeddings.sum(dim=1).square() - embeddings.square().sum(dim=1))


def pairs(num_features: int) -> tuple[Tensor, Tensor]:
    """The pairs i < j of features, as two int64 vectors of length F * (F - 1) / 2, on the CPU."""
    first, second = torch.triu_indices(num_features, num_features, offset=1, device="cpu")
    return first, second
