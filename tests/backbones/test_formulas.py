"""Every backbone against its paper's formula, row by row in numpy with explicit loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from tests.backbones.conftest import CASES
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.registry import BACKBONES

Weights = dict[str, np.ndarray]
D = 8
HIDDEN = (6, 5)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.0)


def over(w: Weights, x: np.ndarray) -> float:
    for i in range(len(HIDDEN)):
        x = relu(w[f"over_arch.hidden.{i}.linear.weight"] @ x + w[f"over_arch.hidden.{i}.linear.bias"])
    return float(w["over_arch.output.weight"][0] @ x + w["over_arch.output.bias"][0])


def torchrec_over(w: Weights, x: np.ndarray) -> float:
    for i in range(len(HIDDEN)):
        layer = f"over_arch.model.0._mlp.{i}._linear"
        x = relu(w[f"{layer}.weight"] @ x + w[f"{layer}.bias"])
    return float(w["over_arch.model.1.weight"][0] @ x + w["over_arch.model.1.bias"][0])


def torchrec_dense(w: Weights, x: np.ndarray) -> np.ndarray:
    for i in range(2):
        layer = f"dense_arch.model._mlp.{i}._linear"
        x = relu(w[f"{layer}.weight"] @ x + w[f"{layer}.bias"])
    return x


def linear(w: Weights, ids: np.ndarray, dense: np.ndarray) -> float:
    total = sum(
        w[f"linear_arch.sparse_arch.embedding_bag_collection.embedding_bags.linear_f{f}.weight"][i, 0]
        for f, i in enumerate(ids)
    )
    return float(total + sum(w["linear_arch.dense_arch.weight"][0] * dense))


def mlp(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    return over(w, np.concatenate([*e, dense]))


def dlrm(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    z = torchrec_dense(w, dense)
    return torchrec_over(w, np.concatenate([z, [a @ b for a, b in combinations([z, *e], 2)]]))


def dlrm_dcn(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    x0 = np.concatenate([torchrec_dense(w, dense), *e])
    x = x0
    for i in range(2):
        matrix = w[f"inter_arch.crossnet.W_kernels.{i}"] @ w[f"inter_arch.crossnet.V_kernels.{i}"]
        x = x0 * (matrix @ x + w[f"inter_arch.crossnet.bias.{i}"]) + x
    return torchrec_over(w, x)


def wdl(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    return linear(w, ids, dense) + mlp(w, e, ids, dense)


def deepfm(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    machine = sum(a @ b for a, b in combinations(e, 2))
    return linear(w, ids, dense) + machine + mlp(w, e, ids, dense)


def nfm(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    pooled = sum(a * b for a, b in combinations(e, 2))
    return linear(w, ids, dense) + over(w, np.concatenate([pooled, dense]))


def autoint(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    features = e
    for layer in range(3):
        query, key, value, residual = (
            w[f"inter_arch.layers.{layer}.{name}.weight"] for name in ("query", "key", "value", "residual")
        )
        produced = []
        for m in range(len(features)):
            heads = []
            for h in range(4):
                rows = slice(8 * h, 8 * h + 8)
                scores = np.exp([(query[rows] @ features[m]) @ (key[rows] @ other) for other in features])
                attention = scores / scores.sum()
                heads.append(sum(a * (value[rows] @ other) for a, other in zip(attention, features, strict=True)))
            produced.append(relu(np.concatenate(heads) + residual @ features[m]))
        features = produced
    return float(w["inter_arch.output.weight"][0] @ np.concatenate(features)) + mlp(w, e, ids, dense)


def pnn(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    return over(w, np.concatenate([*e, [a @ b for a, b in combinations(e, 2)], dense]))


def dcn(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    x0 = np.concatenate([*e, dense])
    x = x0
    for i in range(2):
        x = np.outer(x0, x) @ w[f"inter_arch.crossnet.kernels.{i}"][:, 0] + w[f"inter_arch.crossnet.bias.{i}"][:, 0] + x
    return float(w["inter_arch.output.weight"][0] @ x) + mlp(w, e, ids, dense)


def fibinet(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    squeezed = np.array([embedding.sum() / D for embedding in e])
    inner = relu(w["inter_arch.senet.reduce.weight"] @ squeezed)
    weights = relu(w["inter_arch.senet.excite.weight"] @ inner)
    products = []
    for name, vectors in (("plain", e), ("reweighted", [a * v for a, v in zip(weights, e, strict=True)])):
        for p, (first, second) in enumerate(combinations(vectors, 2)):
            products.append((first @ w[f"inter_arch.{name}.weight"][p]) * second)
    return linear(w, ids, dense) + over(w, np.concatenate([*products, dense]))


def xdeepfm(w: Weights, e: list[np.ndarray], ids: np.ndarray, dense: np.ndarray) -> float:
    maps, pooled = e, []
    for k, size in enumerate((128, 128)):
        weight = w[f"inter_arch.layers.{k}.weight"].reshape(size, len(maps), len(e))
        produced = []
        for h in range(size):
            total = np.zeros(D)
            for i, a in enumerate(maps):
                for j, b in enumerate(e):
                    total += weight[h, i, j] * a * b
            produced.append(total)
        split = size // 2 if k == 0 else 0
        maps = produced[:split]
        pooled += [vector.sum() for vector in produced[split:]]
    return linear(w, ids, dense) + float(w["inter_arch.output.weight"][0] @ pooled) + mlp(w, e, ids, dense)


FORMULAS: dict[str, Callable[[Weights, list[np.ndarray], np.ndarray, np.ndarray], float]] = {
    "mlp": mlp,
    "dlrm": dlrm,
    "dlrm_dcn": dlrm_dcn,
    "wdl": wdl,
    "deepfm": deepfm,
    "nfm": nfm,
    "autoint": autoint,
    "pnn": pnn,
    "dcn": dcn,
    "fibinet": fibinet,
    "xdeepfm": xdeepfm,
}


@pytest.mark.parametrize(("name", "num_dense"), CASES)
def test_logits_follow_the_papers_formula(name: str, num_dense: int, make_schema, make_rows) -> None:
    torch.manual_seed(3)
    schema = make_schema(num_dense)
    model = materialize_tables(BACKBONES[name](hidden=HIDDEN).build(schema, D)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # so that nothing is zero, as biases and first-order weights are at first
    dense, ids, sparse_features = make_rows(schema, 6)

    logits = model(dense, sparse_features)

    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    bags = "sparse_arch.embedding_bag_collection.embedding_bags"
    expected = [
        FORMULAS[name](weights, [weights[f"{bags}.t_f{f}.weight"][i] for f, i in enumerate(row)], row, extra)
        for row, extra in zip(ids.numpy(), dense.double().numpy(), strict=True)
    ]
    assert logits.shape == (6, 1)
    np.testing.assert_allclose(logits.detach().numpy()[:, 0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected) > 0.1
