"""From a trained model to adapter files: what a domain has of its own, to be put into a bundle that runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice

from torchrec_mdr.inference.adapter_file import (
    AdapterFile,
    AdapterInfo,
    Results,
    domain_rows,
    fingerprint,
    shared_hashes,
    tables_of,
)
from torchrec_mdr.inference.blocks import first_block, later_blocks
from torchrec_mdr.inference.freeze import CALIBRATION, ServingModel, freeze
from torchrec_mdr.inference.run import Run, load_run, run_experiment
from torchrec_mdr.inference.run_data import TrainingRows, domain_results
from torchrec_mdr.inference.store import escaped
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import METHODS
from torchrec_mdr.storage import located, make_folder, write_bytes


def no_results(division: int) -> Results:
    """The results of a model of which nothing is known."""
    return {}


def adapters_of(
    model: MultiDomainModel,
    frozen: ServingModel,
    behind: str,
    results: Callable[[int], Results],
    complete: int | None = None,
) -> Iterator[AdapterFile]:
    """All domains' adapters of a model, one after the other.

    Args:
        model (MultiDomainModel): the model.
        frozen (ServingModel): the same, frozen, where each domain has its own rows.
        behind (str): the fingerprint of what domains share, see :func:`fingerprint`.
        results (Callable[[int], Results]): of the domains of a division, as far as they are known.
        complete (int | None): how many of the natural division, the first ones; all of them where left out.
    """
    method = METHODS.name_of(type(model.method))
    options = asdict(model.method)
    for v, division in enumerate(frozen.divisions):
        known = results(v)
        for domain, name in enumerate(division.domain_names[: None if v else complete]):
            count, validation = known.get(name, (None, None))
            info = AdapterInfo(method, division.name, name, behind, options, count, validation)
            yield AdapterFile(info, domain_rows(frozen, v, domain))


def take_adapter(source: Run | MultiDomainModel, domain: str, division: str | None = None) -> AdapterFile:
    """One domain's adapter, out of a run or of a model that another loop has trained.

    A file holds what the domain has of its own: with MLoRA and MultiLoRA its low-rank adapters and norms, those of its
    combinations with the other divisions' domains with the natural division's; with MoE-MLoRA its rows of the gates, as
    all domains share the experts. What domains share, fusion weights among it, is the bundle's.

    Args:
        source (Run | MultiDomainModel): from :func:`load_run`; or a model, whole and not sharded.
        domain (str): its name.
        division (str | None): of which division; the natural one where left out.

    Raises:
        ValueError: there is no such domain, or the method gives domains nothing of their own.
    """
    names = [own.name for own in source.divisions]
    if division is not None and division not in names:
        raise ValueError(f"there is no division '{division}'; there is {', '.join(names)}")
    wanted = source.divisions[0 if division is None else names.index(division)]
    wanted.domain_id(domain)
    for adapter in all_adapters(source):
        if (adapter.info.division, adapter.info.domain) == (wanted.name, domain):
            return adapter
    raise AssertionError("every domain has an adapter")


def all_adapters(source: Run | MultiDomainModel) -> Iterator[AdapterFile]:
    """Every domain's adapter; see :func:`take_adapter`."""
    model = source.model if isinstance(source, Run) else source
    results = no_results
    if isinstance(source, Run):
        results = partial(domain_results, source, rows=TrainingRows(source))
    frozen = _frozen(model)
    return adapters_of(model, frozen, fingerprint(shared_hashes(frozen)), results)


def _frozen(model: MultiDomainModel) -> ServingModel:
    """The model as it serves; raises ValueError where domains have nothing of their own."""
    frozen = freeze(model)
    if all(name == CALIBRATION for name in tables_of(frozen, 0)):
        method = type(model.method).__name__
        raise ValueError(f"{method} gives domains nothing of their own, so that there is nothing to hand over")
    return frozen


def later_adapters(
    run: Run,
    frozen: ServingModel,
    behind: str,
    rows: TrainingRows,
    change: Callable[[ServingModel, tuple[int, ...]], None] | None = None,
) -> Iterator[AdapterFile]:
    """The adapters of the domains behind a run's first block; none where that has all of them.

    Args:
        run (Run): from :func:`~torchrec_mdr.inference.blocks.first_block`. Its model changes.
        frozen (ServingModel): the first block, frozen.
        behind (str): see :func:`adapters_of`.
        rows (TrainingRows): the run's.
        change (Callable | None): does to a frozen block, of domains that it is told, what was done to the first one.
    """
    for block, skipped in later_blocks(run):
        own = freeze(run.model, frozen.features, like=frozen)
        own.divisions, chosen = block.divisions, block.chosen or ()
        if change is not None:
            change(own, chosen)
        results = partial(domain_results, block, rows=rows)
        last = block.complete or len(chosen)  # of the natural division
        yield from islice(adapters_of(run.model, own, behind, results), skipped, last)


def adapter_of_run(run_folder: str, domain: str, division: str | None = None) -> AdapterFile:
    """One domain's adapter, out of a run's folder; of sharded banks, no other one is read.

    Args:
        run_folder (str): of a finished run.
        domain (str): its name.
        division (str | None): see :func:`take_adapter`.

    Raises:
        ValueError: see :func:`take_adapter`.
    """
    natural = run_experiment(run_folder).divisions[0].name
    only = [domain] if division in (None, natural) else None
    return take_adapter(load_run(run_folder, only=only), domain, division)


def _adapters_in_parts(run_folder: str) -> Iterator[AdapterFile]:
    """All adapters of a run; of sharded banks, those of some domains at a time are in memory."""
    run = first_block(run_folder)
    rows, frozen = TrainingRows(run), _frozen(run.model)
    behind = fingerprint(shared_hashes(frozen))
    yield from adapters_of(run.model, frozen, behind, partial(domain_results, run, rows=rows), run.complete)
    yield from later_adapters(run, frozen, behind, rows)


def write_adapters(run_folder: str) -> str:
    """Writes every domain's adapter of a finished run to `adapters/DIVISION/DOMAIN.safetensors` in its folder.

    Returns:
        str: the folder of the files.
    """
    folder = os.path.join(located(run_folder), "adapters")
    for adapter in _adapters_in_parts(run_folder):
        own = os.path.join(folder, escaped(adapter.info.division))
        make_folder(own, "--output_dir")
        write_bytes(os.path.join(own, f"{escaped(adapter.info.domain)}.safetensors"), adapter.to_bytes())
    return folder
