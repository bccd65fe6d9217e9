"""A plain backbone for one domain: `python -m torchrec_mdr.merge --run RUN --domain NAME --output FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from torchrec_mdr.inference import load_run, merge
from torchrec_mdr.storage import located, open_write
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.merge",
        description="Writes the state_dict of the backbone with one domain's adapters in its weights.",
    )
    parser.add_argument("--run", required=True, help="the --output_dir of a finished run")
    parser.add_argument(
        "--domain", required=True, type=str | list[str], help="a name, or a list of one name of each division"
    )
    parser.add_argument("--output", required=True, help="the file, which --init_checkpoint takes")
    read = parser.parse_args(arguments)
    output = located(read.output)
    domains = [read.domain] if isinstance(read.domain, str) else read.domain
    plain = merge(load_run(read.run, only=domains[:1]).model, domains)
    with open_write(output) as file:
        torch.save(plain.state_dict(), file)
    print(read.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
