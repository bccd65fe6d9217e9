"""The page about data before training: a file that needs nothing beside itself."""

from __future__ import annotations

import numpy as np

from torchrec_mdr.data.importing.listing import column_lines
from torchrec_mdr.data.importing.prepare import Imported
from torchrec_mdr.data.importing.summary import Table
from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.report.rule_of_thumb import rule_of_thumb
from torchrec_mdr.report.templates import templates
from torchrec_mdr.storage import write_text

PAGE_FILE = "report.html"


def write_page(imported: Imported) -> str:
    """Writes `report.html` into the prepared folder.

    Args:
        imported (Imported): a preparation with its summary.

    Returns:
        str: the file.
    """
    columns = Table("Columns", ["column", "kind", "becomes"], column_lines(imported.decision))
    page = (
        templates("report")
        .get_template("data_page.html.j2")
        .render(
            title=f"{imported.schema.dataset}: the data before training",
            warnings=imported.warnings,
            tables=[*imported.summary, columns],
            expectation=rule_of_thumb(_training_rows(imported.folder, imported.schema)),
        )
    )
    path = f"{imported.folder}/{PAGE_FILE}"
    write_text(path, page)
    return path


def _training_rows(folder: str, schema: Schema) -> list[int]:
    """Training rows of each domain of the first division."""
    division = schema.divisions[0]
    reader = SplitReader(folder, schema, "train", [division.name])
    counts = np.zeros(division.num_domains, dtype=np.int64)
    for ids in reader.all_domains(division.name):
        counts += np.bincount(ids, minlength=len(counts))
    return [int(count) for count in counts]
