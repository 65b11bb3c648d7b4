"""Where each intermediate lies in the one workspace buffer, and how large that is."""

from __future__ import annotations

from dataclasses import dataclass

from . import routing
from .dispatch import Config, power_of_two
from .problem import Problem

ALIGNMENT = 256
TILE_BYTES = 4 * 3 * 2  # a tile's expert, first row and rows, in each of two lists
# Longer inputs are served in passes of this many tokens, so the workspace stops growing and row numbers stay small.
TOKENS_PER_PASS = 16384


def bins_of(experts: int) -> int:
    """Histogram bins: one for each expert and at least one for pairs that name none. A power of two."""
    return max(power_of_two(experts + 1), 16)


def needs_requantise(config: Config) -> bool:
    """Whether a separate kernel turns bf16 activations into FP8."""
    return config.gemm1.kind != "row" and (config.gemm2.kind == "loop" or config.gemm2.requantise)


def slice_of(problem: Problem, config: Config) -> int:
    """Hidden columns whose partials exist at once."""
    return min(config.gemm2.slice or problem.hidden_size, problem.hidden_size)


@dataclass(frozen=True)
class Layout:
    """Byte offsets from the start of the workspace, each a multiple of ALIGNMENT; `total` bytes in all."""

    offsets: dict[str, tuple[int, int]]
    total: int


def layout(problem: Problem, config: Config, band: int = 0) -> Layout:
    """Layout for one pass of `problem.tokens` tokens, GEMM2 working by bands of `band` tokens (routing.bands_of).

    The partials of GEMM2 take the place of the quantised tokens, which nobody reads any more by then.

    Raises:
        ValueError: a band is not a whole number of routing's chunks.
    """
    p = problem
    bands = routing.bands_of(p.tokens, p.top_k, band)
    offsets: dict[str, tuple[int, int]] = {}
    cursor = 0

    def add(name: str, size: int) -> None:
        nonlocal cursor
        offsets[name] = (cursor, size)
        cursor += -(-size // ALIGNMENT) * ALIGNMENT

    if config.path == "pairs":
        add("act", 2 * p.pairs * p.intermediate_size)
        return Layout(offsets, cursor)
    bins, chunks = bins_of(p.experts), -(-p.pairs // routing.CHUNK)
    add("local_ids", 4 * p.pairs)
    add("rows", 4 * p.pairs)
    add("histogram", 4 * (chunks + 1) * bins)
    add("tiles", TILE_BYTES * tiles_of(p, config, band))
    add("counts", 4 * (4 + routing.DONE))
    if bands > 1:
        add("band_tiles", 4 * bands)
    add("token_scales", 4 * p.tokens)
    add("act_scales", 4 * p.pairs)
    if config.gemm1.kind != "row":
        add("act", 2 * p.pairs * p.intermediate_size)
    if config.gemm1.kind == "row" or needs_requantise(config):
        add("act_quantised", p.pairs * p.intermediate_size)
    slots = config.gemm2.slots if config.gemm2.kind == "fused" else 1
    rows = band * p.top_k if bands > 1 and config.gemm2.kind == "fused" else p.pairs
    partial = 2 * rows * slice_of(p, config) * slots
    add("tokens_or_partial", max(p.tokens * p.hidden_size, partial))
    return Layout(offsets, cursor)


def tiles_of(problem: Problem, config: Config, band: int = 0) -> int:
    """Room for tiles in each of the two lists: a multiple of 16, so that kernels are compiled once for it."""
    p, bands = problem, routing.bands_of(problem.tokens, problem.top_k, band)
    most = max(
        routing.max_tiles(p.pairs, p.experts, config.gemm1.block_m),
        routing.max_tiles(p.pairs, p.experts, config.gemm2.block_m, bands),
    )
    return -(-most // 16) * 16
