"""Writes a bundle's folder: whole, with its golden rows replayed, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain

import safetensors.torch
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.feature_files import copy_features
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.inference.adapter_file import AdapterFile, Results, domain_rows, fingerprint, shared_hashes
from torchrec_mdr.inference.bundle import (
    BACKBONE_FILE,
    GOLDEN_BOUND,
    INT8_BOUND,
    MANIFEST_FILE,
    PACKAGE_FILE,
    PARTS,
    GoldenRows,
    Manifest,
    hashes_of_files,
    rows_of_tables,
)
from torchrec_mdr.inference.calibration import Labelled, calibrate
from torchrec_mdr.inference.freeze import FlatModel, ServingModel, freeze
from torchrec_mdr.inference.hand_over import adapters_of, no_results
from torchrec_mdr.inference.package import compile_package
from torchrec_mdr.inference.rebuild import change_types, give_places, shared_state
from torchrec_mdr.inference.scorer import Scorer
from torchrec_mdr.inference.store import LOCK_FILE, AdapterStore
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import METHODS
from torchrec_mdr.storage import (
    exclusive,
    is_store,
    isdir,
    located,
    ls,
    make_folder,
    put_folder,
    read_text,
    remove,
    remove_folder,
    scratch_folder,
    write_bytes,
    write_text,
)
from torchrec_mdr.training.run_folder import CONFIG_FILE

SPARE = 8  # places beside those of resident adapters, for versions that change
MOST_RESIDENT = 1024  # where nobody says how many


@dataclass(frozen=True)
class Source:
    """What a bundle is made of.

    Args:
        model (MultiDomainModel): trained, in evaluation mode, its tables in this process.
        schema (Schema): of the rows to come.
        unknown_ids (Mapping[str, int]): see :class:`ServedTables`.
        mean_ids (Mapping[str, int]): the same.
        validation (Iterable[Labelled] | None): rows that calibrations are fitted to; None without calibration.
        results (Callable[[int], Results]): training rows and validation results of a division's domains.
        run (str | None): the run's folder, whose options build the model again; None where there is no run.
        affine (Tensor | None): calibrations of the model's domains, float64 [N, 2], where they are known already.
        divisions (tuple[Division, ...] | None): of the bundle, where the model has the first domains alone.
        complete (int | None): how many of the model's first domains are the bundle's, where those behind are not.
        later (Callable | None): the frozen model and what adapters stand behind, to those of the other domains.
    """

    model: MultiDomainModel
    schema: Schema
    unknown_ids: Mapping[str, int] = field(default_factory=dict)
    mean_ids: Mapping[str, int] = field(default_factory=dict)
    validation: Iterable[Labelled] | None = None
    results: Callable[[int], Results] = no_results
    run: str | None = None
    affine: Tensor | None = None
    divisions: tuple[Division, ...] | None = None
    complete: int | None = None
    later: Callable[[ServingModel, str], Iterable[AdapterFile]] | None = None


@dataclass(frozen=True)
class Form:
    """How a bundle is written; see :func:`~torchrec_mdr.inference.export`."""

    int8: bool = False
    adapter_dtype: str = "float32"
    resident: int | None = None
    compiled: bool = True

    def __post_init__(self) -> None:
        if self.adapter_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--adapter_dtype must be float32 or bfloat16, not '{self.adapter_dtype}'")
        if self.resident is not None and self.resident < 1:
            raise ValueError(f"--resident must be at least 1, not {self.resident}")

    @property
    def bound(self) -> float:
        """What a golden logit may be off by."""
        return INT8_BOUND if self.int8 or self.adapter_dtype != "float32" else GOLDEN_BOUND


@contextmanager
def new_bundle(folder: str) -> Iterator[str]:
    """A local folder for a bundle's files, which become the bundle with the end of the block.

    On a disk the folder gets the bundle's name. In a store its files are copied, the manifest last; until then other
    processes are kept out, and what one that was ended has left there is removed.

    Args:
        folder (str): the bundle's.

    Raises:
        ValueError: it is in use, or cannot be written.
    """
    folder = located(folder)
    if is_store(folder):
        busy = f"another process writes to the bundle's folder {folder}; wait for it, or name another one"
        with exclusive(os.path.join(folder, LOCK_FILE), busy) as held, scratch_folder() as writing:
            _clear(folder)
            yield writing
            held.check()
            put_folder(writing, folder, last=MANIFEST_FILE)
        return
    if ls(folder):
        raise ValueError(_in_use(folder))
    writing = f"{os.path.normpath(folder)}.writing"
    remove_folder(writing)
    make_folder(writing, "--output")
    try:
        yield writing
        os.rename(writing, folder)
    finally:
        remove_folder(writing)


def _clear(folder: str) -> None:
    """Removes the half of a bundle; raises ValueError where a folder holds a whole one, or anything else."""
    found = set(ls(folder)) - {LOCK_FILE}
    if found - PARTS:
        raise ValueError(_in_use(folder))
    for path in (os.path.join(folder, name) for name in sorted(found)):
        remove_folder(path) if isdir(path) else remove(path)


def _in_use(folder: str) -> str:
    return f"the bundle's folder {folder} is in use; name another one, or delete it"


def write_bundle(source: Source, form: Form, writing: str) -> None:
    """Writes a bundle's files into a folder of :func:`new_bundle`, and replays the golden rows on them."""
    model, schema = source.model, source.schema
    frozen = freeze(model, [own.name for own in schema.sparse_features], source.unknown_ids, source.mean_ids)
    hashes = shared_hashes(frozen)
    divisions = source.divisions or frozen.divisions
    most = tuple(form.resident or min(own.num_domains + 2 * SPARE, MOST_RESIDENT) for own in divisions)
    first = [min(size, own) for size, own in zip(frozen.sizes, most, strict=True)]
    first[0] = min(first[0], source.complete or first[0])
    golden = GoldenRows.draw(schema, frozen, first, source.mean_ids)
    with torch.no_grad():
        features = KeyedJaggedTensor(
            list(frozen.features), golden.ids, lengths=golden.lengths, stride=len(golden.dense)
        )
        try:
            golden = golden.with_logits(model(golden.dense, features, golden.domains).reshape(-1))
        except RuntimeError as error:
            raise ValueError(
                f"the model does not take rows with the schema's {len(schema.dense_features)} dense features and "
                f"{len(schema.sparse_features)} sparse ones ({str(error).splitlines()[0]}); list those of its training"
            ) from error
        change_types(frozen, form.adapter_dtype, form.int8)
        served = golden.with_logits(FlatModel(frozen)(*golden.flat(frozen)))
    if source.validation is not None:
        calibrate(frozen, source.validation)
    elif source.affine is not None:
        frozen.calibration.get_buffer("affine")[1:] = source.affine
    everything = torch.ones(len(golden.logits), dtype=torch.bool)
    golden.check(served.logits, everything, form.bound, "the model that serves")
    behind = fingerprint(hashes)
    later = source.later(frozen, behind) if source.later is not None else ()
    AdapterStore(writing).put_all(chain(adapters_of(model, frozen, behind, source.results, source.complete), later))
    packed = _packed(frozen, first, most)
    write_bytes(os.path.join(writing, BACKBONE_FILE), safetensors.torch.save(shared_state(packed)))
    schema.save(writing)
    served.save(writing, served.flat(packed)[3])
    if source.run is not None:
        write_text(os.path.join(writing, CONFIG_FILE), read_text(os.path.join(source.run, CONFIG_FILE)))
        copy_features(source.run, writing)
    Manifest(
        method=METHODS.name_of(type(model.method)),
        options=asdict(model.method),
        divisions=divisions,
        features=packed.features,
        dense_features=schema.dense_features,
        unknown_ids=dict(source.unknown_ids),
        mean_ids=dict(source.mean_ids),
        has_backbone=packed.has_backbone,
        int8=form.int8,
        adapter_dtype=form.adapter_dtype,
        resident=most,
        places=tuple(own + SPARE for own in most),
        files=hashes_of_files(writing),
        hashes=hashes,
        fingerprint=behind,
        tables=rows_of_tables(packed),
        calibrated=source.validation is not None or source.affine is not None,
        compiled=form.compiled,
        versions={"torchrec_mdr": version("torchrec-mdr"), "torch": torch.__version__},
    ).save(writing)
    if form.compiled:
        compile_package(packed, golden.flat(packed), os.path.join(writing, PACKAGE_FILE))
    Scorer(writing)  # replays the golden rows


def _packed(frozen: ServingModel, first: Sequence[int], most: tuple[int, ...]) -> ServingModel:
    """The model with places for as many adapters as a bundle holds, the first domains in the first places."""
    rows = [[domain_rows(frozen, v, domain) for domain in range(count)] for v, count in enumerate(first)]
    give_places(frozen, tuple(own + SPARE for own in most))
    for of_division in rows:
        for number, tensors in enumerate(of_division):
            place_rows(frozen, tensors, 1 + number)
    return frozen


def place_rows(model: ServingModel, rows: Mapping[str, Tensor], place: int) -> None:
    """Puts an adapter into a place of a model's tables."""
    banks = dict(model.banks())
    for name, row in rows.items():
        bank, _, table = name.rpartition(".")
        banks[bank].tables[table][place] = row
