"""The part of a report that is about `bench kernel`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from . import html, plots_kernel
from .kernel_failure import beginning
from .kernel_upstream import NAMES

EXPLANATION = (
    "The MoE layer: the ratio is the time of the best of upstream's backends ÷ ours, so above 1 ours is faster, with its "
    "spread over the rounds behind it; the floor is what the card, as measured in the same run, cannot go below. Errors are "
    "relative, against float64."
)


def overview(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The ratios and times of all results side by side."""
    rows_of_all = [row for _, result in results for row in result["rows"]]
    shapes = list(dict.fromkeys(map(plots_kernel.kind_of, rows_of_all)))
    keys = {(plots_kernel.kind_of(row), row["tokens"]) for row in rows_of_all}
    by_result = [{(plots_kernel.kind_of(row), row["tokens"]): row for row in result["rows"]} for _, result in results]
    head = ["shape", "tokens", *(f"{name}: {what}" for name, _ in results for what in ("ours, µs", "ratio"))]
    body = []
    for shape, tokens in sorted(keys, key=lambda key: (shapes.index(key[0]), key[1])):
        cells = [html.cell(shape), html.number_cell(f"{tokens:,}")]
        for rows in by_result:
            row = rows.get((shape, tokens))
            cells += [html.number(row["ours_us"] if row else None), html.ratio(row)]
        body.append(cells)
    return f"<h2>The MoE layer: all results</h2>{html.images(pictures_of_all(results))}{html.table(head, body, texts=1)}"


def pictures_of_all(results: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, bytes]:
    """PNG by title."""
    drawn = plots_kernel.ratios_of_all(results)
    return {"kernel-all": drawn} if drawn else {}


def pictures(result: dict[str, Any]) -> dict[str, bytes]:
    """PNG by title."""
    bars = plots_kernel.ratio_bars(result)
    times = {f"kernel-{shape}": png for shape, png in plots_kernel.times(result).items()}
    return {**times, **({"kernel-ratios": bars} if bars else {})}


def section(name: str, result: dict[str, Any], drawn: dict[str, bytes]) -> str:
    """Everything about one result."""
    return (
        f"<h2>The MoE layer: {escape(name)}</h2>{html.findings(result)}{html.images(drawn)}"
        f"<h3>Times</h3>{_rows(result['rows'])}{_missing(result)}{_checks(result)}"
        f"<h3>Machine and plan</h3>{_facts(result)}"
    )


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    head = ["shape", "backend", "tokens", "ours, µs", *(f"{name.replace('_', ', ')}, µs" for name in NAMES)]
    head += ["floor, µs", "ours ÷ floor", "ratio (spread)", "error", "upstream's", "workspace, MB"]
    body = [
        [
            html.cell(row["shape"]),
            html.cell(row["backend"]),
            html.number_cell(f"{row['tokens']:,}"),
            *(html.number(row[f"{which}_us"]) for which in ("ours", *NAMES)),
            html.number_cell(f"{row['floor_us']:.4g} ({row['floor_by']})"),
            html.number(row["ours_us"] / row["floor_us"] if row["ours_us"] and row["floor_us"] else None),
            html.ratio(row),
            *(html.number(row[which]) for which in ("error", "upstream_error", "workspace_mb")),
        ]
        for row in rows
    ]
    return html.table(head, body, texts=2)


def _missing(result: dict[str, Any]) -> str:
    """Why a number is not there, once for each reason."""
    counts: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, why in row["failed"].items():
            counts.setdefault(f"{name}: {beginning(why)}", []).append(f"{row['shape']} {row['tokens']}")
    return "".join(html.note(f"{text} ({', '.join(where)})") for text, where in counts.items())


def _checks(result: dict[str, Any]) -> str:
    checks = result["checks"]
    if not checks:
        return html.note("Not checked against float64 in this run.")
    good = sum(found["good"] for found in checks)
    worst = max((found["error"] for found in checks if found["error"] is not None), default=0.0)
    return html.note(f"{good} of {len(checks)} checks against float64 are good; the largest error is {worst:.4f}.")


def _facts(result: dict[str, Any]) -> str:
    plan, roofline = result["plan"], result["roofline"]
    known = {
        **result["machine"],
        "ceilings": f"copy {roofline['copy_tb_s']} TB/s, read {roofline['read_tb_s']} TB/s, "
        f"dense FP8 {roofline['fp8_tf_s']} TF/s, measured in this run",
        "method": f"{plan['method']} {plan['rounds']} rounds of {plan['replays']} replays, seed {plan['seed']}.",
        "L2 cache": plan["l2"],
        "measured": f"{result['started']} to {result['finished'] or 'not finished'}",
    }
    return html.facts(known)
