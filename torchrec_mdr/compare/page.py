"""A comparison as one page that needs nothing beside itself."""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Callable
from typing import Any

from torchrec_mdr.compare.figures import Comparison, Group
from torchrec_mdr.compare.plots import WIDTH, draw_cost, draw_domains
from torchrec_mdr.compare.tables import group_tables, overview_tables
from torchrec_mdr.report.templates import templates

logger = logging.getLogger(__name__)

_TEMPLATES = templates("compare", "report")


def page(comparison: Comparison) -> str:
    """The page.

    Args:
        comparison (Comparison): what it shows.

    Returns:
        str: HTML with its styles and pictures inside.
    """
    return _TEMPLATES.get_template("page.html.j2").render(
        comparison=comparison,
        overview=overview_tables(comparison.groups),
        sections=[_section(group) for group in comparison.groups],
        width=round(WIDTH * 100),
    )


def _section(group: Group) -> dict[str, Any]:
    """A group's tables and pictures, as the template names them."""
    quality, *tables = group_tables(group)
    pictures = {"domains": _picture(draw_domains, group), "cost": _picture(draw_cost, group)}
    return {"name": group.name, "quality": quality, "tables": tables, **pictures}


def _picture(draw: Callable[[Group], bytes | None], group: Group) -> str | None:
    """A picture in base64; None where there is nothing to draw, or where drawing fails, which is a warning."""
    try:
        png = draw(group)
    except Exception as error:  # figures do not depend on their picture
        logger.warning("a picture of %s could not be drawn and is left out: %s", group.name, error)
        return None
    return None if png is None else b64encode(png).decode()
