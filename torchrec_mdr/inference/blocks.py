"""The adapters of a run with sharded banks, a block of domains at a time, in one model whose rows change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.data.schema import Division
from torchrec_mdr.inference.run import Run, load_run, run_experiment
from torchrec_mdr.model import parameter_groups
from torchrec_mdr.training.stored_banks import load_state

PART = 4096  # domains of a run with sharded banks whose adapters are in memory at a time


def first_block(folder: str, least: int = 0) -> Run:
    """A finished run; of one with sharded banks, the model has the adapters of the first domains alone.

    Args:
        folder (str): the run's.
        least (int): domains that it has at least.
    """
    return load_run(folder, only=run_experiment(folder).divisions[0].domain_names[: max(PART, least)])


def later_blocks(run: Run) -> Iterator[tuple[Run, int]]:
    """The other blocks of a run's domains, one after the other, each in place of the one before.

    Args:
        run (Run): from :func:`first_block`. Its model changes.

    Yields:
        tuple: the run with a block of the same size, and how many of its first domains have come before.
    """
    if run.chosen is None:
        return  # it has all of them
    natural, *others = run.divisions
    names, size = run.schema.division(natural.name).domain_names, len(run.chosen)
    groups, state = parameter_groups(run.model), run.model.state_dict()
    banks = {name: tensor for name, tensor in state.items() if groups[name] is ParameterGroup.ADAPTERS}
    checkpoint = os.path.join(run.folder, "checkpoints", run.experiment.stages()[-1].name)
    for begin in range(size, len(names), size):
        first = min(begin, len(names) - size)
        chosen = tuple(range(first, first + size))
        load_state(checkpoint, run.model, banks, torch.tensor(chosen))
        divisions = Division(natural.name, names=list(names[first : first + size])), *others
        yield replace(run, experiment=replace(run.experiment, divisions=divisions), chosen=chosen), begin - first
