"""What every backbone promises, and what TorchRec's own must keep."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.backbones.conftest import CASES, NUM_EMBEDDINGS
from torchrec_mdr.backbones import adapter_targets, materialize_tables
from torchrec_mdr.backbones.autoint import AutoIntConfig
from torchrec_mdr.backbones.dcn import DCNConfig
from torchrec_mdr.backbones.dlrm import DLRMConfig
from torchrec_mdr.backbones.dlrm_dcn import DLRMDCNConfig
from torchrec_mdr.backbones.fibinet import FiBiNETConfig
from torchrec_mdr.backbones.mlp import MLPConfig
from torchrec_mdr.backbones.xdeepfm import XDeepFMConfig
from torchrec_mdr.registry import BACKBONES

HIDDEN = (12, 6)


def test_the_names_are_those_of_the_command_line() -> None:
    assert set(BACKBONES) == {
        "mlp", "dlrm", "dlrm_dcn", "wdl", "deepfm", "nfm", "autoint", "pnn", "dcn", "fibinet", "xdeepfm"
    }  # fmt: skip


@pytest.mark.parametrize(("name", "num_dense"), CASES)
def test_gradients_reach_every_parameter(name: str, num_dense: int, make_schema, make_rows) -> None:
    torch.manual_seed(0)
    schema = make_schema(num_dense)
    model = materialize_tables(BACKBONES[name](hidden=HIDDEN).build(schema, 8))
    dense, _, sparse_features = make_rows(schema, 256)

    logits = model(dense, sparse_features)
    nn.functional.binary_cross_entropy_with_logits(logits[:, 0], torch.rand(256).round()).backward()

    assert logits.shape == (256, 1)
    for parameter_name, parameter in model.named_parameters():
        # without dense features DLRM's dense arch is a constant that its last bias alone makes up, since PyTorch starts
        # the bias of an empty linear at zero
        in_dense_arch = parameter_name.startswith("dense_arch.") and not parameter_name.endswith("_mlp.1._linear.bias")
        if parameter.numel() and (num_dense or not in_dense_arch):
            assert parameter.grad is not None and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", BACKBONES)
def test_only_the_tables_lie_on_the_meta_device(name: str, make_schema) -> None:
    model = BACKBONES[name]().build(make_schema(), 8)
    for parameter_name, tensor in model.state_dict().items():
        assert tensor.is_meta == ("embedding_bags" in parameter_name), parameter_name


@pytest.mark.parametrize("name", BACKBONES)
def test_adapter_targets_are_the_hidden_layers_and_never_what_scores(name: str, make_schema) -> None:
    model = BACKBONES[name](hidden=HIDDEN).build(make_schema(), 8)
    modules = dict(model.named_modules())
    matched = {
        pattern: [modules[found] for found in modules if fnmatchcase(found, pattern)]
        for pattern in adapter_targets(model)
    }
    assert all(matched.values())
    layers = [layer for found in matched.values() for layer in found]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [linear.out_features for linear in linears] == list(HIDDEN)
    assert linears[1].in_features == HIDDEN[0]
    others = [layer for layer in layers if layer not in linears]
    assert [type(layer) for layer in others] == ([LowRankCrossNet] if name == "dlrm_dcn" else [])


def test_a_model_of_the_users_says_its_targets_itself_or_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="Sequential does not say .* option target_modules"):
        adapter_targets(model)
    model.adapter_targets = ("0",)
    assert adapter_targets(model) == ("0",)


def test_mlp_has_the_parameters_of_multiloras_table_7(make_schema) -> None:
    model = MLPConfig(hidden=(256, 128), batch_norm=True).build(make_schema(1, (10,) * 7), 16)
    assert model.over_arch.hidden[0].linear.in_features == 113
    assert sum(parameter.numel() for parameter in model.over_arch.parameters()) == 62_977


@pytest.mark.parametrize("num_dense", [2, 0])
@pytest.mark.parametrize("name", ["dlrm", "dlrm_dcn"])
def test_torchrecs_own_equal_themselves_built_by_hand(name: str, num_dense: int, make_schema, make_rows) -> None:
    schema = make_schema(num_dense)
    config = {
        "dlrm": DLRMConfig(hidden=HIDDEN, dense_hidden=(10,)),
        "dlrm_dcn": DLRMDCNConfig(hidden=HIDDEN, dense_hidden=(10,), dcn_num_layers=3, dcn_low_rank_dim=2),
    }[name]
    torch.manual_seed(1)
    built = config.build(schema, 8)
    torch.manual_seed(1)
    tables = [
        EmbeddingBagConfig(name=f"t_f{i}", embedding_dim=8, num_embeddings=size, feature_names=[f"f{i}"])
        for i, size in enumerate(NUM_EMBEDDINGS)
    ]
    common = {
        "embedding_bag_collection": EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        "dense_in_features": num_dense,
        "dense_arch_layer_sizes": [10, 8],
        "over_arch_layer_sizes": [12, 6, 1],
    }
    by_hand = DLRM(**common) if name == "dlrm" else DLRM_DCN(**common, dcn_num_layers=3, dcn_low_rank_dim=2)
    torch.manual_seed(2)
    materialize_tables(built)
    torch.manual_seed(2)
    materialize_tables(by_hand)

    assert type(built) is type(by_hand)
    ours, theirs = built.state_dict(), by_hand.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    dense, _, sparse_features = make_rows(schema, 5)
    assert torch.equal(built(dense, sparse_features), by_hand(dense, sparse_features))


def test_dlrm_without_dense_features_builds_without_a_warning(make_schema, recwarn) -> None:
    DLRMConfig().build(make_schema(0), 8)
    assert not [warning for warning in recwarn if "zero-element" in str(warning.message)]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MLPConfig, {"hidden": ()}, "hidden must name at least one layer"),
        (DLRMConfig, {"hidden": ()}, "hidden must name at least one layer"),
        (MLPConfig, {"hidden": (8, 0)}, r"hidden .* not \[8, 0\]"),
        (MLPConfig, {"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        (MLPConfig, {"dropout": -0.1}, "dropout"),
        (DLRMConfig, {"dense_hidden": (0,)}, "dense_hidden"),
        (DLRMDCNConfig, {"dcn_num_layers": 0}, "dcn_num_layers must be at least 1, not 0"),
        (DLRMDCNConfig, {"dcn_low_rank_dim": 0}, "dcn_low_rank_dim"),
        (AutoIntConfig, {"num_heads": 0}, "num_heads"),
        (DCNConfig, {"num_cross_layers": 0}, "num_cross_layers"),
        (FiBiNETConfig, {"reduction": 0}, "reduction"),
        (XDeepFMConfig, {"cin_layer_sizes": ()}, "cin_layer_sizes must name"),
        (XDeepFMConfig, {"cin_layer_sizes": (3, 4)}, "cin_layer_sizes must be even but for the last"),
    ],
)
def test_options_that_make_no_model_are_refused(config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_fibinet_refuses_a_single_feature(make_schema) -> None:
    with pytest.raises(ValueError, match="fibinet needs two sparse features, data set 'random' has one"):
        FiBiNETConfig().build(make_schema(0, (4,)), 8)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - {"fibinet"}))
def test_a_single_feature_is_enough_elsewhere(name: str, make_schema, make_rows) -> None:
    schema = make_schema(0, (4,))
    model = materialize_tables(BACKBONES[name]().build(schema, 8))
    dense, _, sparse_features = make_rows(schema, 3)
    assert model(dense, sparse_features).shape == (3, 1)
