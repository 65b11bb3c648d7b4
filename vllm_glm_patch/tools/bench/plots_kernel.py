"""The pictures of the MoE layer: its time against tokens with the floor under it, and its ratio to upstream's best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from .kernel import AUTO
from .kernel_upstream import NAMES
from .plots import STYLE, VERDICTS, png, pyplot, verdict

_LOOKS = {
    "ours": {"color": "#0b6bcb", "linewidth": 2.2, "marker": "o", "label": "ours"},
    "cutlass": {"color": "#8a8f98", "linewidth": 1.4, "marker": "s", "label": "upstream, CUTLASS"},
    "triton": {"color": "#b07aa1", "linewidth": 1.4, "marker": "^", "label": "upstream, Triton"},
    "triton_tuned": {"color": "#e0a030", "linewidth": 1.4, "marker": "v", "label": "upstream, Triton with its H200 table"},
}
_COLOURS = ("#0b6bcb", "#e0a030", "#2e8b57", "#b07aa1", "#c0392b", "#59636e")


def kind_of(row: dict[str, Any]) -> str:
    """The shape, and the backend where one was asked for: rows of a kind belong to one line."""
    return str(row["shape"]) if row["asked"] == AUTO else f"{row['shape']}, {row['asked']}"


def times(result: dict[str, Any]) -> dict[str, bytes]:
    """PNG by kind: microseconds against tokens, both logarithmic, of all that was timed, and the floor."""
    drawn = {}
    for shape in dict.fromkeys(map(kind_of, result["rows"])):
        rows = sorted((row for row in result["rows"] if kind_of(row) == shape), key=lambda row: row["tokens"])
        if any(row["ours_us"] is not None for row in rows):
            drawn[shape] = _times(rows, shape, result["machine"])
    return drawn


def _times(rows: Sequence[dict[str, Any]], shape: str, machine: dict[str, str]) -> bytes:
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(9, 4.6), layout="constrained")
        counts = [row["tokens"] for row in rows]
        floors = [row["floor_us"] for row in rows]
        for name in (*NAMES, "ours"):
            points = [(row["tokens"], row[f"{name}_us"]) for row in rows if row[f"{name}_us"] is not None]
            if points:
                panel.plot(*zip(*points), markersize=4, **_LOOKS[name])
        panel.plot(counts, floors, color="black", linewidth=1, linestyle="--", label="floor of this card, as measured")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.fill_between(counts, low, floors, color="#eceff2", zorder=0)
        panel.set_ylim(low, high)
        panel.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45 if len(counts) > 10 else 0)
        panel.minorticks_off()
        steps = [base * 10**power for power in range(-1, 6) for base in (1, 2, 5)]
        panel.set_yticks([step for step in steps if low <= step <= high])
        panel.set_yticklabels([f"{step:g}" for step in steps if low <= step <= high])
        panel.grid(axis="y", color="#e4e8ec", linewidth=0.6)
        panel.set_xlabel("tokens")
        panel.set_ylabel("µs for the layer")
        panel.set_title(f"{shape}, vLLM {machine['vllm']}, {machine.get('card', machine['cpu'])}")
        panel.legend(frameon=False, fontsize=8)
        return png(plt, figure)


def ratio_bars(result: dict[str, Any]) -> Optional[bytes]:
    """PNG: best of upstream ÷ ours for each token count, a panel a shape. None where nothing can be compared."""
    rows = [row for row in result["rows"] if row["ratio"] is not None]
    if not rows:
        return None
    plt = pyplot()
    shapes = list(dict.fromkeys(map(kind_of, rows)))
    most = max(sum(kind_of(row) == shape for row in rows) for shape in shapes)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(shapes), figsize=(max(5.5, 2.6 * len(shapes)), 1.2 + 0.3 * most), layout="constrained", squeeze=False
        )
        for panel, shape in zip(panels[0], shapes):
            mine = sorted((row for row in rows if kind_of(row) == shape), key=lambda row: row["tokens"])
            for place, row in enumerate(mine):
                panel.barh(place, row["ratio"], height=0.62, color=VERDICTS[verdict(row)])
                panel.plot([row["ratio_low"], row["ratio_high"]], [place, place], color="black", linewidth=1)
                panel.annotate(
                    f"{row['ratio']:.2f}", (max(row["ratio"], row["ratio_high"]), place), xytext=(3, 0),
                    textcoords="offset points", va="center", annotation_clip=False,
                )  # fmt: skip
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set_yticks(range(len(mine)), [f"{row['tokens']:,}" for row in mine])
            panel.set_ylim(most - 0.4, -0.6)
            panel.set_xlim(0, 1.25 * max([1.0, *(row["ratio_high"] for row in mine)]))
            panel.set_title(shape)
        panels[0][0].set_ylabel("tokens")
        figure.supxlabel("best of upstream ÷ ours (more is better); the thin line is the spread over the rounds", fontsize=9)
        return png(plt, figure)


def ratios_of_all(results: Sequence[tuple[str, dict[str, Any]]]) -> Optional[bytes]:
    """PNG: the ratios of several results against tokens, a panel a shape. None where nothing can be compared."""
    shapes = list(dict.fromkeys(kind_of(row) for _, result in results for row in result["rows"] if row["ratio"]))
    if not shapes:
        return None
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(shapes), figsize=(max(8.0, 4.2 * len(shapes)), 3.6), layout="constrained", squeeze=False, sharey=True
        )
        for panel, shape in zip(panels[0], shapes):
            for number, (name, result) in enumerate(results):
                mine = sorted((r["tokens"], r["ratio"]) for r in result["rows"] if kind_of(r) == shape and r["ratio"])
                if mine:
                    panel.plot(*zip(*mine), marker="o", markersize=4, color=_COLOURS[number % len(_COLOURS)], label=name)
            panel.axhline(1, color="black", linewidth=0.8)
            counts = sorted({row["tokens"] for _, result in results for row in result["rows"] if kind_of(row) == shape})
            panel.set_xscale("log", base=2)
            panel.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45 if len(counts) > 6 else 0)
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel("tokens")
            panel.set_title(shape)
        panels[0][0].set_ylabel("best of upstream ÷ ours")
        panels[0][0].legend(frameon=False, fontsize=8)
        return png(plt, figure)
