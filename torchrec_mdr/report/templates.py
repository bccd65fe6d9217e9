"""The templates of pages."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def templates(*rooms: str) -> Environment:
    """The templates of some rooms of the package; a value that is missing is an error.

    Args:
        *rooms (str): folders of the package, looked through in this order.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader("torchrec_mdr", room) for room in rooms]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
