"""A comparison as one page that needs nothing beside itself."""

from __future__ import annotations

from base64 import b64encode
from html import escape

from torchrec_mdr.compare.plots import WIDTH, draw_cost, draw_domains
from torchrec_mdr.compare.tables import Comparison, Group, Table, group_tables, overview_tables

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 1400px; margin: 0 auto;
       padding: 1.5rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } h3 { margin: 1.5rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { background: #f4f5f7; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:first-child { background: #f4f5f7; }
td.text { white-space: normal; min-width: 34rem; text-align: left; }
.note { color: #555; font-size: 13px; max-width: 60rem; margin: .4rem 0; }
img { max-width: 100%; height: auto; }
nav a { display: inline-block; margin: 0 1rem .2rem 0; }
pre { background: #f4f5f7; padding: .8rem; overflow-x: auto; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
"""
_LONG = 40  # characters of a cell that is broken into lines


def page(comparison: Comparison) -> str:
    """The page.

    Args:
        comparison (Comparison): what it shows.

    Returns:
        str: HTML with its styles and pictures inside.
    """
    title = escape(comparison.title)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in comparison.remarks)
    links = "".join(f'<a href="#group{n}">{escape(g.name)}</a>' for n, g in enumerate(comparison.groups))
    groups = "".join(_group(group, number) for number, group in enumerate(comparison.groups))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in comparison.facts)
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(comparison.progress)}</p>",
        f"<ul>{remarks}</ul>" if remarks else "",
        f"<nav>{links}</nav>" if len(comparison.groups) > 1 else "",
        "".join(_table(table) for table in overview_tables(comparison.groups)),
        groups,
        f"<h2>How this was made</h2><dl>{facts}</dl>",
        f"<h3>The grid file</h3><pre>{escape(comparison.grid)}</pre>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _group(group: Group, number: int) -> str:
    quality, *others = group_tables(group)
    name = escape(group.name)
    return "\n".join(
        [
            f'<h2 id="group{number}">{name}</h2>',
            _table(quality),
            _picture(draw_domains(group), f"Test AUC by domain and variant, {name}"),
            *(_table(table) for table in others),
            _picture(draw_cost(group), f"Total AUC against trained parameters, {name}"),
        ]
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    lines = "".join(f"<tr>{''.join(_cell(cell) for cell in line)}</tr>\n" for line in table.lines)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>{note}\n"
    )


def _cell(text: str) -> str:
    start = '<td class="text">' if len(text) > _LONG else "<td>"
    return f"{start}{escape(text)}</td>"


def _picture(png: bytes | None, description: str) -> str:
    if png is None:
        return ""
    data = b64encode(png).decode()
    return f'<p><img src="data:image/png;base64,{data}" width="{round(WIDTH * 100)}" alt="{description}"></p>'
