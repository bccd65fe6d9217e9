"""Whether a run's files are what was written: `python -m torchrec_mdr.verify RUN`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from torchrec_mdr.distributed.checkpoint_writer import WRITING
from torchrec_mdr.storage import DIGESTS_FILE, damaged_files, is_store, isdir, isfile, located, ls, read_digests
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each file that is not what was written; returns 1 where there is one, 0 where all are right.

    Files of folders without digests, which older versions wrote, are named as not checked and do not count; nor do
    checkpoints in a store whose writing was cut off.
    """
    parser = SentenceParser(prog="python -m torchrec_mdr.verify", description="Checks a run's files by their digests.")
    parser.add_argument("run", help="the --output_dir of a run, or one checkpoint's folder")
    run = located(parser.parse_args(arguments).run)
    folders = list(_folders(run))
    if not folders:
        raise ValueError(f"{run} is no run, and no checkpoint of one; name the --output_dir of a run")
    wrong, checked = 0, 0
    for folder in folders:
        try:
            digests = read_digests(folder)
            if digests is None:
                cut_off = is_store(folder) and not isfile(os.path.join(folder, "config.yaml"))
                note = "it is half-written, and does not count" if cut_off else "not checked"
                print(f"{folder} has no {DIGESTS_FILE}: {note}", file=sys.stderr)
                continue
            found = damaged_files(folder, digests, sorted(digests))
        except ValueError as error:
            digests, found = {DIGESTS_FILE: ""}, [str(error)]
        for sentence in found:
            print(sentence)
        wrong += len(found)
        checked += len(digests)
    print(f"{checked - wrong} of {checked} files are what was written", file=sys.stderr)
    return 1 if wrong else 0


def _folders(run: str) -> Iterator[str]:
    """The folders below a run's, and itself, that keep digests or should."""
    names = ls(run)
    marks = {DIGESTS_FILE, "config.yaml", "stage.json", ".metadata"} & set(names)
    if marks or any(name.endswith(".distcp") for name in names):
        yield run
    for name in names:
        path = os.path.join(run, name)
        if not name.endswith(WRITING) and name not in marks and isdir(path):
            yield from _folders(path)


if __name__ == "__main__":
    sys.exit(main())
