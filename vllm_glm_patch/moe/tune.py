"""Tune on the card at hand: time candidates of each step, combine the best, and write the table dispatch.py reads.

Steps are timed apart, since a step's best tile does not depend on the others' (only on whether the activations reach
GEMM2 in FP8): that is tens of timings a token count instead of thousands. The best few whole layers are then timed
as wholes, and only whole layers enter a table: those whose outputs agree with the float64 reference and that fit the
workspace. Kernels are compiled beforehand by many processes, without touching the card's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

import torch

from . import backends, dispatch, generators, tables
from .dispatch import (
    Card,
    Config,
    Gemm1,
    Gemm2,
    Pairs,
    Sum,
    default_config,
    dependent_launch,
    fits_resident,
    power_of_two,
    read_card,
)
from .hopper import backend as hopper
from .hopper import candidates
from .hopper.backend import ROW_WIDTH, HopperConfig
from .hopper.library import loader
from .hopper.native import Native
from .pipeline import Pass, Tensors, compile_only
from .problem import Problem
from .reference import fused_moe, relative_error
from .timing import median_us
from .workspace import layout, needs_requantise

Report = Callable[[dict[str, Any]], None]
Whole = Union[Config, HopperConfig]
"""A configuration of a whole layer, by either backend."""
KINDS = ("triton", "hopper")

# Most error against the reference with the same FP8 steps. What is left is the bf16 of activations, partials and output,
# which moves some values by one FP8 step: 0.011 – 0.025 on an H100 (benchmarks/results/moe-check-h100.json).
TOLERANCE = 0.03
# Most workspace of one pass up to 8192 tokens of TP8, in bytes; longer passes get as much for each token, and wider experts
# what their activations, in bf16 and FP8, take more.
WORKSPACE_BYTES = 140_000_000


def workspace_limit(problem: Problem, card: Card) -> float:
    """Bytes a tuned configuration may need: WORKSPACE_BYTES, or what the rules of thumb need where that is more."""
    own = layout(problem, default_config(problem, card)).total
    wider = 3 * problem.pairs * max(0, problem.intermediate_size - ROW_WIDTH)
    return max(own, WORKSPACE_BYTES * max(1.0, problem.tokens / 8192) + wider)


def pair_candidates(problem: Problem) -> list[Config]:
    """Whole configurations of the path for a handful of tokens."""
    if problem.tokens > 16:
        return []
    wide = power_of_two(problem.intermediate_size)
    found = []
    for columns1, warps1, lines, warps2 in itertools.product((1, 2, 4), (4, 8), (1024, 2048, 4096), (4, 8)):
        if (columns1, warps1) == (4, 4):  # more registers than a thread has: Triton 3.9 spills it
            continue
        found.append(Config(path="pairs", pairs=Pairs(columns1, warps1, max(1, lines // wide), warps2)))
    return list(dict.fromkeys(found))


def gemm1_candidates(problem: Problem, card: Card) -> list[Gemm1]:
    """GEMM1 tiles worth trying at this many rows an expert."""
    density = problem.pairs / problem.global_experts
    found: list[Gemm1] = []
    if density <= 64:
        heights = [m for m in (16, 32, 64) if m >= min(density, 16) and m <= max(16, 4 * density)]
        for m, n, k, warps, stages in itertools.product(heights, (32, 64), (128, 256), (4, 8), (3, 4, 5)):
            if not (n == 32 and warps == 8):
                found.append(Gemm1("stream", m, n, k, 4, warps, stages))
    if density >= 12:
        heights = [m for m in (64, 128) if m <= max(64, 2 * density)]
        for m, n, k, stages, group in itertools.product(heights, (64, 128), (128,), (3, 4, 5), (2, 8)):
            if m * n <= 64 * 64:
                found.append(Gemm1("tile", m, n, k, group, 4, stages))
            found.append(Gemm1("tile", m, n, k, group, 8, stages))
        if problem.intermediate_size <= 256:
            for m, k, warps, stages in itertools.product(heights, (64, 128), (4, 8), (2, 3, 4)):
                if (m == 128) == (warps == 8) or m == 64:
                    found.append(Gemm1("row", m, 64, k, 1, warps, stages))
    return [c for c in found if _gemm1_bytes(problem, c) <= card.shared_memory]


def _gemm1_bytes(problem: Problem, c: Gemm1) -> int:
    width = problem.intermediate_size if c.kind == "row" else c.block_n
    return (c.block_m + 2 * width) * c.block_k * c.stages


def gemm2_candidates(problem: Problem, card: Card) -> list[tuple[Gemm2, Sum]]:
    """GEMM2 tiles and sums worth trying at this many rows an expert."""
    density = problem.pairs / problem.global_experts
    found: list[tuple[Gemm2, Sum]] = []
    limit = workspace_limit(problem, card)
    few = problem.tokens <= 1024
    sums = [Sum(1, 1024, 4)] if few else [Sum(4, 512, 4)]
    resident = fits_resident(problem.intermediate_size)
    if few:
        heights = [m for m in (16, 32, 64) if m <= max(16, 4 * density)]
        for m, n, warps, stages in itertools.product(heights, (64, 128), (4, 8), (2, 3, 4)):
            if n == 64 and warps == 8:
                continue
            if resident:
                for strip, requantise in itertools.product((n, 256, 512, 1280), (False, True)):
                    found.append((Gemm2("resident", m, n, 64, strip, 0, 3, True, requantise, 4, warps, stages), sums[0]))
            else:
                found.append((Gemm2("loop", m, n, 128, n, 0, 3, True, True, 4, warps, stages + 1), sums[0]))
                found.append((Gemm2("loop", m, n, 256, n, 0, 3, True, True, 4, warps, stages), sums[0]))
    if density >= 24:
        heights = [m for m in (64, 128) if m <= max(64, 2 * density)]
        slices = (0,) if few else (256, 512, 1024)
        for m, n, width in itertools.product(heights, (64, 128, 256), slices):
            warps = 8 if m * n >= 128 * 128 else 4
            if resident:
                for strip, stages in ((n, 1), (2 * n, 2), (4 * n, 2), (4 * n, 3)):
                    if width == 0 or strip <= width:
                        found.append((Gemm2("resident", m, n, 64, strip, width, 3, False, True, 4, warps, stages), sums[0]))
            else:
                for stages, group in itertools.product((3, 4), (2, 8)):
                    if m * n >= 64 * 128:
                        found.append((Gemm2("loop", m, n, 128, n, width, 3, False, True, group, warps, stages), sums[0]))
        if resident and not few:
            for m, n, width, slots, programs in itertools.product(heights, (64, 128), (128, 256, 512), (2, 3), (2, 3, 4)):
                warps = 8 if m * n >= 128 * 128 else 4
                for strip in {n, min(width, 2 * n)}:
                    if strip <= width:
                        gemm2 = Gemm2(
                            "fused", m, n, 64, strip, width, slots, False, True, 4, warps, 2 if strip > n else 1, programs
                        )
                        found.append((gemm2, Sum(max(1, 2048 // width), width, 4)))
    return [
        (gemm2, total)
        for gemm2, total in dict.fromkeys(found)
        if _gemm2_bytes(problem, gemm2) <= card.shared_memory
        # With whole-row GEMM1, the smallest need of all; time_layer asks again for the whole layer.
        and layout(problem, Config(gemm1=Gemm1("row"), gemm2=gemm2)).total <= limit
    ]


def _gemm2_bytes(problem: Problem, c: Gemm2) -> int:
    if c.kind == "loop":
        return (c.block_m + c.block_n) * c.block_k * c.stages
    return (c.block_m + c.block_n * c.stages) * problem.intermediate_size


@dataclass
class Bench:
    """A problem's inputs on the card, several sets of them where weights would otherwise stay in L2."""

    problem: Problem
    card: Card
    seed: int
    weights: generators.Weights
    device: str = "cuda"
    sets: list[generators.Inputs] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokens = self.problem.tokens
        count = 8 if tokens <= 16 else 4 if tokens <= 256 else 1
        self.sets = [
            generators.make_inputs(self.problem, self.seed + i, "spread", self.device, self.weights) for i in range(count)
        ]
        self._space = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._expected: torch.Tensor | None = None

    def passes(self, config: Whole) -> list[Any]:
        """A pass for each set (pipeline.Pass, HopperPass), with its own workspace and output."""
        need = -(-self._need(config) // 256) * 256
        if self._space.numel() < need * len(self.sets):
            self._space = torch.empty(need * len(self.sets), dtype=torch.uint8, device=self.device)
        made = []
        for i, inputs in enumerate(self.sets):
            tensors = Tensors(*inputs.positional(), inputs.expert_map, torch.empty_like(inputs.hidden_states))
            made.append(self._pass(config, tensors, self._space[i * need : (i + 1) * need]))
        return made

    def _need(self, config: Whole) -> int:
        if isinstance(config, HopperConfig):
            return hopper.workspace_bytes(self.problem, config)
        return layout(self.problem, config).total

    def _pass(self, config: Whole, tensors: Tensors, workspace: torch.Tensor) -> Any:
        if isinstance(config, HopperConfig):
            return hopper.make_pass(self.problem, config, self.card, tensors, workspace)
        return Pass(self.problem, config, tensors, workspace, self.card.multiprocessors)

    def time_step(self, config: Config, name: str, replays: int = 9) -> float:
        """Microseconds of one step alone; the steps before it run first, once, so its inputs are real."""
        passes = self.passes(config)
        timed = []
        for one in passes:
            for step, call in one.steps():
                if step == name:
                    timed.append(_rearmed(one, call) if name == "gemm2" and config.gemm2.kind == "fused" else call)
                    break
                call()
        return median_us(timed, replays)

    def time_layer(self, config: Whole, replays: int = 20) -> float:
        """Microseconds of the whole layer.

        Raises:
            RuntimeError: an output is not the float64 reference's, replays differ from the first call, or the
                workspace is too large. Such a configuration must not enter a table, however fast it is.
        """
        need = self._need(config)
        limit = workspace_limit(self.problem, self.card)
        if need > limit:
            raise RuntimeError(f"workspace of {need / 1e6:.1f} MB, at most {limit / 1e6:.1f} MB wanted")
        passes = self.passes(config)
        self._space.fill_(0xFF)  # NaN in every dtype: what a kernel fails to write shows
        for one in passes:
            one.t.out.fill_(float("nan"))
            one.run()
        first = torch.stack([one.t.out for one in passes])
        error = relative_error(first, self._reference())
        if not error <= TOLERANCE:
            raise RuntimeError(f"wrong output: {error:.4f} from the float64 reference, at most {TOLERANCE} allowed")
        us = median_us([one.run for one in passes], replays)
        if not all(torch.equal(one.t.out, kept) for one, kept in zip(passes, first)):
            raise RuntimeError("wrong output: a replay gave other bits than the first call")
        return us

    def _reference(self) -> torch.Tensor:
        """[sets, tokens, hidden] float64, with the contract's FP8 steps; made once."""
        if self._expected is None:
            made = [fused_moe(*inputs.positional(), expert_map=inputs.expert_map) for inputs in self.sets]
            self._expected = torch.stack(made)
        return self._expected


def _rearmed(one: Pass, gemm2: Callable[[], None]) -> Callable[[], None]:
    """The one-launch GEMM2 with its counters set to zero first, as the prologue leaves them; costs some 2 µs."""

    def call() -> None:
        one.counts[3:].zero_()
        gemm2()

    return call


def _compile_worker(job: tuple[Problem, Config]) -> str:
    """In a worker: compile every kernel of a configuration. Returns an empty string, or what went wrong."""
    problem, config = job
    meta: dict[str, Any] = {"device": "meta"}
    p = problem
    fp8, ids = torch.float8_e4m3fn, torch.int32
    tensors = Tensors(
        torch.empty(p.tokens, p.hidden_size, dtype=torch.bfloat16, **meta),
        torch.empty(p.experts, 2 * p.intermediate_size, p.hidden_size, dtype=fp8, **meta),
        torch.empty(p.experts, p.hidden_size, p.intermediate_size, dtype=fp8, **meta),
        torch.empty(p.experts, 2 * p.intermediate_size, **meta),
        torch.empty(p.experts, p.hidden_size, **meta),
        torch.empty(p.tokens, p.top_k, **meta),
        torch.empty(p.tokens, p.top_k, dtype=ids, **meta),
        None if p.experts == p.global_experts else torch.empty(p.global_experts, dtype=ids, **meta),
        torch.empty(p.tokens, p.hidden_size, dtype=torch.bfloat16, **meta),
    )
    workspace = torch.empty(layout(p, config).total, dtype=torch.uint8, **meta)
    try:
        Pass(p, config, tensors, workspace, 132, compile_only).run()
    except Exception as error:  # whatever the compiler dislikes: the candidate is dropped and counted
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def precompile(jobs: Iterable[tuple[Problem, Config]], deadline: float, processes: int | None = None) -> dict[str, int]:
    """Compile configurations in parallel into Triton's cache, until the deadline (time.monotonic).

    Returns counts: compiled, failed, and left when time ran out (those compile when first timed).
    """
    counts = {"compiled": 0, "failed": 0, "left": 0}
    todo = list(dict.fromkeys(jobs))
    processes = processes or max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile_worker, job) for job in todo]
        try:
            for future in as_completed(futures, timeout=max(0.1, deadline - time.monotonic())):
                counts["failed" if future.result() else "compiled"] += 1
        except OutOfTime:
            pass
        counts["left"] = sum(future.cancel() for future in futures)
    return counts


def plans(problem: Problem, card: Card) -> dict[str, list[tuple[str, Config]]]:
    """Candidates as (timed step, configuration), by group: pairs, gemm1, gemm2 with FP8 rows, gemm2 with bf16 rows.

    Each step's candidates ride on a partner configuration that supplies the other steps.
    """
    base = default_config(dataclasses.replace(problem, tokens=max(problem.tokens, 3)), card)
    groups: dict[str, list[tuple[str, Config]]] = {"pairs": [], "gemm1": [], "gemm2 fp8": [], "gemm2 bf16": []}
    groups["pairs"] = [("layer", config) for config in pair_candidates(problem)]
    partner = replace(base.gemm2, requantise=True) if base.gemm2.kind != "loop" else base.gemm2
    for gemm1 in gemm1_candidates(problem, card):
        groups["gemm1"].append(("gemm1", replace(base, gemm1=gemm1, gemm2=partner)))
    plain = base.gemm1 if base.gemm1.kind != "row" else Gemm1()
    for gemm2, total in gemm2_candidates(problem, card):
        config = replace(base, gemm1=plain, gemm2=gemm2, sum=total)
        groups["gemm2 fp8" if needs_requantise(config) else "gemm2 bf16"].append(("gemm2", config))
    return groups


def tune_count(
    bench: Bench, report: Report, deadline: float, native: Native | None = None, kinds: Sequence[str] = KINDS
) -> Whole | None:
    """Best configuration for one token count, or None where nothing could be timed before the deadline.

    `report` gets a row for every candidate (step, config, microseconds or the error) and one for each whole layer. What would
    run now is timed first, so that nothing slower enters a table. native: the native kernels, where they serve the problem;
    kinds: whose candidates are tried.
    """
    problem, card = bench.problem, bench.card
    best: dict[str, list[tuple[float, Any]]] = {}

    def attempt(group: str, step: str, config: Whole, replays: int = 9) -> None:
        row = {"tokens": problem.tokens, "shape": problem.shape_key, "group": group, "config": entry_of(config)}
        if time.monotonic() > deadline and group != "layer":
            return
        try:
            if isinstance(config, HopperConfig) or step == "layer":
                us = bench.time_layer(config, 20)
            else:
                us = bench.time_step(config, step, replays)
        except torch.cuda.OutOfMemoryError as error:
            report({**row, "error": str(error)[:120]})
            return
        except Exception as error:
            if "illegal" in str(error) or "misaligned" in str(error):
                raise  # the card's context is gone; timing on would only hide it
            report({**row, "error": f"{type(error).__name__}: {str(error)[:120]}"})
            return
        best.setdefault(group, []).append((us, config))
        report({**row, "us": round(us, 2)})

    dependents = dependent_launch() and card.capability >= (9, 0)
    attempt("as it is", "layer", (hopper if backends.route(problem, card) == "hopper" else dispatch).choose(problem, card))
    # Whatever `kinds` says: these are the same kernels, and take seconds.
    triton = [timed for timed in best.get("as it is", []) if isinstance(timed[1], Config)]
    for config in dependent(triton) if dependents else ():
        attempt("as it is", "layer", config)
    if native is not None and "hopper" in kinds:
        for begin, stages in candidates.families(problem, native):
            family = f"native {begin[0].gemm2}"
            for start in begin:
                attempt(family, "layer", start)
            for stage in stages:
                if family in best:
                    known = {config for _, config in best[family]}
                    for following in stage(min(best[family], key=lambda item: item[0])[1]):
                        if following not in known:
                            attempt(family, "layer", following)
    whole = [item for found in best.values() for item in found]
    for group, wanted in plans(problem, card).items() if "triton" in kinds else ():
        for step, config in wanted:
            name = group
            if group == "gemm1":
                name = "gemm1 row" if config.gemm1.kind == "row" else "gemm1 bf16"
            attempt(name, step, config)
    for found in best.values():
        found.sort(key=lambda item: item[0])
    for config in combinations(best):
        attempt("layer", "layer", config)
    if dependents:
        for config in dependent(best.get("layer", []) + best.get("pairs", [])):
            attempt("layer", "layer", config)
    whole += best.get("layer", []) + best.get("pairs", [])[:3]
    return min(whole, key=lambda item: item[0])[1] if whole else None


def combinations(best: dict[str, list[tuple[float, Config]]], keep: int = 2) -> list[Config]:
    """Whole layers from the best steps: whole-row GEMM1 or any GEMM1 + requantise into FP8 GEMM2, or bf16 throughout."""
    found = []
    routes = (("gemm1 row", "gemm2 fp8"), ("gemm1 bf16", "gemm2 fp8"), ("gemm1 bf16", "gemm2 bf16"))
    for first, second in routes:
        for (_, one), (_, two) in itertools.product(best.get(first, [])[:keep], best.get(second, [])[:keep]):
            found.append(replace(one, gemm2=two.gemm2, sum=two.sum))
    return list(dict.fromkeys(found))


def dependent(timed: list[tuple[float, Config]], keep: int = 3) -> list[Config]:
    """The best few again with programmatic dependent launch, after either prologue; where GEMM1 streams, also with weights
    asked for early; where GEMM2 goes by slices, also narrower and with hints.

    What a launch costs decides how narrow slices may be, so the best width is another one with dependent launches.
    """
    found = []
    for _, config in sorted(timed, key=lambda item: item[0])[:keep]:
        if config.path == "pairs":
            found.append(replace(config, pdl=True))
            continue
        for lines in (0, 4, 8) if config.gemm1.kind == "stream" else (0,):
            early = replace(config, pdl=True, gemm1=replace(config.gemm1, early=lines))
            found.extend((replace(early, prologue="triton"), replace(early, prologue="native")))
        c = config.gemm2
        if c.kind == "fused" or c.slice == 0:
            continue
        widths = {c.slice, max(c.slice // 2, c.strip)}
        found.extend(replace(config, pdl=True, gemm2=replace(c, slice=width, hints=True)) for width in sorted(widths))
        found.extend(replace(config, pdl=True, gemm2=replace(c, slice=width)) for width in sorted(widths - {c.slice}))
    return list(dict.fromkeys(found))


def tune(
    problems: Iterable[Problem],
    *,
    seconds: float,
    report: Report,
    seed: int = 0,
    folder: Path = tables.SHIPPED,
    path: Path | None = None,
    kinds: Sequence[str] = KINDS,
) -> Path:
    """Tune the current CUDA device for each problem and write or extend a table.

    Args:
        problems: one for each shape and token count; counts of a shape in a row share its weights.
        seconds: wall-clock limit. What is tuned by then is written; the table grows with every further run.
        report: called with each measurement as it is made, and with {"done": tokens, "shape": key} after each problem.
        seed: of the inputs.
        folder: where ``<card>.json`` lies.
        path: the table's file, instead of ``<folder>/<card>.json``.
        kinds: whose candidates are tried, of `KINDS`. The native ones need no compilation and are tried first.

    Returns:
        The table's path.

    Raises:
        ValueError: the file is there and is no table.
    """
    start = time.monotonic()
    card = read_card(torch.cuda.current_device())
    path = tables.file_of(card.name, folder) if path is None else path
    if path.exists():
        tables.read(path)
    todo = list(problems)
    timed = todo if "triton" in kinds else []
    jobs = [(problem, config) for problem in timed for group in plans(problem, card).values() for _, config in group]
    counts = precompile(jobs, start + 0.4 * seconds)
    report({"precompile": counts, "jobs": len(set(jobs)), "seconds": round(time.monotonic() - start, 1)})
    weights_key = ""
    weights: generators.Weights | None = None
    for index, problem in enumerate(todo):
        now = time.monotonic()
        left = start + seconds - now
        if left <= 0:
            break
        if problem.shape_key != weights_key:
            weights = None  # the last shape's go before the next's are made
            weights = generators.make_weights(problem, torch.Generator("cuda").manual_seed(seed))
            weights_key = problem.shape_key
        assert weights is not None
        bench = Bench(problem, card, seed, weights)
        native = loader().native if hopper.supports(problem, "cuda") else None
        config = tune_count(bench, report, now + 0.9 * left / (len(todo) - index), native, kinds)
        if config is not None:
            _extend(path, card, problem, config)
        report({"done": problem.tokens, "shape": problem.shape_key, "found": config is not None})
    return path


def entry_of(config: Whole) -> dict[str, Any]:
    """A table's entry: the whole configuration, and whose it is where that is not Triton's."""
    return config.to_dict() if isinstance(config, Config) else {"backend": "hopper", **config.to_dict()}


def _extend(path: Path, card: Card, problem: Problem, config: Whole) -> None:
    import triton

    table = tables.read(path) if path.exists() else {"shapes": {}}
    table |= {
        "card": card.name,
        "multiprocessors": card.multiprocessors,
        "capability": list(card.capability),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    counts = table["shapes"].setdefault(problem.shape_key, {})
    counts[str(problem.tokens)] = entry_of(config)
    tables.write(path, table)
