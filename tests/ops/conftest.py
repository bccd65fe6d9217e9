"""The engines that products are computed by."""

from __future__ import annotations

import pytest
import torch

from torchrec_mdr.ops import cpu_kernels as rows
from torchrec_mdr.ops import products as kernels

ENGINES = ("rows-64", "rows-32", "rows-16", "groups", "tiles")
# where the width of vectors cannot matter
each_kind_of_engine = pytest.mark.parametrize("engine", ["rows-64", "groups", "tiles"], indirect=True)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets one engine do what it can: compiled code over rows, by the bytes of its vectors; grouped_mm; tiles."""
    name, _, width = request.param.partition("-")
    if name == "rows":
        if not rows.is_supported(torch.empty(1)):
            pytest.skip("the compiled kernels are missing: run make setup with a C++ compiler")
        monkeypatch.setattr(rows, "VECTOR_BYTES", int(width))
    else:
        monkeypatch.setattr(rows, "is_supported", lambda x: False)
    if name == "tiles":
        monkeypatch.setattr(kernels, "grouped_mm_supports", lambda x: False)
    return str(request.param)
