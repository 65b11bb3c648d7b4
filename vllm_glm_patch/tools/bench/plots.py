"""The pictures of a report: ratio bars, and latency over load."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Optional

from ...errors import UserError
from .plan import PATCHED, UPSTREAM
from .result import label_of

RATIOS = ("output_throughput", "input_throughput", "median_ttft_ms", "median_tpot_ms")
NAMES = {
    "request_throughput": "requests/s",
    "input_throughput": "prefill tokens/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
    "startup_s": "start-up, s",
    "kv_cache_tokens": "KV cache, tokens",
    "peak_memory_mib": "peak memory, MiB",
}
_COLOURS = {UPSTREAM: "#8a8f98", PATCHED: "#0b6bcb"}
_WIDTHS = {UPSTREAM: 3.5, PATCHED: 1.5}  # so that neither hides the other where they are alike
VERDICTS = {"better": "#2e8b57", "worse": "#c0392b", "": "#9aa5b1"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "svg.fonttype": "none"}


def name_of(metric: str) -> str:
    """A metric for people: ``TTFT, median, ms``."""
    if metric in NAMES:
        return NAMES[metric]
    statistic, latency, unit = metric.split("_")
    return f"{latency.upper()}, {statistic}, {unit}"


def more_is_better(metric: str) -> bool:
    """Whether a higher value of this metric is the better one."""
    return metric.endswith("throughput") or metric == "kv_cache_tokens"


def verdict(row: Mapping[str, Any]) -> str:
    """``better`` or ``worse``; empty where the runs do not tell: one run a side, or a spread that goes over 1.

    Rows of the MoE layer have no metric: their ratio is upstream ÷ ours, and their spread is over rounds.
    """
    few = "upstream_runs" in row and min(row["upstream_runs"], row["patched_runs"]) < 2
    if few or row["ratio_low"] <= 1 <= row["ratio_high"]:
        return ""
    return "better" if (row["ratio"] > 1) == more_is_better(row.get("metric", "throughput")) else "worse"


def ratio_bars(result: dict[str, Any]) -> Optional[bytes]:
    """PNG: patched ÷ upstream for each case, with the spread over the runs. None where nothing can be compared."""
    rows = [row for row in result["rows"] if row["metric"] in RATIOS and row["ratio"]]
    if not rows:
        return None
    plt = pyplot()
    labels = list(dict.fromkeys(map(label_of, rows)))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(RATIOS), figsize=(11, 1.3 + 0.32 * len(labels)), sharey=True, layout="constrained", squeeze=False
        )
        for panel, metric in zip(panels[0], RATIOS):
            mine = {label_of(row): row for row in rows if row["metric"] == metric}
            for place, label in enumerate(labels):
                if label in mine:
                    _bar(panel, place, mine[label])
            panel.axvline(1, color="black", linewidth=0.8)
            panel.locator_params(axis="x", nbins=4)
            panel.set_yticks(range(len(labels)), labels)
            panel.set_ylim(len(labels) - 0.4, -0.6)
            panel.set_xlim(0, 1.25 * max([1.0, *(row["ratio_high"] for row in mine.values())]))
            panel.set_title(f"{name_of(metric)}\n({'more' if more_is_better(metric) else 'less'} is better)")
        figure.supxlabel("patched ÷ upstream; the thin line is the spread over the runs", fontsize=9)
        return png(plt, figure)


def _bar(panel: Any, place: int, row: dict[str, Any]) -> None:
    ratio, low, high = row["ratio"], row["ratio_low"], row["ratio_high"]
    panel.barh(place, ratio, height=0.62, color=VERDICTS[verdict(row)])
    panel.plot([low, high], [place, place], color="black", linewidth=1)
    panel.annotate(
        f"{ratio:.2f}", (max(ratio, high), place), xytext=(3, 0), textcoords="offset points", va="center", annotation_clip=False
    )


def latency_curves(result: dict[str, Any]) -> dict[str, bytes]:
    """PNG by case: TTFT and TPOT over the load, for the cases that have two loads or more."""
    curves = {}
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        for load, title in (("request_rate", "requests a second"), ("concurrency", "concurrent requests")):
            rows = [row for row in result["rows"] if row["case"] == case and row[load]]
            if len({row[load] for row in rows}) >= 2:
                curves[case] = _curves(rows, case, load, title)
                break
    return curves


def _curves(rows: list[dict[str, Any]], case: str, load: str, title: str) -> bytes:
    plt = pyplot()
    with plt.rc_context(STYLE):
        there = [name for name in ("ttft", "tpot") if any(row["metric"].endswith(f"_{name}_ms") for row in rows)]
        figure, grid = plt.subplots(
            1, max(1, len(there)), figsize=(4.5 * max(1, len(there)), 3.2), layout="constrained", squeeze=False
        )
        panels = grid[0]
        for panel, latency in zip(panels, there):
            for side in (UPSTREAM, PATCHED):
                for statistic, line in (("median", "-"), ("p99", ":")):
                    metric = f"{statistic}_{latency}_ms"
                    points = sorted((r[load], r[side]) for r in rows if r["metric"] == metric and r[side] is not None)
                    if points:
                        x, y = zip(*points)
                        look = {"color": _COLOURS[side], "linewidth": _WIDTHS[side], "label": f"{side}, {statistic}"}
                        panel.plot(x, y, line, marker="o", markersize=4, **look)
            loads = sorted({row[load] for row in rows})
            panel.set_xscale("log" if loads[-1] >= 8 * loads[0] else "linear")
            panel.set_xticks(loads, [f"{value:g}" for value in loads])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel(title)
            panel.set_ylabel(f"{latency.upper()}, ms")
        panels[0].legend(frameon=False, fontsize=8)
        figure.suptitle(case, fontsize=10)
        return png(plt, figure)


def png(plt: Any, figure: Any) -> bytes:
    """The figure as PNG; it is closed."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    plt.close(figure)
    return drawn.getvalue()


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into memory.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("`bench report` needs matplotlib, which is not installed. Run: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
