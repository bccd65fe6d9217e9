"""Whose experts the rows of some domains go through, where a top-k gate chooses among very many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from torchrec_mdr.adapters.expert_gate import ExpertGate
from torchrec_mdr.adapters.top_k import TopKAdapter
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.training.bank_choice import sharded_model
from torchrec_mdr.training.experiment import Experiment


class Reach:
    """The gate of a run with sharded banks, by itself: some numbers a domain, whatever their experts take.

    Args:
        experiment (Experiment): a run whose top-k gate chooses by the domain alone.
        folder (str): the checkpoint of its last stage.
    """

    def __init__(self, experiment: Experiment, folder: str) -> None:
        name, gate, self._top_k = _whole_gate(experiment)
        self._gate = gate.to_empty(device="cpu")
        checkpoint.load(folder, {f"{name}.gate.{own}": tensor for own, tensor in gate.state_dict().items()})

    @torch.no_grad()
    def fill(self, domains: Sequence[int], size: int) -> tuple[int, ...]:
        """Some domains, and behind them those whose experts their rows go through.

        A gate that has these experts alone chooses for these domains as one that has all: the highest of all scores are
        the highest of some, where they are among them.

        Args:
            domains (Sequence[int]): ids.
            size (int): how many domains there shall be, K for each of the given ones; others fill it up.

        Returns:
            tuple[int, ...]: ids [size], or of all domains where there are fewer.
        """
        experts, _ = self._gate.choose(None, torch.tensor(domains), self._top_k)
        there = dict.fromkeys(domains)
        there |= dict.fromkeys(torch.unique(experts % self._gate.num_domains).tolist())
        size = min(size, self._gate.num_domains)
        spare = (place for place in range(self._gate.num_domains) if place not in there)
        return *there, *islice(spare, size - len(there))


def _whole_gate(experiment: Experiment) -> tuple[str, ExpertGate, int]:
    """The name of the layer whose gate chooses for all layers, the gate without its values, and K."""
    for name, module in sharded_model(experiment).named_modules():
        if isinstance(module, TopKAdapter) and module.chooses_before:
            assert module.gate is not None, "the layer that chooses has the gate"
            return name, module.gate, module.top_k
    raise AssertionError("a run with sharded banks has one gate, which sees the domain alone")
