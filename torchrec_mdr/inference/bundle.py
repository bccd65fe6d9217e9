"""The folder that a scorer opens: what stands in it, and the rows that show that all of it arrived."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from torchrec_mdr.data.feature_files import FEATURE_FILES
from torchrec_mdr.data.schema import SCHEMA_FILE, Division, Schema
from torchrec_mdr.inference.adapter_file import AdapterFile
from torchrec_mdr.inference.freeze import ServingModel, known_ids
from torchrec_mdr.inference.package import Example
from torchrec_mdr.inference.store import CURRENT_FILE, LOCK_FILE
from torchrec_mdr.storage import digest_of, is_store, isfile, local_copy, ls, read_json, write_bytes, write_json
from torchrec_mdr.training.run_folder import CONFIG_FILE

MANIFEST_FILE = "manifest.json"
BACKBONE_FILE = "backbone.safetensors"
PACKAGE_FILE = "model.pt2"
GOLDEN_FILE = "golden.safetensors"
# what a bundle consists of, but for its manifest
PARTS = {"adapters", CURRENT_FILE, BACKBONE_FILE, GOLDEN_FILE, PACKAGE_FILE, SCHEMA_FILE, CONFIG_FILE, *FEATURE_FILES}
FORMAT = "torchrec_mdr bundle 1"
NUM_GOLDEN = 64
GOLDEN_BOUND = 1e-5  # of a logit's difference, beside max(1, |logit|): widths of thousands add up in other orders
INT8_BOUND = 0.05  # of a logit's difference, what tables of one byte a number may move it by


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Args:
        method (str): the method's name.
        options (dict[str, Any]): its options.
        divisions (tuple[Division, ...]): with the domains' names, the natural one first.
        features (tuple[str, ...]): sparse features in the order of batches.
        dense_features (tuple[str, ...]): dense ones.
        unknown_ids (dict[str, int]): ids of the vocabularies that stand for unknown ones, see :class:`ServedTables`.
        mean_ids (dict[str, int]): those among them that no training row had.
        has_backbone (bool): whether rows of unknown domains can be scored.
        int8 (bool): whether tables hold one byte a number.
        adapter_dtype (str): `float32` or `bfloat16`.
        resident (tuple[int, ...]): most adapters of each division in memory.
        places (tuple[int, ...]): rows for adapters in the tables of each division.
        files (dict[str, str]): SHA-256 of the files that never change.
        hashes (dict[str, str]): SHA-256 of every tensor that domains share, before tables were made int8.
        fingerprint (str): of all of them.
        tables (dict[str, list[Any]]): division, type and shape of an adapter's row in each table, by name.
        calibrated (bool): whether adapters were exported with a calibration.
        compiled (bool): whether there is a `model.pt2`.
        versions (dict[str, str]): of torchrec_mdr and torch that wrote it.
    """

    method: str
    options: dict[str, Any]
    divisions: tuple[Division, ...]
    features: tuple[str, ...]
    dense_features: tuple[str, ...]
    unknown_ids: dict[str, int]
    mean_ids: dict[str, int]
    has_backbone: bool
    int8: bool
    adapter_dtype: str
    resident: tuple[int, ...]
    places: tuple[int, ...]
    files: dict[str, str]
    hashes: dict[str, str]
    fingerprint: str
    tables: dict[str, list[Any]]
    calibrated: bool
    compiled: bool
    versions: dict[str, str]

    def save(self, folder: str) -> None:
        """Writes the file into a bundle."""
        write_json(os.path.join(folder, MANIFEST_FILE), {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(folder: str) -> Manifest:
        """Reads the file of a bundle.

        Raises:
            ValueError: the folder holds no bundle, one of another format, or a damaged one.
        """
        path = os.path.join(folder, MANIFEST_FILE)
        if not isfile(path):
            found = set(ls(folder)) - {LOCK_FILE} if is_store(folder) else set()
            if found and found <= PARTS:
                raise ValueError(f"{folder} holds a half-written bundle: {MANIFEST_FILE} comes last; export it again")
            raise ValueError(f"{folder} holds no bundle: it has no {MANIFEST_FILE}; write one by torchrec_mdr.export")
        content = read_json(path)
        try:
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not '{FORMAT}'")
            content["divisions"] = tuple(Division(**own) for own in content["divisions"])
            for name in ("features", "dense_features", "resident", "places"):
                content[name] = tuple(content[name])
            return Manifest(**content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is of another version, or damaged ({error}); export the run again") from error

    @property
    def sizes(self) -> list[int]:
        """Number of domains of each division."""
        return [division.num_domains for division in self.divisions]

    def division_of(self, name: str | None) -> int:
        """The place of a division; None is the natural one.

        Raises:
            ValueError: there is none of that name.
        """
        names = [division.name for division in self.divisions]
        if name is None:
            return 0
        if name not in names:
            raise ValueError(f"the bundle has no division '{name}'; it has {', '.join(names)}")
        return names.index(name)

    def check_adapter(self, adapter: AdapterFile, path: str) -> None:
        """Raises ValueError where an adapter does not belong into this bundle; path is for the error."""
        info = adapter.info
        if info.method != self.method:
            raise ValueError(f"{path} is an adapter of {info.method}, and the bundle is of {self.method}")
        try:
            division = self.division_of(info.division)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        rows = {name: row for name, row in self.tables.items() if row[0] == division}
        for name in sorted(set(rows) | set(adapter.tensors)):
            if name not in rows:
                raise ValueError(f"{path} adapts '{name}', a layer that the bundle's model has no adapters for")
            if name not in adapter.tensors:
                raise ValueError(f"{path} lacks '{name}', a layer that the bundle's model has adapters for")
            _, _, shape = rows[name]
            if list(adapter.tensors[name].shape) != shape:
                raise ValueError(
                    f"{path}: '{name}' is {list(adapter.tensors[name].shape)} and has to be {shape}: it is of another "
                    "rank or width; train it with the options of the bundle's run"
                )
        if info.fingerprint != self.fingerprint:
            raise ValueError(
                f"{path} was trained on another backbone (fingerprint {info.fingerprint[:12]}, of all that domains "
                f"share: experts and fusion weights, too) than the bundle's ({self.fingerprint[:12]}); train it on "
                "that one, or export a bundle of its own run"
            )
        if division and len(self.divisions) > 1 and info.domain not in self.divisions[division].domain_names:
            raise ValueError(
                f"{path}: division '{info.division}' has no domain '{info.domain}', and norms of its combinations with "
                "the others are not in the bundle; export the run again"
            )


@dataclass(frozen=True)
class GoldenRows:
    """Rows and the logits that a bundle's model gives them.

    Args:
        dense (Tensor): [B, num_dense_features].
        ids (Tensor): int64 [T], see :class:`FlatModel`.
        lengths (Tensor): int64 [F * B].
        domains (Tensor): int64 [B, V], -1 in the last quarter.
        logits (Tensor): [B], with version 1 of every adapter.
    """

    dense: Tensor
    ids: Tensor
    lengths: Tensor
    domains: Tensor
    logits: Tensor

    @staticmethod
    def draw(schema: Schema, frozen: ServingModel, most: Sequence[int], hidden: Mapping[str, int]) -> GoldenRows:
        """Rows that are nobody's, with logits still to be given: ids and numbers at random, domains in turn.

        Args:
            schema (Schema): of the rows.
            frozen (ServingModel): what they are for.
            most (Sequence[int]): domains of each division to take, the first ones.
            hidden (Mapping[str, int]): ids not to take, since they are served in another way than trained.
        """
        generator = torch.Generator().manual_seed(0)
        ids, lengths = [], []
        for feature in schema.sparse_features:
            own = torch.ones(NUM_GOLDEN, dtype=torch.int64)
            if feature.multi_hot:
                own = torch.randint(4, (NUM_GOLDEN,), generator=generator)
            lengths.append(own)
            drawn = torch.randint(feature.num_embeddings, (int(own.sum()),), generator=generator)
            ids.append(torch.where(drawn == hidden.get(feature.name, -1), feature.num_embeddings - 1, drawn))
        taken = [min(size, own) for size, own in zip(frozen.sizes, most, strict=True)]
        domains = torch.stack([(torch.arange(NUM_GOLDEN) // (v + 1)) % own for v, own in enumerate(taken)], 1)
        if frozen.has_backbone:
            domains[-NUM_GOLDEN // 4 :] = -1
        dense = torch.randn(NUM_GOLDEN, len(schema.dense_features), generator=generator)
        return GoldenRows(dense, torch.cat(ids), torch.cat(lengths), domains, torch.zeros(NUM_GOLDEN))

    def with_logits(self, logits: Tensor) -> GoldenRows:
        """The same rows with other logits."""
        return replace(self, logits=logits)

    def flat(self, model: ServingModel) -> Example:
        """The rows as :class:`FlatModel` takes them, where each domain has its own place."""
        return self.dense, self.ids, self.lengths, model.places(known_ids(self.domains, model.sizes))

    def save(self, folder: str, places: Tensor) -> None:
        """Writes the rows into a bundle, with the places of their domains in the package's own tables."""
        tensors = {name: tensor.contiguous() for name, tensor in vars(self).items()}
        write_bytes(os.path.join(folder, GOLDEN_FILE), safetensors.torch.save({**tensors, "places": places}))

    @staticmethod
    def load(folder: str) -> GoldenRows:
        """Reads them from a bundle."""
        tensors = load_tensors(os.path.join(folder, GOLDEN_FILE))
        tensors.pop("places")
        return GoldenRows(**tensors)

    def check(self, logits: Tensor, rows: Tensor, bound: float, what: str) -> None:
        """Raises ValueError where logits [B] are not those of some rows, bool [B].

        Args:
            logits (Tensor): [B].
            rows (Tensor): bool [B], which to compare.
            bound (float): of the difference, beside max(1, |logit|).
            what (str): what gave the logits, for the error.
        """
        far = (logits.double() - self.logits.double()).abs() / self.logits.double().abs().clamp(min=1)
        worst = float(torch.where(rows, far.nan_to_num(float("inf")), 0.0).max())
        if worst > bound:
            raise ValueError(
                f"{what} does not give the golden rows' logits (off by {worst:.2g}, allowed are {bound:.2g}): weights "
                "were lost or changed on the way; export the run again"
            )


def load_tensors(path: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file, or some of its tensors.

    Raises:
        ValueError: it is missing or damaged, or lacks a tensor.
    """
    try:
        with safetensors.safe_open(local_copy(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); export the run again") from error


def hashes_of_files(folder: str) -> dict[str, str]:
    """SHA-256 of a bundle's files that never change."""
    return {name: digest_of(os.path.join(folder, name)) for name in (BACKBONE_FILE, GOLDEN_FILE, SCHEMA_FILE)}


def wrong_files(folder: str) -> list[str]:
    """Which of a bundle's files that never change are not what was exported."""
    try:
        found = hashes_of_files(folder)
    except ValueError as error:
        return [str(error)]
    files = Manifest.load(folder).files
    return [f"{os.path.join(folder, name)} is not what was exported" for name in files if found[name] != files[name]]


def rows_of_tables(model: ServingModel) -> dict[str, list[Any]]:
    """Division, type and shape of a row of each table of adapters, as the manifest says them."""
    return {
        f"{name}.{table}": [bank.division, str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])]
        for name, bank in model.banks()
        for table, tensor in bank.tables.items()
    }
