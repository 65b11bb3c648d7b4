"""The report of one or several results: a page that needs no network, and the pictures in it as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import plots
from .result import label_of

SHORT = (
    *("request_throughput", "input_throughput", "output_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms"),
)
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
_EXPLANATION = (
    "Each value is the median over the runs. The ratio is patched ÷ upstream, with the lowest and highest ratio that any two "
    "runs give behind it. Green is better and red is worse. A ratio whose spread goes over 1, or of a single run a side, has "
    "no colour: these runs do not tell the two apart."
)


def write_report(results: Sequence[tuple[str, dict[str, Any]]], folder: Path) -> list[Path]:
    """Write report.html and the PNG files; the files that were written.

    Args:
        results: a name that tells them apart, and the result, for each.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    sections = []
    for number, (name, result) in enumerate(results, start=1):
        pictures = _pictures(result)
        for title, png in pictures.items():
            file = folder / f"{number}-{_file_name(title)}.png"
            file.write_bytes(png)
            written.append(file)
        sections.append(_section(name, result, pictures))
    overview = _overview(results) if len(results) > 1 else ""
    page = folder / "report.html"
    page.write_text(_page(overview + "".join(sections)), encoding="utf-8")
    return [page, *written]


def _pictures(result: dict[str, Any]) -> dict[str, bytes]:
    bars = plots.ratio_bars(result)
    return {**({"ratios": bars} if bars else {}), **plots.latency_curves(result)}


def _page(body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>vllm-glm-patch bench</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>Serving with the patches and without</h1>\n<p class="note">{_EXPLANATION}</p>\n{body}</body></html>\n'
    )


def _overview(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The ratios of all results side by side."""
    keys = dict.fromkeys(
        (label_of(row), row["metric"]) for _, result in results for row in result["rows"] if row["metric"] in plots.RATIOS
    )
    by_result = [{(label_of(row), row["metric"]): row for row in result["rows"]} for _, result in results]
    head = ["case", "metric", *(f"{name}: ratio" for name, _ in results)]
    body = []
    before = ""
    for label, metric in keys:
        ratios = [_ratio(rows.get((label, metric))) for rows in by_result]
        body.append([_cell("" if label == before else label), _cell(plots.name_of(metric)), *ratios])
        before = label
    return f"<h2>All results</h2>{_table(head, body, texts=2)}"


def _section(name: str, result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    incomplete = "" if result["complete"] else '<p class="finding">This measurement was ended before it was complete.</p>'
    findings = "".join(f'<p class="finding">{escape(text)}</p>' for text in result["findings"])
    drawn = "".join(
        f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in pictures.items()
    )
    short = [row for row in result["rows"] if row["metric"] in SHORT]
    servers = [row for row in result["rows"] if row["case"] == "server"]
    return (
        f"<h2>{escape(name)}</h2>{incomplete}{findings}{drawn}"
        f"<h3>Cases</h3>{_rows(short)}<h3>Servers</h3>{_rows(servers)}{_memory(result)}"
        f"<details><summary>All metrics</summary>{_rows(result['rows'])}</details>"
        f"<h3>Machine and plan</h3>{_facts(result)}"
    )


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    before = ""
    for row in rows:
        label = label_of(row)
        runs = f"{row['upstream_runs']} + {row['patched_runs']}"
        body.append(
            [
                _cell("" if label == before else label),
                _cell(plots.name_of(row["metric"])),
                *(_number(row[side]) for side in ("upstream", "patched")),
                _ratio(row),
                _number_cell(runs),
            ]
        )
        before = label
    return _table(["case", "metric", "upstream", "patched", "ratio (spread)", "runs"], body, texts=2)


def _memory(result: dict[str, Any]) -> str:
    sources = sorted({server["memory_source"] for server in result["servers"]})
    return f'<p class="note">Memory as {escape(" and ".join(sources))} tells.</p>' if sources else ""


def _facts(result: dict[str, Any]) -> str:
    plan = result["plan"]
    flags = dict.fromkeys(" ".join(point["flags"]) for point in plan["points"])
    facts = {
        **result["machine"],
        "model": plan["model"],
        "vllm serve": " ".join(plan["serve_flags"]) or "no flags",
        "vllm bench serve": " | ".join(filter(None, flags)) or "no flags",
        "order": f"{plan['order']}, {plan['repeats']} measured runs a server and case, {plan['warmups']} to warm up",
        "measured": f"{result['started']} to {result['finished'] or 'not finished'}",
    }
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in facts.items())}</dl>"


def _table(head: Sequence[str], body: Sequence[Sequence[str]], texts: int) -> str:
    titles = "".join(f'<th class="{"" if i < texts else "n"}">{escape(title)}</th>' for i, title in enumerate(head))
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _number_cell(text: str, kind: str = "") -> str:
    return f'<td class="n {kind}">{escape(text)}</td>'


def _number(value: float | None) -> str:
    return _number_cell("–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row["ratio"] is None:
        return _number_cell("–")
    return _number_cell(f"{row['ratio']:.3f} ({row['ratio_low']:.3f} – {row['ratio_high']:.3f})", plots.verdict(row))


def _file_name(title: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in title)
