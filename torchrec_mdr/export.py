"""Makes a bundle that serves: `python -m torchrec_mdr.export --run RUN --output BUNDLE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torchrec_mdr.inference import export, export_again
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence, quiet_libraries


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.export",
        description="Makes a bundle of a run: weights, adapters, and a compiled package that runs without Python.",
    )
    parser.add_argument("--run", type=str | None, help="the --output_dir of a finished run")
    parser.add_argument("--output", required=True, help="the bundle: a new folder, or with --again one that is there")
    parser.add_argument("--again", action="store_true", help="compile the bundle anew, for this machine")
    parser.add_argument("--calibrate", action="store_true", help="calibrate each domain on validation rows")
    parser.add_argument("--int8", action="store_true", help="one byte a number in embedding tables")
    parser.add_argument("--adapter_dtype", default="float32", help="float32 or bfloat16, of low-rank adapters")
    parser.add_argument("--resident", type=int | None, help="most adapters of a division in memory at a time")
    parser.add_argument("--eager", action="store_true", help="no compiled package: Python scores, slower")
    read = parser.parse_args(arguments)
    if read.again == (read.run is not None):
        raise ValueError("give --run, the run to make a bundle of, or --again, to compile a bundle anew")
    with quiet_libraries():
        if read.again:
            export_again(read.output)
        else:
            options = {name: read[name] for name in ("calibrate", "int8", "adapter_dtype", "resident")}
            export(read.run, read.output, compiled=not read.eager, **options)
    print(read.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
