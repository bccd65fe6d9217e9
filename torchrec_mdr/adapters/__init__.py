"""Adapters: banks of low-rank adapters, adapted layers, and their injection into a backbone."""

from torchrec_mdr.adapters.bank import Bank, LayerAdapter, LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.adapters.gate import CombiningAdapter, GateModule
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.adapters.norm import DomainNorm, GlobalBatchNorm1d, NormBank
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

__all__ = [
    "AdapterCrossNet",
    "AdapterLinear",
    "Bank",
    "BatchDomains",
    "CombiningAdapter",
    "DomainContext",
    "DomainGroups",
    "DomainModule",
    "DomainNorm",
    "DomainState",
    "GateModule",
    "GlobalBatchNorm1d",
    "LayerAdapter",
    "LoRABank",
    "NormBank",
    "OwnedRows",
    "ParameterGroup",
    "Route",
    "inject",
]
