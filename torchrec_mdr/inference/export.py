"""Makes a bundle of a run, or of a model that another loop has trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.inference.blocks import first_block
from torchrec_mdr.inference.bundle import PACKAGE_FILE, GoldenRows, Manifest
from torchrec_mdr.inference.calibration import Labelled, calibration_of
from torchrec_mdr.inference.freeze import ServingModel
from torchrec_mdr.inference.hand_over import later_adapters
from torchrec_mdr.inference.package import compile_package
from torchrec_mdr.inference.rebuild import change_types, rebuild
from torchrec_mdr.inference.run import Run, load_run
from torchrec_mdr.inference.run_data import TrainingRows, domain_results, unknown_ids, validation_rows
from torchrec_mdr.inference.scorer import Scorer
from torchrec_mdr.inference.store import AdapterStore
from torchrec_mdr.inference.writing import Form, Source, new_bundle, place_rows, write_bundle
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.storage import is_store, isfile, located, put_file, remove, scratch_folder


def export(
    run: Run | str,
    folder: str,
    calibrate: bool = False,
    int8: bool = False,
    adapter_dtype: str = "float32",
    resident: int | None = None,
    compiled: bool = True,
) -> None:
    """Writes a bundle: what a :class:`Scorer` opens.

    Its golden rows are replayed on what was written, before the folder gets its name; in a store, before the files go
    there. There it counts from its `manifest.json` on, which is written last.

    Args:
        run (Run | str): from :func:`load_run`; or a run's folder: of one with sharded banks, the adapters of some
            thousand domains are in memory at a time, and calibrations are fitted to its logits before tables and
            adapters are rounded.
        folder (str): a new folder, on a disk or in an object store.
        calibrate (bool): whether probabilities are calibrated per domain, on the run's validation rows.
        int8 (bool): whether embedding tables hold one byte a number, with a scale and an offset a row.
        adapter_dtype (str): `float32` or `bfloat16`, of low-rank adapters.
        resident (int | None): most adapters of a division in memory at a time; by default all, up to 1,024.
        compiled (bool): whether to write `model.pt2`; without it a scorer runs the eager model.

    Raises:
        ValueError: the folder is in use, the method has no form that serves, there is no compiler, or golden rows get
            other logits than the run's model gives them.
    """
    with new_bundle(folder) as writing:
        form = Form(int8, adapter_dtype, resident, compiled)
        taken = run if isinstance(run, Run) else first_block(run, resident or 0)
        rows = TrainingRows(taken)
        unknown, unseen = unknown_ids(taken, rows)
        results = partial(domain_results, taken, rows=rows)
        source = Source(taken.model, taken.schema, unknown, unseen, None, results, taken.folder)
        if isinstance(run, str) and taken.chosen is not None:
            source = _in_blocks(source, taken, rows, form, calibrate)
        elif calibrate:
            source = replace(source, validation=validation_rows(taken))
        write_bundle(source, form, writing)


def _in_blocks(source: Source, run: Run, rows: TrainingRows, form: Form, calibrate: bool) -> Source:
    """The source of a bundle of all domains, where a run's model has the first ones alone."""
    affine = None
    if calibrate:
        whole = load_run(run.folder, on_demand=True)
        sizes = [division.num_domains for division in whole.divisions]
        affine = calibration_of(whole.model, validation_rows(whole), sizes)

    def change(frozen: ServingModel, chosen: tuple[int, ...]) -> None:
        change_types(frozen, form.adapter_dtype, int8=False)
        if affine is not None:
            frozen.calibration.get_buffer("affine")[1:] = affine[list(chosen)]

    return replace(
        source,
        affine=None if affine is None else affine[list(run.chosen or ())],
        divisions=tuple(run.schema.division(division.name) for division in run.divisions),
        complete=run.complete,
        later=lambda frozen, behind: later_adapters(run, frozen, behind, rows, change),
    )


def export_model(
    model: MultiDomainModel,
    schema: Schema,
    folder: str,
    validation: Iterable[Labelled] | None = None,
    unknown_ids: Mapping[str, int] | None = None,
    int8: bool = False,
    adapter_dtype: str = "float32",
    resident: int | None = None,
) -> None:
    """Writes a bundle of a model that another loop than this package's has trained.

    It is always compiled: what builds the model in Python is not in the bundle.

    Args:
        model (MultiDomainModel): trained; whole, not sharded, on the CPU. It stays as it is.
        schema (Schema): names the features, the sparse ones with the sizes of their tables, and the model's divisions.
        folder (str): a new folder, on a disk or in an object store.
        validation (Iterable[Labelled] | None): labelled rows (dense features [B, D], sparse features, domain ids
            [B, V] or [B], labels [B]) by which probabilities are calibrated per domain; without them they are not.
        unknown_ids (Mapping[str, int] | None): by feature, the id that stands for unknown values and was trained; an
            unknown id of another feature is looked up as its table's mean row.
        int8 (bool): see :func:`export`.
        adapter_dtype (str): the same.
        resident (int | None): the same.

    Raises:
        ValueError: the model is sharded, on another device, or does not take rows of the schema; or see :func:`export`.
    """
    with new_bundle(folder) as writing:
        form = Form(int8, adapter_dtype, resident)
        _check_model(model, schema)
        counted = replace(schema, rows=dict.fromkeys(SPLITS, 0) | schema.rows)
        with _evaluating(model):
            write_bundle(Source(model, counted, unknown_ids or {}, validation=validation), form, writing)


def export_again(folder: str) -> None:
    """Compiles a bundle's model anew, for this machine and this version of PyTorch; adapters stay as they are.

    Raises:
        ValueError: the folder holds no bundle, or its weights are not those of its manifest.
    """
    folder = located(folder)
    manifest, golden = Manifest.load(folder), GoldenRows.load(folder)
    model = rebuild(folder, manifest)
    store = AdapterStore(folder)
    for v, division in enumerate(manifest.divisions):
        for number, name in enumerate(division.domain_names[: manifest.resident[v]]):
            if isfile(store.path(division.name, name, 1)):
                place_rows(model, store.load(division.name, name, 1).tensors, 1 + number)
    with scratch_folder() if is_store(folder) else nullcontext(folder) as place:
        writing = os.path.join(place, f"writing-{PACKAGE_FILE}")  # the compiler wants the ending
        try:
            compile_package(model, golden.flat(model), writing)
            if place == folder:
                os.rename(writing, os.path.join(folder, PACKAGE_FILE))
            else:
                put_file(writing, os.path.join(folder, PACKAGE_FILE))
            if not manifest.compiled:
                replace(manifest, compiled=True).save(folder)
        finally:
            remove(writing)
    Scorer(folder)


def _check_model(model: MultiDomainModel, schema: Schema) -> None:
    """Raises ValueError where a bundle cannot be made of a model and a schema."""
    if not isinstance(model, MultiDomainModel):
        raise ValueError(f"a bundle is made of a MultiDomainModel, not of {type(model).__name__}; give the model in it")
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError("the model is sharded; build it anew, load its checkpoint into it, and export that")
    device = next((own.device for own in model.parameters() if own.device.type != "cpu"), None)
    if device is not None:
        raise ValueError(f"the model is on {device}; a bundle is made on the CPU: give model.cpu(), with its weights")
    if tuple(schema.divisions) != tuple(model.divisions):
        theirs, ours = (", ".join(own.name for own in given.divisions) or "none" for given in (schema, model))
        raise ValueError(f"the schema's divisions ({theirs}) are not the model's ({ours}), name by name, in its order")
    sizes = {own.name: own.num_embeddings for own in schema.sparse_features}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for table in module.embedding_bag_configs():
                for feature in table.feature_names:
                    if sizes.get(feature) != table.num_embeddings:
                        raise ValueError(
                            f"feature '{feature}' has {sizes.get(feature, 'no')} ids in the schema, and table "
                            f"'{table.name}' has {table.num_embeddings} rows; list it with num_embeddings="
                            f"{table.num_embeddings}"
                        )


@contextmanager
def _evaluating(model: MultiDomainModel) -> Iterator[None]:
    """The model in evaluation mode on its method's own route, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with model.routed(model.method.route):
            yield
    finally:
        model.train(training)
