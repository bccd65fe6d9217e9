"""Backbones: the models that adapters wrap, one file each, all on the same embedding tables."""

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import BackboneConfig, HiddenConfig
from torchrec_mdr.backbones.tables import build_tables, materialize_tables
from torchrec_mdr.backbones.targets import adapter_targets

__all__ = ["Backbone", "BackboneConfig", "HiddenConfig", "adapter_targets", "build_tables", "materialize_tables"]
