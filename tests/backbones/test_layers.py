"""Hidden layers: the order of their parts, and the names that adapters look for."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.backbones.layers import HiddenLayer, HiddenLayers


def test_a_hidden_layer_normalises_what_dropout_leaves() -> None:
    torch.manual_seed(0)
    layer = HiddenLayer(3, 4, dropout=0.5, batch_norm=True)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    layer.norm.running_mean.normal_()
    x = torch.randn(64, 3)
    running_mean = layer.norm.running_mean.numpy().copy()

    torch.manual_seed(1)
    y = layer(x).detach().numpy()

    torch.manual_seed(1)
    kept = FastDropout(0.5)(torch.ones(64, 4)).numpy()
    h = kept * (x.numpy() @ layer.linear.weight.detach().numpy().T + layer.linear.bias.detach().numpy())
    normed = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
    expected = np.maximum(normed * layer.norm.weight.detach().numpy() + layer.norm.bias.detach().numpy(), 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(layer.norm.running_mean, 0.9 * running_mean + 0.1 * h.mean(0), atol=1e-6)


def test_a_hidden_layer_without_options_is_linear_and_relu() -> None:
    layer = HiddenLayer(3, 4)
    x = torch.randn(5, 3)
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias"}
    assert torch.equal(layer(x), torch.relu(nn.functional.linear(x, layer.linear.weight, layer.linear.bias)))
    assert isinstance(layer.dropout, nn.Identity) and isinstance(layer.norm, nn.Identity)


def test_evaluation_drops_nothing_and_uses_running_statistics() -> None:
    layer = HiddenLayer(3, 4, dropout=0.5, batch_norm=True).eval()
    x = torch.randn(8, 3)
    assert torch.allclose(layer(x)[2:3], layer(x[2:3]), atol=1e-6)


def test_other_activations_are_taken_by_name() -> None:
    x = torch.randn(5, 3)
    layer = HiddenLayer(3, 4, activation="sigmoid")
    assert torch.equal(layer(x), torch.sigmoid(layer.linear(x)))
    layer = HiddenLayer(3, 4, activation="identity")
    assert torch.equal(layer(x), layer.linear(x))


def test_hidden_layers_are_chained_in_order() -> None:
    layers = HiddenLayers(7, (5, 3, 2), dropout=0.25, batch_norm=True)
    assert [(layer.linear.in_features, layer.linear.out_features) for layer in layers] == [(7, 5), (5, 3), (3, 2)]
    assert all(layer.dropout.p == 0.25 and isinstance(layer.norm, nn.BatchNorm1d) for layer in layers)
    layers.eval()
    x = torch.randn(4, 7)
    assert torch.equal(layers(x), layers[2](layers[1](layers[0](x))))
