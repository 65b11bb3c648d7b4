"""From a journal to what a person reads, what a program reads, and the exit code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Optional

from ...version import __version__
from ..output import Table
from .cases import Grid, Kernel, Unit
from .child import kernel_from
from .journal import ALL, ERROR, FAULT, OK, SKIPPED, WRONG, State

SCHEMA = "vllm-glm-patch verify 1"
INTERRUPTED = 130


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes:
        state: what the journal says.
        grid: what was to be covered.
        interrupted: Ctrl-C or SIGTERM ended it.
        seconds: that it took.
    """

    state: State
    grid: Grid
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel_from(row) for row in self.state.kernels]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a unit that was run, with the buffers it was traced to."""
        return [
            {
                **Unit.from_id(item.unit).__dict__,
                "outcome": row["outcome"],
                "error": row["error"],
                "limit": row["limit"],
                "text": row["text"],
                "step": row["step"],
                "buffers": self.state.culprits(item.unit),
                "traced": self.state.attributed(item.unit),
            }
            for item, row in self.state.rows.items()
            if item.guard == ALL
        ]

    @property
    def counting(self) -> set[tuple[str, str]]:
        """The kernels whose findings count: those this vLLM would run here."""
        return {(kernel.side, kernel.name) for kernel in self._wanted if not kernel.absent}

    @property
    def _wanted(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.counts and kernel.side in self.grid.sides]

    @property
    def _lacking(self) -> list[Kernel]:
        """Whole layers that should have been called and could not be: without them nothing is proved."""
        return [kernel for kernel in self._wanted if kernel.absent and kernel.name == "layer"]

    def of(self, *outcomes: str) -> list[dict[str, Any]]:
        """Rows of counting kernels with one of these outcomes."""
        return [row for row in self.rows if row["outcome"] in outcomes and (row["side"], row["kernel"]) in self.counting]

    @property
    def exit_code(self) -> int:
        """1: something that would run here is unsafe; 130: interrupted before that was known; 2: not all of what would
        run could be called, or nothing would; 0: all of it is safe."""
        if self.of(FAULT, WRONG):
            return 1
        if self.interrupted:
            return INTERRUPTED
        checked = {(row["side"], row["kernel"]) for row in self.of(OK)}
        complete = self.counting and checked == self.counting and not self._lacking and not self.of(ERROR)
        return 0 if complete else 2

    @property
    def left(self) -> int:
        """Units that were not run: out of time, or known from another fault."""
        return (self.state.total or 0) - len(self.rows)

    def verdict(self) -> str:
        """The answer in a line."""
        bad = self.of(FAULT, WRONG)
        if bad:
            names = ", ".join(dict.fromkeys(f"{row['side']} {row['kernel']}" for row in bad))
            patched = " Without --unpatched it says what the patches make of that." if self.state.facts.get("unpatched") else ""
            return f"UNSAFE: {names}. This vLLM would run it on this card.{patched}"
        if self.interrupted:
            return "Interrupted: nothing unsafe was found so far."
        if self.exit_code == 2:
            errors = dict.fromkeys(f"{row['side']} {row['kernel']}: {row['text']}" for row in self.of(ERROR))
            errors.update(dict.fromkeys(f"{kernel.title}: {kernel.absent}" for kernel in self._lacking))
            if errors:
                return f"Not everything could be called, so this proves nothing. {next(iter(errors))}"
            missing = self.counting - {(row["side"], row["kernel"]) for row in self.of(OK)}
            names = ", ".join(sorted(" ".join(kernel) for kernel in missing)) or "nothing that would run here"
            return f"Not everything was reached ({names}), so this proves nothing. Give it more --minutes."
        left = f" {self.left} calls were not run; more --minutes run them too." if self.left else ""
        return f"Safe: no fault and no wrong result in anything that this vLLM would run on this card.{left}"

    def head(self) -> str:
        """What was checked, in lines."""
        facts = self.state.facts
        lines = [
            f"{facts.get('card', 'no card')}, {facts.get('multiprocessors', '?')} SMs, driver {facts.get('driver', '?')}, "
            f"torch {facts.get('torch', '?')}",
            f"vLLM {facts.get('vllm') or 'not installed'}, vllm-glm-patch {__version__}: {facts.get('patches', 'no patches')}",
        ]
        skipped = f", {len(self.of(SKIPPED))} skipped" if self.of(SKIPPED) else ""
        left = f", {self.left} not run (known from another fault, or out of time)" if self.left else ""
        lines.append(f"{len(self.rows)} calls in {self.seconds:.0f} s{skipped}{left}")
        if facts.get("refused"):
            lines.append(f"It ended early. {facts['refused']}")
        return "\n".join(lines)

    def tables(self) -> list[Table]:
        """One row a kernel, then one a kind of finding."""
        tables = [Table("", ("kernel", "calls", "fault", "wrong", "largest error", "limit", ""), self._kernel_rows())]
        findings = self._findings()
        if findings:
            columns = ("finding", "shape", "routing", "tokens", "what")
            tables.append(Table("Faults, wrong results and what could not be called", columns, findings))
        return tables

    def _kernel_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for kernel in self.kernels:
            mine = [row for row in self.rows if (row["side"], row["kernel"]) == (kernel.side, kernel.name)]
            if kernel.absent:
                rows.append((kernel.title, "", "", "", "", "", kernel.absent))
                continue
            right = [row for row in mine if row["outcome"] == OK and row["error"] is not None]
            worst = max((row["error"] for row in right), default=None)
            limit = next((row["limit"] for row in mine if row["limit"] is not None), None)
            rows.append(
                (
                    kernel.title,
                    str(len(mine)),
                    str(sum(row["outcome"] == FAULT for row in mine)),
                    str(sum(row["outcome"] == WRONG for row in mine)),
                    _number(worst),
                    _number(limit),
                    "" if kernel.counts else "not what this vLLM runs here",
                )
            )
        return rows

    def _findings(self) -> list[tuple[str, ...]]:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows:
            if row["outcome"] in (FAULT, WRONG, ERROR):
                key = (row["outcome"], row["side"], row["kernel"], row["shape"], row["routing"], self._what(row))
                groups[key].append(row)
        found: list[tuple[str, ...]] = []
        for (outcome, side, kernel, shape, routing, what), rows in groups.items():
            tokens = ", ".join(str(count) for count in sorted(row["tokens"] for row in rows))
            if outcome == WRONG:
                errors = [row["error"] for row in rows]
                worst = "not finite" if None in errors else _number(max(errors))
                what = f"error {worst}, allowed {_number(rows[0]['limit'])}. {what}".strip()
            found.append((f"{outcome}: {side} {kernel}", shape, routing, tokens, what))
        return found

    def _what(self, row: dict[str, Any]) -> str:
        if row["outcome"] != FAULT:
            return str(row["text"])
        step = f" in {row['step']}" if row["step"] else ""
        if row["buffers"]:
            return f"past the end of {', '.join(row['buffers'])}{step}"
        if row["traced"]:
            return f"{row['text']}{step}; with no single one of its buffers guarded, so an inner one"
        same = [other for other in self.rows if (other["side"], other["kernel"]) == (row["side"], row["kernel"])]
        buffers: Optional[list[str]] = next((other["buffers"] for other in same if other["buffers"]), None)
        return f"{row['text']}{step}" + (f"; likely past the end of {', '.join(buffers)} as elsewhere" if buffers else "")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; the keys are those of docs/usage.md."""
        return {
            "schema": SCHEMA,
            "exit_code": self.exit_code,
            "verdict": self.verdict(),
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 1),
            "version": __version__,
            "facts": self.state.facts,
            "grid": {
                "shapes": [shape.name for shape in self.grid.shapes],
                "tokens": list(self.grid.tokens),
                "sides": list(self.grid.sides),
            },
            "total": self.state.total,
            "not_run": self.left,
            "kernels": self.state.kernels,
            "rows": self.rows,
        }


def _number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2g}"
