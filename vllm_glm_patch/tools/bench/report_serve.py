"""The part of a report that is about `bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from . import html, plots
from .result import label_of

SHORT = (
    *("request_throughput", "input_throughput", "output_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms"),
)
EXPLANATION = (
    "Serving: each value is the median over the runs. The ratio is patched ÷ upstream, with the lowest and highest ratio that "
    "any two runs give behind it. Green is better and red is worse. A ratio whose spread goes over 1, or of a single run a "
    "side, has no colour: these runs do not tell the two apart."
)


def overview(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The ratios of all results side by side."""
    keys = dict.fromkeys(
        (label_of(row), row["metric"]) for _, result in results for row in result["rows"] if row["metric"] in plots.RATIOS
    )
    by_result = [{(label_of(row), row["metric"]): row for row in result["rows"]} for _, result in results]
    head = ["case", "metric", *(f"{name}: ratio" for name, _ in results)]
    body = []
    before = ""
    for label, metric in keys:
        ratios = [html.ratio(rows.get((label, metric))) for rows in by_result]
        body.append([html.cell("" if label == before else label), html.cell(plots.name_of(metric)), *ratios])
        before = label
    return f"<h2>Serving: all results</h2>{html.table(head, body, texts=2)}"


def pictures(result: dict[str, Any]) -> dict[str, bytes]:
    """PNG by title."""
    bars = plots.ratio_bars(result)
    return {**({"ratios": bars} if bars else {}), **plots.latency_curves(result)}


def section(name: str, result: dict[str, Any], drawn: dict[str, bytes]) -> str:
    """Everything about one result."""
    short = [row for row in result["rows"] if row["metric"] in SHORT]
    servers = [row for row in result["rows"] if row["case"] == "server"]
    return (
        f"<h2>Serving: {escape(name)}</h2>{html.findings(result)}{html.images(drawn)}"
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
                html.cell("" if label == before else label),
                html.cell(plots.name_of(row["metric"])),
                *(html.number(row[side]) for side in ("upstream", "patched")),
                html.ratio(row),
                html.number_cell(runs),
            ]
        )
        before = label
    return html.table(["case", "metric", "upstream", "patched", "ratio (spread)", "runs"], body, texts=2)


def _memory(result: dict[str, Any]) -> str:
    sources = sorted({server["memory_source"] for server in result["servers"]})
    return html.note(f"Memory as {' and '.join(sources)} tells.") if sources else ""


def _facts(result: dict[str, Any]) -> str:
    plan = result["plan"]
    flags = dict.fromkeys(" ".join(point["flags"]) for point in plan["points"])
    known = {
        **result["machine"],
        "model": plan["model"],
        "vllm serve": " ".join(plan["serve_flags"]) or "no flags",
        "vllm bench serve": " | ".join(filter(None, flags)) or "no flags",
        "order": f"{plan['order']}, {plan['repeats']} measured runs a server and load, {plan['warmups']} to warm up "
        f"each {plan['warm_each']}",
        **({"groups of cards": ", then swapped, ".join(plan["groups"])} if plan["groups"] else {}),
        **({"time limit": f"{plan['minutes']:g} min"} if plan["minutes"] else {}),
        "measured": f"{result['started']} to {result['finished'] or 'not finished'}",
    }
    return html.facts(known)
