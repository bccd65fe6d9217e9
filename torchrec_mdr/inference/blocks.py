"""The adapters of a run with sharded banks, a block of domains at a time, in one model whose rows change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.inference.reach import Reach
from torchrec_mdr.inference.run import Run, load_run, run_experiment, with_domains
from torchrec_mdr.model import parameter_groups
from torchrec_mdr.training.new_domains import load_with_new_domains
from torchrec_mdr.training.stored_banks import load_state

PART = 4096  # domains of a run with sharded banks whose adapters are in memory at a time


def first_block(folder: str, least: int = 0) -> Run:
    """A finished run; of one with sharded banks, the model has the adapters of the first domains alone.

    Where rows go through K domains' adapters, a K-th of the model's domains are complete.

    Args:
        folder (str): the run's.
        least (int): domains that it has at least.
    """
    experiment = run_experiment(folder)
    names, reach = experiment.divisions[0].domain_names, experiment.method.reach() or 1
    count = max(PART // reach, least, 1)
    return load_run(folder, only=names[:count] if count * reach < len(names) or reach == 1 else None)


def later_blocks(run: Run) -> Iterator[tuple[Run, int]]:
    """The other blocks of a run's domains, one after the other, each in place of the one before.

    Args:
        run (Run): from :func:`first_block`. Its model changes.

    Yields:
        tuple: the run with a block of the same size, and how many of its first domains have come before.
    """
    if run.chosen is None:
        return  # it has all of them
    names = run.schema.division(run.divisions[0].name).domain_names
    checkpoint = os.path.join(run.folder, "checkpoints", run.experiment.stages()[-1].name)
    groups, state = parameter_groups(run.model), run.model.state_dict()
    own = {ParameterGroup.ADAPTERS} if run.complete is None else {ParameterGroup.ADAPTERS, ParameterGroup.GATE}
    state = {name: tensor for name, tensor in state.items() if groups[name] in own}
    if run.complete is not None:
        reach = Reach(with_domains(run.experiment, range(len(names))), checkpoint)
        for begin in range(run.complete, len(names), run.complete):
            domains = range(begin, min(begin + run.complete, len(names)))
            chosen = reach.fill(domains, len(run.chosen))
            load_with_new_domains(run.model, checkpoint, state=state, sources=torch.tensor(chosen))
            experiment = with_domains(run.experiment, chosen)
            yield replace(run, experiment=experiment, chosen=chosen, complete=len(domains)), 0
        return
    size = len(run.chosen)
    for begin in range(size, len(names), size):
        first = min(begin, len(names) - size)
        chosen = tuple(range(first, first + size))
        load_state(checkpoint, run.model, state, torch.tensor(chosen))
        yield replace(run, experiment=with_domains(run.experiment, chosen), chosen=chosen), begin - first
