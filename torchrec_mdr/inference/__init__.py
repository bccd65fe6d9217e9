"""Finished runs at work: their models without a launcher, bundles that serve, adapters as files."""

from torchrec_mdr.inference.adapter_file import AdapterFile, AdapterInfo, read_adapter
from torchrec_mdr.inference.export import export, export_again, export_model
from torchrec_mdr.inference.freeze import ServingModel, freeze
from torchrec_mdr.inference.hand_over import take_adapter, write_adapters
from torchrec_mdr.inference.merge import merge
from torchrec_mdr.inference.run import Run, load_run
from torchrec_mdr.inference.scorer import Scorer, Scores

__all__ = [
    "AdapterFile",
    "AdapterInfo",
    "Run",
    "Scorer",
    "Scores",
    "ServingModel",
    "export",
    "export_again",
    "export_model",
    "freeze",
    "load_run",
    "merge",
    "read_adapter",
    "take_adapter",
    "write_adapters",
]
