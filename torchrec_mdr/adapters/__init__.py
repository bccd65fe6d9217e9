"""Adapters: banks of low-rank adapters, adapted layers, and their injection into a backbone."""

from torchrec_mdr.adapters.bank import Bank, LayerAdapter, LoRABank
from torchrec_mdr.adapters.bank_rows import RowLayout
from torchrec_mdr.adapters.bank_tables import BankTables
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.adapters.gate import CombiningAdapter, GateModule
from torchrec_mdr.adapters.hashed_domains import HashedDomains
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.adapters.norm import DomainNorm, GlobalBatchNorm1d, NormBank
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

__all__ = [
    "AdapterCrossNet",
    "AdapterLinear",
    "Bank",
    "BankTables",
    "BatchDomains",
    "CombiningAdapter",
    "DomainContext",
    "DomainGroups",
    "DomainModule",
    "DomainNorm",
    "DomainState",
    "GateModule",
    "GlobalBatchNorm1d",
    "HashedDomains",
    "LayerAdapter",
    "LoRABank",
    "NormBank",
    "OwnedRows",
    "ParameterGroup",
    "Route",
    "RowLayout",
    "inject",
]
