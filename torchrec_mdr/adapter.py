"""Adapters as files: `python -m torchrec_mdr.adapter export | put | rollback | remove | pin | list | verify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from torchrec_mdr.inference import Scorer, read_adapter
from torchrec_mdr.inference.bundle import Manifest, wrong_files
from torchrec_mdr.inference.hand_over import adapter_of_run
from torchrec_mdr.inference.store import AdapterStore, as_list
from torchrec_mdr.storage import located, write_bytes
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    read = _parser().parse_args(arguments)
    chosen: str = read.subcommand
    own = read[chosen]
    for name in {"bundle", "output"} & set(vars(own)):
        own[name] = located(own[name])
    return int(globals()[f"_{chosen}"](own))


def _parser() -> SentenceParser:
    parser = SentenceParser(prog="python -m torchrec_mdr.adapter", description="Adapters as files, and a bundle's.")
    commands = parser.add_subcommands()
    for name, (argument, text) in {
        "export": (None, "take one domain's adapter out of a run"),
        "put": ("file", "have an adapter file serve its domain from now on"),
        "rollback": ("domain", "have the version before serve again"),
        "remove": ("domain", "make a domain unknown; its rows are the backbone's"),
        "pin": ("domain", "keep a domain's adapter in memory"),
        "list": (None, "what serves"),
        "verify": (None, "whether files and weights are what they were, and the golden rows get their logits"),
    }.items():
        own = SentenceParser(description=text)
        if argument is not None:
            own.add_argument(argument)
        if name == "export":
            own.add_argument("--run", required=True, help="the --output_dir of a finished run")
            own.add_argument("--domain", required=True, help="its name")
            own.add_argument("--output", required=True, help="the file")
        else:
            own.add_argument("--bundle", required=True, help="the bundle's folder")
        if name in ("export", "rollback", "remove", "pin"):
            own.add_argument("--division", type=str | None, help="of the domain; the natural one by default")
        if name == "pin":
            own.add_argument("--pinned", type=bool, default=True, help="false: not any more")
        commands.add_subcommand(name, own, help=text)
    return parser


def _export(read: Any) -> int:
    adapter = adapter_of_run(read.run, read.domain, read.division)
    write_bytes(read.output, adapter.to_bytes())
    print(read.output)
    return 0


def _put(read: Any) -> int:
    adapter = read_adapter(read.file)
    Manifest.load(read.bundle).check_adapter(adapter, read.file)
    version = AdapterStore(read.bundle).put(adapter)
    print(f"{adapter.info.division}: domain '{adapter.info.domain}' is served by version {version}")
    return 0


def _rollback(read: Any) -> int:
    division = _division(read)
    version = AdapterStore(read.bundle).rollback(division, read.domain)
    print(f"{division}: domain '{read.domain}' is served by version {version}")
    return 0


def _remove(read: Any) -> int:
    division = _division(read)
    AdapterStore(read.bundle).remove(division, read.domain)
    print(f"{division}: domain '{read.domain}' is unknown")
    return 0


def _pin(read: Any) -> int:
    division = _division(read)
    AdapterStore(read.bundle).pin(division, read.domain, read.pinned)
    print(f"{division}: domain '{read.domain}' is {'kept in memory' if read.pinned else 'in memory as it is used'}")
    return 0


def _list(read: Any) -> int:
    Manifest.load(read.bundle)
    print(tabulate(as_list(AdapterStore(read.bundle).current()), headers="keys"))
    return 0


def _verify(read: Any) -> int:
    wrong = [*wrong_files(read.bundle), *AdapterStore(read.bundle).verify()]
    if wrong:
        raise ValueError("; ".join(wrong))
    Scorer(read.bundle)
    print(f"{read.bundle} is whole")
    return 0


def _division(read: Any) -> str:
    manifest = Manifest.load(read.bundle)
    return manifest.divisions[manifest.division_of(read.division)].name


if __name__ == "__main__":
    sys.exit(main())
