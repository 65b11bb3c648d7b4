"""Which configurations of the native kernels are worth timing, stage by stage: tune.py asks with the best so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..problem import Problem
from .backend import DECODE_ROWS, DECODE_WIDTH, RING_TOP_K, ROW_WIDTH, TRITON, HopperConfig, default_of_many
from .native import Native

Stage = Callable[[HopperConfig], list[HopperConfig]]
"""The next configurations to time, from the fastest of the stages before."""
EARLY = ((4, 0), (0, 2), (4, 2), (8, 4))
"""(early_steps of whole tiles, early_items) to try where an expert's rows fill one tile of 128, not more, in most cases."""
EARLY_ROWS = 110  # an expert's average up to which that is so
FEWEST_ROWS = 6  # an expert's average from which the kernels for many tokens are tried
SLICES = (
    ("sum_n128", 128, 3),
    ("sum_n128", 256, 2),
    ("sum_n256", 256, 2),
    ("sum_n256", 512, 2),
    ("sum_n256", 1024, 2),
)
RINGS = (
    ("ring_n128", 256, 3),
    ("ring_n128", 256, 8),
    ("ring_n256", 256, 3),
    ("ring_n256", 512, 2),
    ("turns_lanes_n256", 256, 3),
    ("turns_lanes_n256", 256, 4),
    ("turns_lanes_n256", 256, 8),
    ("turns_lanes_n256", 256, 20),
    ("turns_lanes_n256", 512, 2),
    ("turns_lanes_n256", 512, 10),
)


def slices(problem: Problem) -> list[tuple[str, int, int]]:
    """(kernel, columns of a slice, slots) of GEMM2 by slices worth trying. kernel: without glm_gemm2_."""
    found = SLICES + RINGS if problem.top_k == RING_TOP_K else SLICES
    return [sliced for sliced in found if problem.hidden_size % sliced[1] == 0]


def heights(density: float) -> list[int]:
    """Tiles of the kernels for few tokens that are worth trying where an expert gets `density` rows on average."""
    return [rows for rows in (8, 16, 32, 64) if density / 2 <= rows <= max(8 * density, 16)]


def families(problem: Problem, native: Native) -> list[tuple[list[HopperConfig], list[Stage]]]:
    """(where to begin, stages) of the kernels for few tokens and of those for many, as far as they may serve the problem."""
    density = problem.pairs / problem.global_experts
    found: list[tuple[list[HopperConfig], list[Stage]]] = []
    if density <= DECODE_ROWS and problem.intermediate_size <= DECODE_WIDTH:
        few = [HopperConfig(f"glm_gemm1_decode_t{rows}", f"glm_gemm2_decode_t{rows}") for rows in heights(density)]
        found.append((few, [_with_triton_gemm1, _with_other_prologue, _details, _asking_early_by_triton]))
    if density >= FEWEST_ROWS:

        def first_gemms(best: HopperConfig) -> list[HopperConfig]:
            kind = "glm_gemm1_row_" if problem.intermediate_size == ROW_WIDTH else "glm_gemm1_columns_"
            names = [kernel.name for kernel in native.kernels if kernel.name.startswith(kind)]
            return [replace(best, gemm1=name) for name in (TRITON, *names)]

        def second_gemms(best: HopperConfig) -> list[HopperConfig]:
            return [
                replace(best, gemm2=f"glm_gemm2_{name}", slice=width, slots=slots) for name, width, slots in slices(problem)
            ]

        stages: list[Stage] = [_with_other_prologue, first_gemms, second_gemms, _details]
        if density <= EARLY_ROWS:
            stages.append(_asking_early)
        found.append(([default_of_many(problem)], stages))
    return found


def _with_triton_gemm1(best: HopperConfig) -> list[HopperConfig]:
    return [replace(best, gemm1=TRITON)]


def _with_other_prologue(best: HopperConfig) -> list[HopperConfig]:
    return [replace(best, prologue=TRITON if best.prologue == "native" else "native")]


def _asking_early_by_triton(best: HopperConfig) -> list[HopperConfig]:
    """The native GEMM1 for few tokens does not: where a block begins hangs on how many experts have none."""
    return [replace(best, early_steps=lines) for lines in (4, 8)] if best.gemm1 == TRITON and best.programmatic else []


def _asking_early(best: HopperConfig) -> list[HopperConfig]:
    """A quarter of a tile has a quarter of its weights a step; Triton's GEMM1 asks for nothing early. Nothing is early where no
    kernel starts before the one ahead of it has ended."""
    if not best.programmatic:
        return []
    times = 0 if best.gemm1 == TRITON else 4 if best.gemm1.endswith("_quarter") else 1
    found = (replace(best, early_steps=steps * times, early_items=items) for steps, items in EARLY)
    return [config for config in dict.fromkeys(found) if config != best]


def _details(best: HopperConfig) -> list[HopperConfig]:
    return [replace(best, programmatic=not best.programmatic), replace(best, weight_promotion=256)]
