"""Sphinx configuration: pages in Markdown, API pages from docstrings. Built by `make docs`."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings of this tree, whatever is installed

from torchrec_mdr import __version__  # noqa: E402

project = "torchrec_mdr"
author = "the torchrec_mdr authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"torchrec_mdr {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give the types, with shapes
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_PLURAL = re.compile(r"((?<![`\w])`[^`]+`)(?=\w)")
_COLON = "\ue000"  # in place of a colon that napoleon would take for the end of a type


def _names() -> set[str]:
    """Names that docstrings may mention without a page of their own: defined in the package, or imported into it."""
    names: set[str] = set()
    for path in (ROOT / "torchrec_mdr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names | {"DataFrame", "torch", "torchrec"}


def _missing_reference(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Shows a known name without a page as it is; any other is a broken reference, and a warning."""
    parts = node.get("reftarget", "").split(".")
    known = env.torchrec_mdr_names
    return contnode if node.get("refdomain") == "py" and (parts[0] in known or parts[-1] in known) else None


def _hide_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "property"):
        lines[:] = [line.replace(":", _COLON) for line in lines]


def _show_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # and lets `names`s be written, which reStructuredText allows with a backslash only
    lines[:] = [_PLURAL.sub(r"\1\\ ", line.replace(_COLON, ":")) for line in lines]


def setup(app: Any) -> None:
    """Connects what is said above."""
    app.connect("env-before-read-docs", lambda app, env, names: setattr(env, "torchrec_mdr_names", _names()))
    app.connect("missing-reference", _missing_reference)
    app.connect("autodoc-process-docstring", _hide_colons, priority=100)  # napoleon's is 500
    app.connect("autodoc-process-docstring", _show_colons, priority=900)
