"""What a bundle takes from a run's results and from the data that it was trained on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from torchrec_mdr.data.feature_files import has_features
from torchrec_mdr.data.files import SplitFile
from torchrec_mdr.data.schema import domain_column
from torchrec_mdr.data.split_files import open_split
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.inference.adapter_file import Results
from torchrec_mdr.inference.calibration import Labelled
from torchrec_mdr.inference.run import Run
from torchrec_mdr.storage import isfile, read_json
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import load
from torchrec_mdr.training.run_folder import CONFIG_FILE, METRICS_FILE


def data_of(run: Run) -> Experiment:
    """The run's experiment on the data that it was trained on.

    Raises:
        ValueError: they are not there any more, or have changed.
    """
    options = load(os.path.join(run.folder, CONFIG_FILE))
    experiment = Experiment.from_options(options, Experiment.prepare_data(options))
    if experiment.schema != run.schema:
        raise ValueError(f"the data in {experiment.folder} are not those that {run.folder} was trained on")
    return experiment


class TrainingRows:
    """The rows a run was trained on, counted; nothing is known where they are not there any more.

    Args:
        run (Run): from :func:`load_run`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._files: list[SplitFile] | None = None
        self._counts: dict[int, dict[int, int]] = {}  # by division
        try:
            self._files = open_split(data_of(run).folder, "train")
        except (ValueError, OSError):
            return

    def per_domain(self, division: int) -> dict[int, int] | None:
        """Rows of each domain that has any; None where nothing is known."""
        if self._files is None:
            return None
        if division in self._counts:
            return self._counts[division]
        counts: Counter[int] = Counter()
        for column in self._columns(domain_column(self.run.divisions[division].name)):
            for one in pc.value_counts(column):
                counts[int(one["values"].as_py())] += int(one["counts"].as_py())
        self._counts[division] = dict(counts)
        return self._counts[division]

    def has_id(self, feature: str, wanted: int) -> bool:
        """Whether a row has this id of a feature; true where nothing is known."""
        if self._files is None:
            return True
        for column in self._columns(feature):
            for ids in column.chunks:
                flat = ids if ids.type.num_fields == 0 else ids.flatten()
                if bool(pc.any(pc.equal(flat, wanted)).as_py()):
                    return True
        return False

    def _columns(self, name: str) -> Iterator[pa.ChunkedArray]:
        """One column, part by part."""
        for file in self._files or ():
            for group in range(len(file.group_rows)):
                yield file.read(group, [name]).column(name)


def unknown_ids(run: Run, rows: TrainingRows) -> tuple[dict[str, int], dict[str, int]]:
    """The vocabularies' ids for unknown values, by feature: those that training rows had, and those that none had."""
    seen: dict[str, int] = {}
    unseen: dict[str, int] = {}
    if has_features(run.folder):
        # needs polars, which runs without raw rows do not
        from torchrec_mdr.data.features.plan import FeaturePlan

        for feature in FeaturePlan.load(run.folder).sparse:
            if feature.vocabulary is not None and feature.unknown is not None:
                (seen if rows.has_id(feature.name, feature.unknown) else unseen)[feature.name] = feature.unknown
    return seen, unseen


def domain_results(run: Run, division: int, rows: TrainingRows) -> Results:
    """Training rows and validation results of each domain, by name, where they are known."""
    path = os.path.join(run.folder, METRICS_FILE)
    names, own = run.divisions[division].domain_names, run.divisions[division].name
    places = range(len(names)) if division or run.chosen is None else run.chosen
    counts = rows.per_domain(division)
    validation: dict[str, Any] = {}
    if isfile(path):
        for stage in read_json(path)["stages"]:
            domains = stage["validation"]["domains"]
            if list(domains) == list(run.schema.division(own).domain_names):
                validation = domains
    return {
        name: (None if counts is None else counts.get(place, 0), validation.get(name))
        for place, name in zip(places, names, strict=True)
    }


def validation_rows(run: Run) -> Iterator[Labelled]:
    """The run's validation rows.

    Raises:
        ValueError: the data are not there any more.
    """
    loader = data_of(run).eval_loader("validation", Environment(0, 1, torch.device("cpu")))
    for batch in loader.batches(0):
        yield batch.dense_features, batch.sparse_features, batch.domains.ids, batch.labels
