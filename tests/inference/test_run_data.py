"""Training rows counted for a bundle, in whatever files they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_mdr.data.schema import Division, domain_column
from torchrec_mdr.inference import run_data

ROWS = pa.table({domain_column("shop"): [0, 2, 2, 2, 0], "item": [3, 4, 4, 5, 3], "tags": [[1], [], [7, 8], [1], [2]]})


def write(folder: Path, form: str) -> None:
    folder.mkdir()
    if form == "arrow":
        with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, ROWS.schema) as writer:
            writer.write_table(ROWS, max_chunksize=2)
    elif form == "file":
        pq.write_table(ROWS, folder / "train.parquet", row_group_size=2)
    else:
        (folder / "train").mkdir()
        for part in range(2):
            pq.write_table(ROWS.slice(3 * part, 3), folder / "train" / f"{part}.parquet")


@pytest.mark.parametrize("form", ["file", "parts", "arrow", "gone"])
def test_training_rows_are_counted(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form != "gone":
        write(tmp_path / "data", form)
    monkeypatch.setattr(run_data, "data_of", lambda run: SimpleNamespace(folder=str(tmp_path / "data")))
    rows = run_data.TrainingRows(cast(Any, SimpleNamespace(divisions=(Division("shop", 3),))))
    known = form != "gone"
    assert rows.per_domain(0) == ({0: 2, 2: 3} if known else None)
    found = [rows.has_id(*asked) for asked in (("item", 5), ("item", 6), ("tags", 8), ("tags", 9))]
    assert found == ([True, False, True, False] if known else [True] * 4)
