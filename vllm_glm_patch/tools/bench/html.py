"""The pieces of HTML that reports are made of: the page, tables, cells and pictures; nothing in them needs a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Optional

from .plots import verdict

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #d8dde3; padding-top: 1.2rem }
h3 { font-size: 1rem; margin-bottom: .3rem } img { max-width: 100%; display: block; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th { text-align: left; background: #f3f5f7; font-weight: 600 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e8ec; white-space: nowrap }
td.n, th.n { text-align: right } .better { color: #1e7145; font-weight: 600 } .worse { color: #b03020; font-weight: 600 }
.note { color: #59636e } .finding { background: #fdf3e1; border-left: 4px solid #e0a030; padding: .4rem .8rem; margin: .4rem 0 }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: .87rem } dt { color: #59636e }
dd { margin: 0; overflow-wrap: anywhere } summary { cursor: pointer; margin: .8rem 0 }
"""


def page(title: str, body: str) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>vllm-glm-patch bench</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{escape(text)}</p>\n'


def findings(result: Mapping[str, Any]) -> str:
    """What went wrong, and whether all of it was measured."""
    texts = [*([] if result["complete"] else ["This measurement was ended before it was complete."]), *result["findings"]]
    return "".join(f'<p class="finding">{escape(text)}</p>' for text in texts)


def images(pictures: Mapping[str, bytes]) -> str:
    """PNG pictures by title, inside the page."""
    return "".join(
        f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in pictures.items()
    )


def facts(known: Mapping[str, object]) -> str:
    """A list of names and values."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in known.items())}</dl>"


def table(head: Sequence[str], body: Sequence[Sequence[str]], texts: int) -> str:
    """Rows of cells; the first `texts` columns are text, the others numbers."""
    titles = "".join(f'<th class="{"" if i < texts else "n"}">{escape(title)}</th>' for i, title in enumerate(head))
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def cell(text: str) -> str:
    """A cell of text."""
    return f"<td>{escape(text)}</td>"


def number_cell(text: str, kind: str = "") -> str:
    """A cell of a number that is written out already."""
    return f'<td class="n {kind}">{escape(text)}</td>'


def number(value: Optional[float]) -> str:
    """A cell of a number."""
    return number_cell("–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")


def ratio(row: Optional[Mapping[str, Any]]) -> str:
    """A cell of a row's ratio with its spread, in the colour of its verdict."""
    if row is None or row["ratio"] is None:
        return number_cell("–")
    return number_cell(f"{row['ratio']:.3f} ({row['ratio_low']:.3f} – {row['ratio_high']:.3f})", verdict(row))
