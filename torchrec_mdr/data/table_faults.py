"""Says where a text file of rows is faulty, and how to mend it."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from torchrec_mdr.data.table_files import kind_of

UTF16 = (b"\xff\xfe", b"\xfe\xff")
DAMAGED = (OSError, EOFError, zlib.error)  # what a file, or a packed one, raises where it cannot be read
_CHUNK = 1 << 20


def fault_of(local: str, path: str, separator: str | None) -> str | None:
    """What is wrong with a file, in a sentence without its end; None where it is nothing that is known here.

    Args:
        local (str): the file, or its copy on this machine's disk.
        path (str): its name for the message.
        separator (str | None): between two fields, of CSV.
    """
    kind = kind_of(path)
    if kind not in ("csv", "json"):
        return None
    try:
        for line, problem in _faults(local, kind, separator):
            return f"{path}, line {line}: {problem}; correct it"
    except UnicodeDecodeError as error:
        if not _is_whole(local):
            return None  # bytes that come out of a damaged archive say nothing
        form = "utf-16" if _begins(local) in UTF16 else "latin1"
        convert = f"iconv -f {form} -t utf-8"
        how = f"zcat {path} | {convert}" if _is_gz(local) else f"{convert} {path}"
        byte = error.object[error.start]
        return f"{path} is not in UTF-8 (byte 0x{byte:02x}); convert it, as by {how}, or leave it out"
    except (*DAMAGED, csv.Error):
        pass  # the file cannot be read this way either
    return None


@contextmanager
def opened(local: str, errors: str = "strict") -> Iterator[TextIO]:
    """A file as text, plain or gz, without the mark that some programs set before it; `errors` as in `open`."""
    opener = gzip.open if _is_gz(local) else open
    with opener(local, "rt", encoding="utf-8-sig", errors=errors, newline="") as file:
        yield file


def _faults(local: str, kind: str, separator: str | None) -> Iterator[tuple[int, str]]:
    with opened(local) as file:
        if kind == "csv":
            rows = csv.reader(file, delimiter=separator or ",", strict=True)
            width, begin = len(next(rows, [])), 2
            try:
                for row in rows:
                    if len(row) > width:
                        yield rows.line_num, f"{len(row)} fields where {width} are expected"
                    begin = rows.line_num + 1
            except csv.Error as error:
                if "end of data" in str(error):
                    yield begin, "a quote begins in this row and does not end"
            return
        for number, line in enumerate(file, 1):
            if line.strip() and not _is_object(line):
                array = " (of an array, jq -c '.[]' makes such lines)" if line.lstrip().startswith("[") else ""
                yield number, f"a JSON object is expected in each line{array}, and this is none"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_gz(local: str) -> bool:
    return local.lower().endswith(".gz")


def _is_whole(local: str) -> bool:
    """Whether a file can be unpacked to its end, where it is packed."""
    if _is_gz(local):
        try:
            with gzip.open(local, "rb") as file:
                while file.read(_CHUNK):
                    pass
        except DAMAGED:
            return False
    return True


def _begins(local: str) -> bytes:
    opener = gzip.open if _is_gz(local) else open
    with opener(local, "rb") as file:
        return bytes(file.read(2))
