"""A serving model as a compiled package that runs without Python."""

from __future__ import annotations

import json
import platform
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.inference.freeze import FlatModel, ServingModel
from torchrec_mdr.storage import isfile, local_copy, read_text

_TARGET = "torchrec_mdr.machine"
_VECTORS = re.compile(r"avx|amx|fma|f16c|bmi|sse|asimd|sve|bf16")  # the features of processors that compilers use
AGAIN = "python -m torchrec_mdr.export --again --output BUNDLE"
Example = tuple[Tensor, Tensor, Tensor, Tensor]


def flat_inputs(dense: Tensor, features: KeyedJaggedTensor, places: Tensor) -> Example:
    """Rows as :class:`FlatModel` takes them."""
    return dense, features.values().long(), features.lengths().long(), places


def _any_rows() -> Any:
    """Has a graph for several rows be that for one row, too."""
    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def export_program(flat: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The model as a graph for any number of rows, at least one.

    Args:
        flat (nn.Module): a :class:`FlatModel`, or what takes the same tensors.
        example (Example): rows of any number but one.
    """
    any_rows = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with torch.no_grad(), _any_rows():
        return torch.export.export(flat, example, dynamic_shapes=any_rows, strict=False)


def check_operators(program: torch.export.ExportedProgram, model: str) -> None:
    """Raises ValueError where a graph needs operators that a program without Python does not have."""
    foreign = sorted(
        {
            str(node.target)
            for node in program.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
        }
    )
    if foreign:
        raise ValueError(f"{model} needs {', '.join(foreign)}, which only Python has; it cannot be exported")


def compile_package(model: ServingModel, example: Example, path: str) -> None:
    """Compiles a model by AOTInductor for this machine's processor, into one file.

    Args:
        model (ServingModel): tables may be of another size later, not the number of their rows.
        example (Example): rows of any number but one.
        path (str): the file, `model.pt2`.

    Raises:
        ValueError: there is no C++ compiler, or the model needs an operator that only Python has.
    """
    program = export_program(FlatModel(model), example)
    check_operators(program, type(model.backbone).__name__)
    try:
        with _any_rows():
            options = {"aot_inductor.metadata": {_TARGET: json.dumps(this_machine())}}
            torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise ValueError(
            "AOTInductor needs a C++ compiler, and there is none; install g++, or name one in $CXX"
        ) from error


def this_machine() -> dict[str, Any]:
    """What a package that is compiled here needs where it runs."""
    features: list[str] = []
    if isfile("/proc/cpuinfo"):
        lines = read_text("/proc/cpuinfo").splitlines()
        line = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
        features = sorted(set(filter(_VECTORS.match, line.partition(":")[2].split())))
    torch_version = torch.__version__.split("+")[0]
    return {"torch": torch_version, "device": "cpu", "machine": platform.machine(), "features": features}


def _stored_machine(path: str) -> str:
    """What :func:`this_machine` said where a package was compiled, read without loading its code."""
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    stored: str = loader.load_metadata_from_package(path, "model")[_TARGET]
    return stored


def _check_machine(path: str) -> None:
    try:
        needed = json.loads(_stored_machine(local_copy(path)))
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no package of this library, or damaged; compile it by {AGAIN}") from error
    here = this_machine()
    lacking = sorted(set(needed["features"]) - set(here["features"]))
    for what, wants, has in (
        ("PyTorch", needed["torch"], here["torch"]),
        ("the device", needed["device"], here["device"]),
        ("machines", needed["machine"], here["machine"]),
        ("processors with", ", ".join(lacking), ""),
    ):
        if wants != has:
            this = f"this one is {has}" if has else "which this one lacks"
            raise ValueError(f"{path} was compiled for {what} {wants}, {this}; compile it anew by {AGAIN}")


class Package:
    """A compiled package, and the tables of adapters that it reads.

    Args:
        path (str): `model.pt2`.
        threads (int): how many calls may run at a time; others wait.

    Raises:
        ValueError: there is no such file, or it was compiled for another machine or version of PyTorch.
    """

    def __init__(self, path: str, threads: int = 4) -> None:
        if not isfile(path):
            raise ValueError(f"{path} is missing; compile it by {AGAIN}, or score without by compiled=False")
        _check_machine(path)
        # not load_package, which asks for a C++ compiler to compare processors by
        self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(local_copy(path), "model", False, threads, -1)
        self._kept: dict[str, Tensor] = {}

    def __call__(self, *flat: Tensor) -> Tensor:
        """See :class:`FlatModel`."""
        logits: Tensor = self._loader.run(list(flat))[0]
        return logits

    def share_tables(self, tables: dict[str, Tensor]) -> None:
        """Has the package read these tensors, by their names in :class:`ServingModel`, as they change from now on."""
        own = set(self._loader.get_constant_fqns())
        named = {f"model.{name}": table for name, table in tables.items()}
        missing = sorted(set(named) - own)
        if missing:
            raise ValueError(
                f"the package has no table {missing[0].removeprefix('model.')}; compile it anew by --again"
            )
        self._kept = named
        use_inactive, check_full_update, user_managed = False, False, True
        self._loader.load_constants(named, use_inactive, check_full_update, user_managed)
