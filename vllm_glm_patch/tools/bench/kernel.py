"""`bench kernel`: the fused MoE layer alone, checked against float64, then timed against upstream's, in one process.

A time is of the whole layer, bf16 tokens in and reduced bf16 out, by replays of a CUDA graph: the graphs of all
implementations take turns, round after round, so that a card that grows warm or slow does so for all. One graph makes the
call on several inputs, whose routings differ, so that few tokens do not find their weights in the L2 cache. All of this
works on any device with another `Timer`, which is how it is tested.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Protocol

from ...errors import UserError
from ...moe.problem import GLM_SHAPES
from ...settings import Settings
from ..processes import check_interrupted
from ..vllm_moe import NotInThisVllm
from .kernel_card import Roofline
from .kernel_failure import beginning, device_lost, lost_since, whole
from .kernel_upstream import NAMES, Builder

if TYPE_CHECKING:
    import torch

    from vllm_glm_patch.moe.generators import Inputs, Weights
    from vllm_glm_patch.moe.problem import Problem

OURS = "ours"
AUTO = "auto"
ROUNDS = 4
REPLAYS = 10
MOST_INPUTS = 16
L2_TIMES = 4
"""The inputs of one graph use this many times the bytes of the L2 cache in weights, if that takes more than one input."""
L2_TREATMENT = (
    f"One graph makes the call on 1 to {MOST_INPUTS} inputs with routings of their own, one after the other, as many as it "
    f"takes for the weights they use to be {L2_TIMES} times the L2 cache; nothing is flushed between replays. "
    "A graph of less than 1 ms makes its calls several times over, since its own launch takes some 5 µs. "
    "`weights_mb` is what they use."
)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Tile edges, the multiples of 16 that upstream over-reads at, and the full scheduler step and its neighbours.
CHECKED = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513, 1024, 2047, 4096, 8190, 8191, 8192, 8193)
CHECKED_ROUTINGS = tuple((tokens, routing) for tokens in (3, 65, 777) for routing in ("skewed", "collapsed", "bad", "none"))
_ERROR, _ERROR_TO_STEPS = 0.06, 0.03  # FP8 steps cost 3 to 4 %; a wrong row, scale or weight far more


class Timer(Protocol):
    """Runs calls and says how long they take on the device."""

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Any:
        """Make all calls one piece that can be repeated."""

    def repeat(self, prepared: Any, times: int) -> list[float]:
        """Microseconds of each repetition."""


class GraphTimer:
    """CUDA graphs on the current device."""

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Any:
        """Capture a graph that makes all calls, short ones several times over."""
        from vllm_glm_patch.moe.timing import capture_long

        return capture_long(calls)

    def repeat(self, prepared: Any, times: int) -> list[float]:
        """Microseconds of all calls once, in each replay."""
        found: list[float] = prepared.times(times)
        return found

    def us_of(self, call: Callable[[], object]) -> list[float]:
        """Microseconds of each of some replays of one call."""
        return self.repeat(self.prepare([call]), REPLAYS)


class Died(Exception):
    """The device has failed under one implementation: nothing more can be measured in this process. `error` is all of it."""

    def __init__(self, name: str, error: str) -> None:
        super().__init__(f"{name}: {beginning(error)}")
        self.name, self.error = name, error


@dataclass(frozen=True)
class Lab:
    """Everything that a measurement needs and that a test replaces."""

    device: Any
    """A torch device."""
    l2_bytes: int
    timer: Timer
    ours: Mapping[str, Callable[[Problem], Ours]]
    """By what is asked for: ``auto``, or a backend. Each is timed against upstream on its own."""
    upstream: Mapping[str, Builder]
    """By name; empty without a vLLM."""
    roofline: Roofline
    rounds: int = ROUNDS
    replays: int = REPLAYS


@dataclass(frozen=True)
class Ours:
    """Our implementation as it is chosen for one problem."""

    backend: str
    """The one that serves this problem."""
    config: dict[str, Any]
    """Tiles and stages, for the record."""
    workspace_bytes: int
    make: Callable[[Inputs, torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]
    """A call from inputs, output and workspace."""


def problem_of(shape: str, tokens: int = 1) -> Problem:
    """The sizes of a named shape.

    Raises:
        UserError: the name is not known.
    """
    if shape not in GLM_SHAPES:
        raise UserError(f"--shapes has {shape!r}; give some of {','.join(GLM_SHAPES)}.")
    return GLM_SHAPES[shape].with_tokens(tokens)


def inputs_for(problem: Problem, l2_bytes: int) -> int:
    """How many inputs one graph needs, so that no weights are left in the L2 cache from one replay to the next."""
    used = problem.active_experts() * problem.expert_bytes
    return max(1, min(MOST_INPUTS, math.ceil(L2_TIMES * l2_bytes / max(used, 1.0))))


def take_turns(
    calls: Mapping[str, Sequence[Callable[[], object]]], timer: Timer, rounds: int, replays: int, device: Any = None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time implementations against each other.

    Args:
        calls: for each, its calls on all inputs.
        rounds: turns of each; replays: repetitions a turn.
        device: asked after a failure whether it still answers.

    Returns:
        Microseconds of one call, a median for each round; and what failed, with its whole error.

    Raises:
        Died: the device failed.
    """
    prepared, failed = {}, {}
    for name, some in calls.items():
        try:
            prepared[name] = timer.prepare(some)
        except Exception as error:
            failed[name] = _survivable(name, error, device)
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for turn in range(rounds):
        names = list(prepared)[::-1] if turn % 2 else list(prepared)
        for name in names:
            check_interrupted()
            try:
                times[name].append(statistics.median(timer.repeat(prepared[name], replays)) / len(calls[name]))
            except Exception as error:
                failed[name] = _survivable(name, error, device)
                prepared.pop(name)
    return {name: found for name, found in times.items() if name not in failed}, failed


@dataclass(frozen=True)
class Case:
    """What one row is of."""

    shape: str
    tokens: int
    asked: str
    """A key of `Lab.ours`."""


def time_layer(lab: Lab, case: Case, weights: Weights, seed: int, without: Mapping[str, str]) -> dict[str, Any]:
    """One row of the result file, but for `vllm`.

    Args:
        weights: of this shape.
        seed: of the inputs.
        without: implementations that are left out, and why.

    Raises:
        Died: the device failed.
    """
    import torch

    from vllm_glm_patch.moe import generators
    from vllm_glm_patch.moe.reference import fused_moe, relative_error

    problem = problem_of(case.shape, case.tokens)
    count = inputs_for(problem, lab.l2_bytes)
    sets = [generators.make_inputs(problem, seed + number, "spread", lab.device, weights) for number in range(count)]
    used, most = generators.spread(sets[0].topk_ids, problem)  # make_inputs has refused what is not spread
    ours = lab.ours[case.asked](problem)
    workspace = torch.empty(ours.workspace_bytes, dtype=torch.uint8, device=lab.device)
    failed = dict(without)
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {}
    if OURS not in failed:
        calls[OURS] = [ours.make(inputs, torch.empty_like(inputs.hidden_states), workspace) for inputs in sets]
    wide = 2 * problem.pairs * max(problem.hidden_size, 2 * problem.intermediate_size) if lab.upstream else 0
    space = torch.empty(wide, dtype=torch.bfloat16, device=lab.device)
    for name, build in lab.upstream.items():
        if name in failed:
            continue
        try:
            calls[name] = [build(inputs, space) for inputs in sets]
        except NotInThisVllm as error:
            failed[name] = f"not in this vLLM: {error}"
        except Exception as error:
            failed[name] = _survivable(name, error, lab.device)
    exact = fused_moe(*sets[0].positional(), expert_map=sets[0].expert_map, quantised=False)
    errors = {}
    for name in list(calls):
        try:
            errors[name] = float(relative_error(calls[name][0](), exact))
        except Exception as error:
            failed[name] = _survivable(name, error, lab.device)
            del calls[name]
    del exact
    times, more = take_turns(calls, lab.timer, lab.rounds, lab.replays, lab.device)
    failed |= more
    weights_mb = count * problem.active_experts() * problem.expert_bytes / 1e6
    row = row_of(case, times, errors, lab.roofline.floor(problem))
    return {
        **row,
        "backend": ours.backend,
        "inputs": count,
        "weights_mb": round(weights_mb, 1),
        "experts_used": used,
        "most_tokens": most,
        "workspace_mb": round(ours.workspace_bytes / 1e6, 1),
        "config": ours.config,
        "failed": failed,
    }


def row_of(
    case: Case, times: Mapping[str, Sequence[float]], errors: Mapping[str, float], floor: tuple[float, str]
) -> dict[str, Any]:
    """Medians over the rounds, the best of upstream's, and the ratio to it with its spread over the rounds."""
    us = {name: statistics.median(found) for name, found in times.items()}
    theirs = {name: us[name] for name in NAMES if name in us}
    best = min(theirs, key=lambda name: theirs[name]) if theirs else None
    ratio = low = high = None
    if best is not None and OURS in us:
        ratio = round(us[best] / us[OURS], 3)
        low, high = round(min(times[best]) / max(times[OURS]), 3), round(max(times[best]) / min(times[OURS]), 3)
    return {
        "shape": case.shape,
        "tokens": case.tokens,
        "asked": case.asked,
        **{f"{name}_us": round(us[name], 2) if name in us else None for name in (OURS, *NAMES)},
        "best_upstream": best,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "error": _finite(errors.get(OURS)),
        "upstream_error": _finite(errors.get(best)) if best else None,
        "floor_us": floor[0],
        "floor_by": floor[1],
    }


def check_layer(lab: Lab, case: Case, routing: str, weights: Weights, seed: int) -> dict[str, Any]:
    """One call under poisoned output and workspace, twice; its error against float64 with and without FP8 steps.

    Raises:
        Exception: whatever the layer raised.
    """
    import torch

    from vllm_glm_patch.moe import generators
    from vllm_glm_patch.moe.op import problem_of as read_problem
    from vllm_glm_patch.moe.reference import fused_moe, relative_error

    problem = problem_of(case.shape, case.tokens)
    inputs = generators.make_inputs(problem, seed, routing, lab.device, weights)  # type: ignore[arg-type]
    read_problem(*inputs.positional(), inputs.expert_map)
    ours = lab.ours[case.asked](problem)
    outs = []
    for poison in (0xFF, 0x7F):
        out = torch.full_like(inputs.hidden_states, float("nan"))
        workspace = torch.full((ours.workspace_bytes,), poison, dtype=torch.uint8, device=lab.device)
        outs.append(ours.make(inputs, out, workspace)())
    exact = fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=False)
    steps = fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=True)
    error, to_steps = float(relative_error(outs[0], exact)), float(relative_error(outs[0], steps))
    same = bool(torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16)))
    if not bool(exact.any()):  # no id named an expert
        error = to_steps = 0.0 if not bool(outs[0].any()) else math.inf
    return {
        "shape": case.shape,
        "tokens": case.tokens,
        "asked": case.asked,
        "routing": routing,
        "backend": ours.backend,
        "error": _finite(error),
        "error_to_fp8_steps": _finite(to_steps),
        "repeats": same,
        "good": error < _ERROR and to_steps < _ERROR_TO_STEPS and same,
    }


@dataclass
class Work:
    """What a whole `bench kernel` does, and how far it is: `result` is that of the file at any time."""

    lab: Lab
    result: dict[str, Any]
    save: Callable[[], None]
    say: Callable[[str], None] = lambda text: None
    stop_at: Optional[float] = None
    """On the clock of time.monotonic(): after it nothing is begun."""

    def do(self, shapes: Sequence[str], checked: bool, timed: Sequence[int], seed: int) -> None:
        """Check and time what is not in the result yet, shape by shape; it is saved after each.

        Raises:
            Died: the device failed; what it failed under is in the result, and a new process leaves it out.
        """
        from vllm_glm_patch.moe import generators

        routings: list[tuple[int, str]] = [*((count, "spread") for count in CHECKED), *CHECKED_ROUTINGS] if checked else []
        for shape in shapes:
            checks = [(Case(shape, count, asked), routing) for asked in self.lab.ours for count, routing in routings]
            cases = [Case(shape, count, asked) for count in timed for asked in self.lab.ours]
            checks = [(case, routing) for case, routing in checks if not self._checked(case, routing)]
            cases = [case for case in cases if not self._timed(case)]
            if not checks and not cases:
                continue
            weights = generators.make_weights(problem_of(shape), _generator(self.lab.device, seed))
            for case, routing in checks:
                if self._is_over():
                    return
                self._check(case, routing, weights, seed)
            for case in cases:
                if self._is_over():
                    return
                self._time(case, weights, seed)
            del weights
        self.result["complete"] = True
        self.save()

    def _check(self, case: Case, routing: str, weights: Weights, seed: int) -> None:
        check_interrupted()
        backend = self._backend(case)  # now: a failed device answers nothing
        where = f"{case.shape}, {case.tokens} tokens, {routing} routing"
        try:
            found = check_layer(self.lab, case, routing, weights, seed)
        except Exception as error:
            lost = error if device_lost(error) else lost_since(self.lab.device)
            nothing = {"error": None, "error_to_fp8_steps": None, "repeats": False, "good": False}
            named = {"shape": case.shape, "tokens": case.tokens, "asked": case.asked, "routing": routing}
            failure = {"type": type(error).__name__, "message": str(error).strip()}
            self.result["checks"].append({**named, "backend": backend, **nothing, "failure": failure})
            self._find(f"{OURS} {'died' if lost else 'failed'} in a check, {where}: {beginning(whole(error))}")
            if lost:
                raise Died(OURS, whole(error)) from error
            return
        self.result["checks"].append(found)
        if not found["good"]:
            self._find(f"wrong: {where}: error {found['error']}")
        self.save()

    def _time(self, case: Case, weights: Weights, seed: int) -> None:
        check_interrupted()
        before = self._row(case)
        without = before["failed"] if before else {}
        problem = problem_of(case.shape, case.tokens)
        backend = self._backend(case)  # now: a failed device answers nothing
        try:
            row = time_layer(self.lab, case, weights, seed, without)
        except Died as death:
            row = {
                **row_of(case, {}, {}, self.lab.roofline.floor(problem)),
                "backend": backend,
                "inputs": 0,
                "weights_mb": 0.0,
                "experts_used": 0,
                "most_tokens": 0,
                "workspace_mb": 0.0,
                "config": {},
                "failed": {**without, death.name: death.error},
            }
            self._put(row, before)
            self._find(f"{death.name} died at {case.tokens} tokens of {case.shape}: {beginning(death.error)}")
            raise
        self._put(row, before)
        if OURS in row["failed"] and OURS not in without:
            self._find(f"{OURS} failed at {case.tokens} tokens of {case.shape}: {beginning(row['failed'][OURS])}")
        self.say(line_of(row))
        self.save()

    def _backend(self, case: Case) -> str:
        """Who serves a case; what was asked for where that cannot even be chosen, which the case then fails with."""
        try:
            return self.lab.ours[case.asked](problem_of(case.shape, case.tokens)).backend
        except Exception:
            return case.asked

    def _put(self, row: dict[str, Any], before: Optional[dict[str, Any]]) -> None:
        rows = self.result["rows"]
        if before is not None:
            rows.remove(before)
        rows.append({"vllm": self.result["machine"]["vllm"], **row})

    def _row(self, case: Case) -> Optional[dict[str, Any]]:
        return next((row for row in self.result["rows"] if _case_of(row) == case), None)

    def _timed(self, case: Case) -> bool:
        row = self._row(case)
        return row is not None and (row[f"{OURS}_us"] is not None or OURS in row["failed"])

    def _checked(self, case: Case, routing: str) -> bool:
        return any(_case_of(found) == case and found["routing"] == routing for found in self.result["checks"])

    def _is_over(self) -> bool:
        over = self.stop_at is not None and time.monotonic() > self.stop_at
        if over:
            self.say("The time is up; the same command goes on from here.")
            self.save()
        return over

    def _find(self, text: str) -> None:
        self.result["findings"].append(text)
        self.say(text)
        self.save()


def _case_of(item: Mapping[str, Any]) -> Case:
    return Case(item["shape"], item["tokens"], item["asked"])


def line_of(row: Mapping[str, Any]) -> str:
    """A row for people, on one line."""
    times = [f"{name} {row[f'{name}_us']:.1f}" for name in (OURS, *NAMES) if row[f"{name}_us"] is not None]
    ratio = f", ratio {row['ratio']:.2f}" if row["ratio"] is not None else ""
    failed = "".join(f"; {name}: {beginning(why)[:80]}" for name, why in row["failed"].items())
    where = f"{row['shape']} {row['tokens']} tokens, {row['backend']}"
    return f"{where}, µs: {', '.join(times)}, floor {row['floor_us']:.1f}{ratio}{failed}"


def our_layers(device: Any, asked: Sequence[str]) -> dict[str, Callable[[Problem], Ours]]:
    """The layer of this package: `AUTO` as its tables choose, a backend's name to have that one.

    Raises:
        UserError: there is no such backend.
    """
    from vllm_glm_patch.moe import backends, tables

    tables.use_folder(Settings.from_environment().tables())  # as a server does
    known = (AUTO, *(backend.name for backend in backends.BACKENDS))
    for name in asked:
        if name not in known:
            raise UserError(f"--backends has {name!r}; give some of {','.join(known)}.")
    return {name: _our_layer(device, name) for name in asked}


def _our_layer(device: Any, asked: str) -> Callable[[Problem], Ours]:
    import torch

    from vllm_glm_patch.moe import backends, fused_moe_fp8, workspace_bytes
    from vllm_glm_patch.moe.dispatch import read_card
    from vllm_glm_patch.moe.workspace import TOKENS_PER_PASS

    card = read_card(torch.device(device).index or 0 if torch.device(device).type == "cuda" else None)

    def chosen(problem: Problem) -> Ours:
        backends.prefer(asked)
        part = dataclasses.replace(problem, tokens=min(problem.tokens, TOKENS_PER_PASS))
        backend = backends.route(part, card)
        if backend == backends.UPSTREAM:
            backend = "triton"  # what the operator itself does, once it is called
        configuration: Any
        (configuration,) = (known.configuration(part, card) for known in backends.BACKENDS if known.name == backend)

        def make(inputs: Inputs, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], torch.Tensor]:
            def call() -> torch.Tensor:
                backends.prefer(asked)
                return fused_moe_fp8(*inputs.positional(), expert_map=inputs.expert_map, out=out, workspace=workspace)

            return call

        return Ours(backend, configuration.to_dict(), workspace_bytes(problem, device), make)

    return chosen


def _generator(device: Any, seed: int) -> torch.Generator:
    import torch

    return torch.Generator(device).manual_seed(seed)


def _survivable(name: str, error: Exception, device: Any) -> str:
    """What went wrong, all of it.

    Raises:
        Died: the device failed with it.
    """
    if device_lost(error) or lost_since(device):
        raise Died(name, whole(error)) from error
    return whole(error)


def _finite(value: Optional[float]) -> Optional[float]:
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
