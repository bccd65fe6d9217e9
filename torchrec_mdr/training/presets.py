"""Defaults of a run by data set, protocol and recipe: the papers' published settings, and this project's own.

Options that the user gives override them; `--print_config` shows what they come to.
"""

from __future__ import annotations

from typing import Any

MULTILORA_METHODS = ("multilora", "single_lora")
OWN_ARCHS = ("dlrm", "dlrm_dcn")  # TorchRec's own models have neither dropout nor batch norm

# MLoRA's published settings for MovieLens (algorithms.md, section 1)
_MLORA_STAGE = {"epochs": 30, "patience": 3, "learning_rate": 1e-3, "monitor": "mean_domain_auc", "embedding_l2": 1e-5}
# MultiLoRA's (section 2); one setting of the published grid
_MULTILORA_STAGE = {"epochs": 30, "patience": 5, "learning_rate": 1e-3, "weight_decay": 1e-5}
_SYNTHETIC_STAGE = {"epochs": 6, "patience": 2, "learning_rate": 1e-3}
# this project's own. Penalty and learning rate are those of the grids in examples/search_backbone.yaml and
# search_adapters.yaml with the highest AUC on validation rows (seed 0); the rest was not searched
_PRETRAINING: dict[str, dict[str, Any]] = {
    "mlora": {"embedding_l2": 2.0, "ema_decay": 0.999},
    "multilora": {"embedding_l2": 8.0, "ema_decay": 0.999},
}
# where embeddings meet in products alone, all of them zero is a point that no gradient leads away from, and these
# penalties lead there; judged the same way by examples/search_products.yaml
_PENALTY_OF_PRODUCTS = {
    ("nfm", "mlora"): 0.02,
    ("dlrm", "mlora"): 0.2,
    ("dlrm", "multilora"): 0.08,
}
_AFTER_PRETRAINING = {
    "ema_decay": 0.99,
    "validations_per_epoch": 4,
    "patience": 4,
    "rows": "left_out",
    "backbone_noise": False,
}
_LEARNING_RATES = {"mlora": 1e-4, "multilora": 1e-3}
_STAGES = ("pretrain", "adapt", "fuse", "gate", "joint")


def default_protocol(method: str) -> str:
    """The protocol of the paper a method comes from."""
    return "mlora" if method in ("mlora", "moe_mlora") else "multilora"


def default_divisions(method: str, dataset: str, protocol: str) -> dict[str, Any]:
    """The natural division, and the auxiliary one where the method combines several."""
    if dataset == "synthetic":
        division, auxiliary = "scenario", "segment"
    elif protocol == "multilora":
        division, auxiliary = "age3", "gender"
    else:
        division, auxiliary = "gender", "age"
    return {"division": division, "auxiliary_division": auxiliary if method == "multilora" else None}


def defaults(method: str, backbone: str, dataset: str, protocol: str, recipe: str) -> dict[str, Any]:
    """Default values of options, by their dotted names.

    Example::

        >>> defaults("mlora", "mlp", "movielens-1m", "mlora", "paper")["backbone_options.hidden"]
        [256, 128, 64]
    """
    hidden: dict[str, Any]
    stage: dict[str, Any]
    if dataset == "synthetic":
        stage, hidden = _SYNTHETIC_STAGE, {"hidden": [64, 32]}
        values: dict[str, Any] = {"embeddings.dim": 16, "batch_size": 2048}
    elif protocol == "mlora":
        stage, hidden = _MLORA_STAGE, {"hidden": [256, 128, 64], "dropout": 0.5}
        values = {"embeddings.dim": 8, "batch_size": 1024}
    else:
        stage, hidden = _MULTILORA_STAGE, {"hidden": [256, 128], "batch_norm": True}
        values = {"embeddings.dim": 16, "batch_size": 4096}
    for name in _STAGES:
        values |= {f"stages.{name}.{option}": value for option, value in stage.items()}
    if recipe == "recommended" and dataset != "synthetic":
        after = {**_AFTER_PRETRAINING, "learning_rate": _LEARNING_RATES[protocol]}
        pretraining = dict(_PRETRAINING[protocol])
        pretraining["embedding_l2"] = _PENALTY_OF_PRODUCTS.get((backbone, protocol), pretraining["embedding_l2"])
        for name in _STAGES:
            options = pretraining if name in ("pretrain", "joint") else after
            values |= {f"stages.{name}.{option}": value for option, value in options.items()}
        if method == "plate":  # rows cannot be left out of tables whose ids are not in the data
            values["stages.adapt.rows"] = "all"
        if method == "finetune":  # its domains train whole copies of the backbone
            values["stages.adapt.backbone_noise"] = True
    if backbone in OWN_ARCHS:
        hidden = {"hidden": hidden["hidden"]}
    values |= {f"backbone_options.{option}": value for option, value in hidden.items()}
    return values | default_divisions(method, dataset, protocol)
