"""Adapters: groups of rows, banks of low-rank adapters, adapted layers, and their injection into a backbone."""

from torchrec_mdr.adapters.bank import Bank, CombiningAdapter, GateModule, LayerAdapter, LoRABank, ParameterGroup
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.adapters.norm import DomainNorm, GlobalBatchNorm1d, NormBank
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

__all__ = [
    "AdapterCrossNet",
    "AdapterLinear",
    "Bank",
    "BatchDomains",
    "GlobalBatchNorm1d",
    "CombiningAdapter",
    "DomainContext",
    "DomainGroups",
    "DomainNorm",
    "DomainState",
    "GateModule",
    "LayerAdapter",
    "LoRABank",
    "NormBank",
    "ParameterGroup",
    "Route",
    "inject",
]
