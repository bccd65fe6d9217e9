"""Embedding tables and first-order weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones import build_tables, materialize_tables
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.data.schema import SparseFeature


def test_one_table_a_feature_in_the_schemas_order(make_schema) -> None:
    tables = build_tables(make_schema(0, (5, 7)), 12).embedding_bag_configs()
    assert [(t.name, t.feature_names, t.num_embeddings, t.embedding_dim) for t in tables] == [
        ("t_f0", ["f0"], 5, 12),
        ("t_f1", ["f1"], 7, 12),
    ]


def test_several_ids_a_row_are_averaged_where_the_schema_says_so(make_schema) -> None:
    schema = replace(
        make_schema(0), sparse_features=(SparseFeature("one", 6), SparseFeature("many", 6, multi_hot=True))
    )
    tables = materialize_tables(build_tables(schema, 4))
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["one", "many"], values=torch.tensor([3, 1, 5, 2, 4]), lengths=torch.tensor([1, 1, 3, 0])
    )
    pooled = tables(features).to_dict()
    one, many = (tables.embedding_bags[f"t_{name}"].weight for name in ("one", "many"))
    assert torch.equal(pooled["one"], one[[3, 1]])
    assert torch.allclose(pooled["many"], torch.stack([many[[5, 2, 4]].mean(0), torch.zeros(4)]))


@pytest.mark.parametrize("width", [0, -4, 6])
def test_widths_that_fbgemm_refuses_are_refused(width: int, make_schema) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim must be a positive multiple of 4, not {width}"):
        build_tables(make_schema(), width)


def test_a_data_set_without_sparse_features_is_refused(make_schema) -> None:
    with pytest.raises(ValueError, match="data set 'random' has no sparse feature"):
        build_tables(make_schema(2, ()), 8)


def test_materializing_draws_every_table_once(make_schema) -> None:
    tables = materialize_tables(build_tables(make_schema(), 8))
    before = {name: tensor.clone() for name, tensor in tables.state_dict().items()}
    for config in tables.embedding_bag_configs():
        weight, bound = tables.embedding_bags[config.name].weight, config.num_embeddings**-0.5
        assert 0.5 * bound < weight.abs().max() <= bound
    materialize_tables(tables)  # what is allocated stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in tables.state_dict().items())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.5, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
def test_first_order_weights_train_like_a_linear_model_of_one_hot_features(
    optimizer, options, make_schema, make_rows
) -> None:
    torch.manual_seed(0)
    schema = make_schema(2, (5, 7))
    arch = materialize_tables(LinearArch.from_schema(schema))
    reference = nn.Linear(5 + 7 + 2, 1, bias=False)
    nn.init.zeros_(reference.weight)
    optimizers = [optimizer(model.parameters(), **options) for model in (arch, reference)]
    for _ in range(5):
        dense, ids, sparse_features = make_rows(schema, 16)
        labels = torch.rand(16).round()
        one_hot = [nn.functional.one_hot(ids[:, f], size) for f, size in enumerate((5, 7))]
        inputs = torch.cat([*one_hot, dense], dim=1)
        logits = [arch(dense, sparse_features), reference(inputs)]
        assert torch.allclose(*logits, atol=1e-5)
        for logit, step in zip(logits, optimizers, strict=True):
            step.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logit[:, 0], labels).backward()
            step.step()
    bags = arch.sparse_arch.embedding_bag_collection.embedding_bags
    weights = torch.cat([bags["linear_f0"].weight, bags["linear_f1"].weight])
    np.testing.assert_allclose(weights[:, 0].detach(), reference.weight[0, :12].detach(), atol=1e-5)
    assert not weights[:, 1:].any()
    assert weights[:, 0].abs().max() > 0.05
