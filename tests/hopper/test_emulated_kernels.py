"""The kernels of csrc/hopper, run by the emulator: right results, no deadlock, no access outside a buffer, at any timing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulated import run_check

SEED = random.SystemRandom().randrange(1 << 20)

# Token counts around the tiles' heights; one pair a token unless top_k says otherwise.
_CASES = [
    ("glm_gemm1_row_c1", {"tokens": 130, "hidden": 512}),
    ("glm_gemm1_row_c1", {"tokens": 1, "top_k": 8, "experts": 5}),
    ("glm_gemm1_row_c1", {"tokens": 300, "grid": 4, "skew": 1}),
    ("glm_gemm1_columns_c1", {"tokens": 65, "width": 384}),
    ("glm_gemm1_exact_c1", {"tokens": 65, "hidden": 768, "experts": 2}),
    # Rings that go round more than once; a block that draws most tiles; a tile for one warpgroup only; fewer tiles than blocks;
    # more tiles than are reordered, of which some keep both warpgroups busy and lie behind shorter ones; one block at a time.
    ("glm_gemm1_row_split", {"tokens": 130, "hidden": 1280}),
    ("glm_gemm1_row_split", {"tokens": 1, "top_k": 8, "experts": 5, "grid": 7}),
    ("glm_gemm1_row_split", {"tokens": 300, "skew": 1, "experts": 40, "grid": 4}),
    ("glm_gemm1_row_split", {"tokens": 400, "experts": 90, "grid": 5, "resident": 1}),
    ("glm_gemm1_columns_split", {"tokens": 129, "width": 384, "hidden": 512}),
    # Halves: of all tiles, some without a second one; of the last two of twelve; of one.
    ("glm_gemm1_row_split", {"tokens": 100, "experts": 3, "grid": 8}),
    ("glm_gemm1_columns_split", {"tokens": 230, "experts": 1, "invalid": 0, "top_k": 3, "width": 384, "grid": 5}),
    ("glm_gemm1_row_split", {"tokens": 300, "experts": 1, "invalid": 0, "top_k": 1, "grid": 2}),
    # What is asked into L2 ahead must lie in the tensors, also where a row has fewer steps than that.
    ("glm_gemm1_row_split_l2", {"tokens": 150, "hidden": 1280, "skew": 1}),
    ("glm_gemm1_columns_split_l2", {"tokens": 65, "width": 384}),
    # By quarters: tiles of one and of two slots a step, several a cluster; rings that go round more than once; more tiles than
    # clusters at once; fewer than clusters; one expert, whose tiles but the last take two slots; tiles of exactly 64 rows.
    ("glm_gemm1_row_quarter", {"tokens": 150, "hidden": 1536, "grid": 8}),
    ("glm_gemm1_row_quarter", {"tokens": 300, "skew": 1, "experts": 20, "grid": 12, "resident": 1}),
    ("glm_gemm1_row_quarter", {"tokens": 1, "top_k": 8, "experts": 5, "grid": 12}),
    ("glm_gemm1_row_quarter", {"tokens": 290, "experts": 1, "invalid": 0, "top_k": 1, "grid": 4, "hidden": 512}),
    ("glm_gemm1_row_quarter", {"tokens": 64, "experts": 1, "invalid": 0, "top_k": 3, "grid": 4}),
    ("glm_gemm2_sum_n128", {"tokens": 65, "hidden": 1024, "slice": 256, "slots": 2, "resident": 1}),
    ("glm_gemm2_sum_n128", {"tokens": 33, "hidden": 512, "slice": 128, "slots": 2, "top_k": 8}),
    ("glm_gemm2_sum_n256", {"tokens": 65, "hidden": 512, "slice": 256, "slots": 2, "width": 384}),
    ("glm_gemm2_sum_n256", {"tokens": 40, "hidden": 512, "slice": 512, "slots": 1, "top_k": 11, "experts": 2}),
    # By bands of tokens: two slots and one block at a time; a last band of 4 tokens; one slice; a band without a valid pair;
    # experts with rows in one band only, tiles of 128 and of a few rows, more slots than bands; an expert without any; no valid
    # pair at all; two bands without any, and all but one; a band as large as all the tokens.
    ("glm_gemm2_sum_n128", {"tokens": 128, "hidden": 512, "slice": 128, "slots": 2, "band": 64, "resident": 1}),
    ("glm_gemm2_sum_n256", {"tokens": 100, "hidden": 512, "slice": 256, "slots": 3, "band": 32, "top_k": 3}),
    ("glm_gemm2_sum_n128", {"tokens": 70, "slice": 256, "slots": 2, "band": 32, "silent": 0b10, "grid": 2}),
    ("glm_gemm2_sum_n256", {"tokens": 200, "hidden": 512, "slots": 5, "band": 96, "skew": 2, "experts": 5}),
    ("glm_gemm2_sum_n128", {"tokens": 97, "hidden": 512, "slice": 128, "band": 32, "experts": 12, "top_k": 1, "grid": 5}),
    ("glm_gemm2_sum_n256", {"tokens": 66, "hidden": 512, "band": 32, "invalid": 100, "grid": 2}),
    ("glm_gemm2_sum_n128", {"tokens": 150, "hidden": 512, "slice": 128, "band": 32, "silent": 0b1010, "grid": 4}),
    ("glm_gemm2_sum_n128", {"tokens": 150, "hidden": 512, "slice": 128, "band": 32, "silent": 0b10111, "grid": 4}),
    ("glm_gemm2_sum_n128", {"tokens": 64, "hidden": 512, "slice": 256, "band": 64, "skew": 1}),
    # Partials through a ring in shared memory: one block at a time and four slices; a last item of a token, whose box reaches
    # past the last slot; two chunks a group of tokens; fewer items than blocks; one token; wider rows; more slots than slices
    # and nearly one expert; no valid pair; and by bands, with a short last one, and with some that have no valid pair.
    ("glm_gemm2_ring_n256", {"tokens": 65, "hidden": 1024, "slots": 2, "top_k": 8, "resident": 1}),
    ("glm_gemm2_ring_n128", {"tokens": 33, "hidden": 512, "top_k": 8}),
    ("glm_gemm2_ring_n256", {"tokens": 70, "hidden": 1024, "slice": 512, "top_k": 8, "experts": 5, "grid": 2}),
    ("glm_gemm2_ring_n128", {"tokens": 20, "hidden": 512, "slice": 512, "slots": 1, "top_k": 8, "grid": 4}),
    ("glm_gemm2_ring_n256", {"tokens": 1, "top_k": 8, "experts": 9, "grid": 4}),
    ("glm_gemm2_ring_n128", {"tokens": 40, "width": 576, "top_k": 8}),
    ("glm_gemm2_ring_n256", {"tokens": 50, "hidden": 512, "slots": 5, "top_k": 8, "skew": 1, "invalid": 60}),
    ("glm_gemm2_ring_n128", {"tokens": 40, "hidden": 512, "top_k": 8, "invalid": 100, "grid": 2}),
    ("glm_gemm2_ring_n128", {"tokens": 100, "hidden": 512, "top_k": 8, "band": 64, "resident": 1}),
    ("glm_gemm2_ring_n256", {"tokens": 150, "hidden": 512, "slots": 3, "top_k": 8, "band": 32, "silent": 0b1010, "grid": 4}),
    ("glm_gemm2_ring_n256", {"tokens": 97, "hidden": 512, "top_k": 8, "band": 32, "silent": 0b0111, "grid": 2}),
    # Warpgroups by turns: one block at a time and four slices; one expert, whose turns share their weights, an odd number of
    # them; items of one turn; one token; K of two, four and eight stages, of two turns and of one; no valid pair; by bands.
    ("glm_gemm2_turns_lanes_n256", {"tokens": 65, "hidden": 1024, "slots": 2, "top_k": 8, "resident": 1}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 40, "hidden": 1024, "top_k": 8, "experts": 1, "invalid": 0, "grid": 2}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 70, "hidden": 1024, "slice": 512, "top_k": 8, "experts": 9, "grid": 2}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 1, "top_k": 8, "experts": 9, "grid": 4}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 60, "width": 384, "hidden": 512, "top_k": 8, "skew": 1, "grid": 2}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 30, "width": 768, "top_k": 8, "experts": 7, "grid": 2}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 20, "width": 1536, "hidden": 512, "top_k": 8, "experts": 2, "grid": 1}),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 40, "hidden": 512, "top_k": 8, "invalid": 100, "grid": 2}),
    (
        "glm_gemm2_turns_lanes_n256",
        {"tokens": 150, "hidden": 512, "slots": 3, "top_k": 8, "band": 32, "silent": 0b1010, "grid": 4},
    ),
    ("glm_gemm2_turns_lanes_n256", {"tokens": 97, "hidden": 1024, "top_k": 8, "band": 32, "silent": 0b0111, "grid": 2}),
    ("glm_gemm1_decode_t8", {"tokens": 9, "top_k": 8}),
    ("glm_gemm1_decode_t16", {"tokens": 33}),
    ("glm_gemm1_decode_t32", {"tokens": 40, "skew": 1}),
    ("glm_gemm1_decode_t64", {"tokens": 65, "hidden": 512}),
    ("glm_gemm2_decode_t8", {"tokens": 9, "top_k": 8}),
    ("glm_gemm2_decode_t16", {"tokens": 33, "width": 384, "hidden": 512}),
    ("glm_gemm2_decode_t32", {"tokens": 40, "skew": 1}),
    ("glm_gemm2_decode_t32", {"tokens": 40, "width": 768}),
    ("glm_gemm2_decode_t8", {"tokens": 9, "width": 1536, "hidden": 512}),
    ("glm_gemm2_decode_t64", {"tokens": 70, "width": 1536, "experts": 2}),
    ("glm_topk_sum", {"tokens": 33, "top_k": 11}),
    # One pair; a whole row of threads and rows that do not fit their registers; a chunk less a pair, and a pair more; whole
    # chunks for each warp; more bins than threads; ids in a map, wrong ones in it too; 64-bit ids; nearly one expert.
    ("glm_prologue_c1", {"tokens": 1, "top_k": 1, "experts": 1, "invalid": 0}),
    ("glm_prologue_c1", {"tokens": 7, "top_k": 8, "hidden": 5120, "experts": 160}),
    ("glm_prologue_c8", {"tokens": 6, "top_k": 8, "hidden": 7168, "elsewhere": 12}),
    ("glm_prologue_c1", {"tokens": 33, "top_k": 31, "elsewhere": 12, "wide": 1, "skew": 1}),
    ("glm_prologue_c8", {"tokens": 25, "top_k": 41, "experts": 16, "wide": 1, "rows1": 16, "rows2": 8}),
    ("glm_prologue_c1", {"tokens": 20, "top_k": 512, "experts": 7, "wide": 1}),
    ("glm_prologue_c8", {"tokens": 40, "top_k": 64, "experts": 511, "invalid": 40}),
    # By bands of tokens: three, one of them silent; eleven, the last one short; each expert in one band only.
    ("glm_prologue_c8", {"tokens": 24, "top_k": 128, "band": 8, "silent": 0b10, "experts": 20, "elsewhere": 60}),
    ("glm_prologue_c1", {"tokens": 21, "top_k": 512, "band": 2, "experts": 300, "rows1": 64, "rows2": 32}),
    ("glm_prologue_c8", {"tokens": 42, "top_k": 256, "band": 4, "experts": 9, "skew": 2, "rows2": 128}),
]


@pytest.mark.parametrize(
    ("kernel", "options"), _CASES, ids=[f"{name[4:]}-{o['tokens']}-{o.get('band', 0)}" for name, o in _CASES]
)
def test_kernel_is_right_under_random_timing(check_program: Path, kernel: str, options: dict[str, int]) -> None:
    done = run_check(check_program, kernel, seed=SEED, **options)
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"
    assert "ok" in done.stdout


# What blocks ask into L2 before they can know, as corners of boxes: item n is expert n's, in the order of the items.
def _split(width: int, hidden: int, experts: int, grid: int, early: int) -> list[tuple[int, ...]]:
    blocks = width // 192
    return [
        (128 * step, half * width + item % blocks * 192 + box, item // blocks)
        for item in range(min(grid, experts * blocks))
        for step in range(min(early, hidden // 128))
        for half in (0, 1)
        for box in (0, 96)
    ]


def _quarter(width: int, hidden: int, experts: int, grid: int, early: int) -> list[tuple[int, ...]]:
    return [
        (128 * step, 48 * rank, 0, expert)
        for expert in range(min(grid // 4, experts))
        for rank in range(4)
        for step in range(min(early, hidden // 128))
    ]


def _second(columns: int, hidden: int, slice_: int, experts: int, items: int) -> Iterator[tuple[int, int]]:
    """(expert, column) of the first items: slice by slice, expert by expert, part by part."""
    whole = (
        (expert, column)
        for first in range(0, hidden, slice_)
        for expert in range(experts)
        for column in range(first, first + slice_, columns)
    )
    return itertools.islice(whole, items)


def _turns(width: int, hidden: int, experts: int, grid: int, early: int) -> list[tuple[int, ...]]:
    items = _second(256, hidden, 256, experts, grid * early)
    return [(0, column, 3 * stage, expert) for expert, column in items for stage in range(width // 192)]


def _ring(width: int, hidden: int, experts: int, grid: int, early: int) -> list[tuple[int, ...]]:
    items = _second(128, hidden, 256, experts, grid * early)
    return [(k, column, expert) for expert, column in items for k in range(0, width, 128)]


def _sum(width: int, hidden: int, experts: int, grid: int, early: int) -> list[tuple[int, ...]]:
    items = _second(256, hidden, 256, experts, grid * early)
    return [(k, column + box, expert) for expert, column in items for k in range(0, width, 128) for box in (0, 128)]


@pytest.mark.parametrize(
    ("kernel", "expected", "shape"),
    [
        ("gemm1_row_split", _split, {"hidden": 512, "grid": 5, "early": 2}),
        ("gemm1_row_split", _split, {"hidden": 256, "grid": 9, "early": 6}),  # fewer steps and experts
        ("gemm1_columns_split", _split, {"hidden": 512, "width": 384, "grid": 5, "early": 1}),
        ("gemm1_row_quarter", _quarter, {"hidden": 512, "grid": 8, "early": 3}),
        ("gemm1_row_quarter", _quarter, {"hidden": 256, "grid": 32, "early": 9}),
        ("gemm2_turns_lanes_n256", _turns, {"hidden": 512, "grid": 4, "early": 2}),
        ("gemm2_turns_lanes_n256", _turns, {"hidden": 512, "width": 384, "grid": 5, "early": 5}),  # fewer items
        ("gemm2_ring_n128", _ring, {"hidden": 512, "grid": 4, "early": 3}),
        ("gemm2_sum_n256", _sum, {"hidden": 512, "width": 384, "grid": 3, "early": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_asked_for_early_are_those_of_the_first_items_and_change_no_result(
    check_program: Path, kernel: str, expected: Callable[..., list[tuple[int, ...]]], shape: dict[str, int]
) -> None:
    shape = {"width": 192, "experts": 6, "top_k": 8, "tokens": 30, **shape}
    done = run_check(check_program, f"glm_{kernel}", seed=SEED, **shape)
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("asked")]
    asked = sorted(tuple(map(int, line.split()[1:])) for line in lines)
    assert asked == sorted(expected(**{name: shape[name] for name in ("width", "hidden", "experts", "grid", "early")}))


@pytest.mark.parametrize("timing", [0, 1], ids=["eager", "late"])
@pytest.mark.parametrize(
    "kernel",
    [
        "glm_gemm1_row_c1",
        "glm_gemm1_row_split",
        "glm_gemm1_row_split_l2",
        "glm_gemm1_row_quarter",
        "glm_gemm2_sum_n128",
        "glm_gemm1_decode_t16",
        "glm_gemm2_decode_t16",
    ],
)
def test_extreme_timings_give_the_same(check_program: Path, kernel: str, timing: int) -> None:
    done = run_check(check_program, kernel, timing=timing, seed=SEED, tokens=40, grid=2)
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("macro", ["GLM_STATIC_TILES", "GLM_IN_ORDER", "GLM_WHOLE_TILES"])
def test_tiles_by_turns_or_in_order_are_as_right(changed_kernel: Callable[..., Path], macro: str) -> None:
    file = "gemm1_split.cu"
    program = changed_kernel(file, '#include "ablation.cuh"', f'#define {macro}\n#include "ablation.cuh"', file)
    done = run_check(program, "glm_gemm1_row_split", seed=SEED, tokens=300, skew=1, experts=40, grid=4)
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("timing", [0, 1], ids=["eager", "late"])
@pytest.mark.parametrize(
    "kernel", [f"glm_gemm2_{name}" for name in ("sum_n128", "sum_n256", "ring_n128", "ring_n256", "turns_lanes_n256")]
)
@pytest.mark.parametrize("band", [0, 32])
def test_extreme_timings_give_the_same_by_bands_or_without(check_program: Path, kernel: str, timing: int, band: int) -> None:
    shape = {"tokens": 72, "hidden": 512, "slice": 256, "band": band, "top_k": 2 if "_sum_" in kernel else 8}
    done = run_check(check_program, kernel, timing=timing, seed=SEED, grid=2, **shape)
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("shape", [{"tokens": 100}, {"tokens": 280, "skew": 1, "experts": 9, "hidden": 1536}])
def test_rows_by_quarters_have_the_bits_of_whole_ones_at_any_timing_and_grid(
    check_program: Path, shape: dict[str, int]
) -> None:
    bits = set()
    runs = (("row_c1", 2, 3), ("row_split", 2, 5), *(("row_quarter", timing, 4 * (1 + timing)) for timing in (0, 1, 2)))
    for schedule, (which, timing, grid) in enumerate(runs, start=SEED + 1):
        more = {"schedule": schedule, "timing": timing, "grid": grid, **shape}
        done = run_check(check_program, f"glm_gemm1_{which}", seed=SEED, **more)
        assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"
        bits |= {line for line in done.stdout.splitlines() if line.startswith("bits ")}
    assert len(bits) == 1, bits


@pytest.mark.parametrize("band", [0, 64])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [("sum_n128", {"slice": 128}), ("ring_n128", {"slice": 256, "top_k": 8}), ("turns_lanes_n256", {"slice": 256, "top_k": 8})],
)
def test_sums_of_16_tokens_are_as_right(
    changed_kernel: Callable[..., Path], kernel: str, options: dict[str, int], band: int
) -> None:
    file, source = "gemm2_phases.cuh", "gemm2_turns.cu" if "turns" in kernel else "gemm2_prefill.cu"
    program = changed_kernel(file, "#define GLM_SUM_TOKENS 32", "#define GLM_SUM_TOKENS 16", source)
    for timing in (0, 1, 2):
        shape = {"tokens": 150, "hidden": 512, "band": band, **options}
        done = run_check(program, f"glm_gemm2_{kernel}", seed=SEED, timing=timing, **shape)
        assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("more", [{}, {"band": 32}, {"width": 384, "slice": 512, "invalid": 40}])
def test_partials_through_the_ring_or_by_loads_and_by_turns_give_the_same_bits_at_any_timing_and_grid(
    check_program: Path, more: dict[str, int]
) -> None:
    bits = set()
    runs = (
        *(("sum_n256", 2, 3), ("ring_n256", 0, 1), ("ring_n256", 1, 2), ("ring_n128", 2, 3), ("ring_n128", 1, 4)),
        *(("turns_lanes_n256", 0, 1), ("turns_lanes_n256", 1, 2), ("turns_lanes_n256", 2, 4)),
    )
    for schedule, (which, timing, grid) in enumerate(runs, start=SEED + 1):
        shape = {"tokens": 75, "hidden": 512, "top_k": 8, "schedule": schedule, "timing": timing, "grid": grid, **more}
        done = run_check(check_program, f"glm_gemm2_{which}", seed=SEED, **shape)
        assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"
        bits |= {line for line in done.stdout.splitlines() if line.startswith("bits ")}
    assert len(bits) == 1, bits


@pytest.mark.parametrize(
    "kernel",
    [
        "glm_gemm1_row_c1",
        "glm_gemm1_row_split",
        "glm_gemm1_row_quarter",
        "glm_gemm1_decode_t8",
        "glm_gemm2_sum_n256",
        "glm_gemm2_decode_t8",
        "glm_topk_sum",
        "glm_prologue_c8",
    ],
)
def test_no_valid_pair_writes_nothing_but_zeros(check_program: Path, kernel: str) -> None:
    done = run_check(check_program, kernel, invalid=100, tokens=20, grid=2, seed=SEED)
    # GEMM2 with its sum and topk_sum write zeros, the prologue its counts, the others leave the poison; either is compared.
    assert done.returncode == 0, f"seed={SEED}\n{done.stdout}{done.stderr}"
