"""An adapter as an artefact: one domain's rows of a serving model's tables, in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from torchrec_mdr.inference.freeze import ServingModel
from torchrec_mdr.storage import located, read_bytes

FORMAT = "torchrec_mdr adapter 1"
Results = Mapping[str, tuple[int | None, dict[str, Any] | None]]  # training rows and validation results, by domain


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself.

    Args:
        method (str): the method's name.
        division (str): the division.
        domain (str): the domain.
        fingerprint (str): of all that the adapter stands behind, see :func:`fingerprint`.
        options (dict[str, Any]): the method's options.
        training_rows (int | None): rows of the domain that it was trained on, where that is known.
        validation (dict[str, Any] | None): AUC, log loss and rows of the domain on validation rows, where known.
        parent (int | None): the version in the bundle that it follows; None for the first.
    """

    method: str
    division: str
    domain: str
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict)
    training_rows: int | None = None
    validation: dict[str, Any] | None = None
    parent: int | None = None


@dataclass(frozen=True)
class AdapterFile:
    """One domain's adapter.

    Args:
        info (AdapterInfo): what it says of itself.
        tensors (dict[str, Tensor]): a row of each table, by the table's name in :class:`ServingModel`.
    """

    info: AdapterInfo
    tensors: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """The file's content."""
        metadata = {"format": FORMAT, "adapter": json.dumps(asdict(self.info), ensure_ascii=False)}
        content: bytes = safetensors.torch.save(self.tensors, metadata)
        return content

    @staticmethod
    def from_bytes(content: bytes, path: str) -> AdapterFile:
        """What :meth:`to_bytes` made; path is for the error.

        Raises:
            ValueError: it is no adapter file, a damaged one, or holds numbers that are not finite.
        """
        try:
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + length])["__metadata__"]
            tensors = safetensors.torch.load(content)
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is '{metadata['format']}', not '{FORMAT}'")
            info = AdapterInfo(**json.loads(metadata["adapter"]))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is no adapter file, or a damaged one ({reason}); export it again") from error
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: tensor '{name}' holds numbers that are not finite; train the adapter again")
        return AdapterFile(info, tensors)

    def with_parent(self, parent: int | None) -> AdapterFile:
        """The same as the successor of a version."""
        return replace(self, info=replace(self.info, parent=parent))


def read_adapter(path: str) -> AdapterFile:
    """Reads an adapter file.

    Raises:
        ValueError: it cannot be read, or see :meth:`AdapterFile.from_bytes`.
    """
    return AdapterFile.from_bytes(read_bytes(located(path)), path)


def read_rows(path: str) -> dict[str, Tensor]:
    """The tensors of an adapter file that was checked when it was put.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(read_bytes(path))
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); put the adapter again") from error
    return tensors


def tables_of(model: ServingModel, division: int) -> dict[str, Tensor]:
    """The tables [1 + N, ...] that hold a division's adapters, by name."""
    return {
        f"{name}.{table}": tensor
        for name, bank in model.banks()
        if bank.division == division
        for table, tensor in bank.tables.items()
    }


def domain_rows(model: ServingModel, division: int, domain: int) -> dict[str, Tensor]:
    """One domain's rows of a frozen model's tables, where each domain has its own."""
    return {name: table[1 + domain].clone() for name, table in tables_of(model, division).items()}


def shared_hashes(model: ServingModel) -> dict[str, str]:
    """SHA-256 of all weights that domains share, and of the rows for unknown ones, by name."""
    own = {f"{name}.{table}": tensor for name, bank in model.banks() for table, tensor in bank.tables.items()}
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return {name: sha256(own[name][0] if name in own else tensor) for name, tensor in weights.items()}


def sha256(content: Tensor | bytes) -> str:
    """Of a tensor's type, shape and numbers, or of a file."""
    digest = hashlib.sha256()
    if isinstance(content, Tensor):
        digest.update(f"{content.dtype} {list(content.shape)}".encode())
        digest.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(content)
    return digest.hexdigest()


def fingerprint(hashes: Mapping[str, str]) -> str:
    """One hash of all that adapters stand behind.

    Example::

        >>> fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
        True
    """
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()[:32]
