"""The native Hopper kernels on a card: each step against float64 with a picture of any fault, then times beside Triton's.

    python benchmarks/hopper.py --build --check --out $OUT                  # every kernel, small shapes first
    python benchmarks/hopper.py --build --define GLM_WAIT_LIMIT=400000000LL --check --only row_c1 --out $OUT   # who hangs?
    python benchmarks/hopper.py --out $OUT [--shapes TP8] [--tokens 8192,64] [--seconds 420]
    python benchmarks/hopper.py --out $OUT --tokens 8192,2048 --only "n256 slice 256×2 spread"    # every GEMM1 once
    python benchmarks/hopper.py --build --define GLM_WITHOUT_PRODUCTS --out $OUT …                # GEMMs without a part of them
    python benchmarks/hopper.py --out $OUT --gemm1 row_split --gemm2 ring_n256:256x3,sum_n256:256x3@2048      # these alone
    python benchmarks/hopper.py --out $OUT --only prologue --tokens 1,8,16,64,256,1024,8192   # native against Triton's

The work is done in a child process: one that hangs or dies is killed, reported with the case it was at, and a new one
goes on behind it. `$OUT/hopper.jsonl` has every line as data. Times are medians of CUDA-graph replays in microseconds,
a step's is that step alone; routing is spread. csrc/hopper/ablation.cuh has what `--define` can leave out of GEMM1; build
once more without it afterwards. Nothing here changes which backend serves. A check takes 2 – 4 minutes on a fresh machine,
most of it Triton's compilation of the prologue for each tile height; `--seconds` ends it earlier.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/gpu")]  # before an installed package: --build compiles into this tree

from vllm_glm_patch.moe.problem import GLM_SHAPES as SHAPES  # noqa: E402

PACKAGE = ROOT / "vllm_glm_patch"
SEED = 20261125
PATIENCE = 40.0  # seconds for a case before it counts as hanging


@dataclass(frozen=True)
class Case:
    """One layer to check or to time."""

    shape: str
    tokens: int
    gemm1: str
    gemm2: str
    slice: int = 256
    slots: int = 2
    programmatic: bool = True
    routing: str = "spread"
    experts: int = 0  # 0: the shape's own; fewer are made faster
    band: int = 0  # tokens of a band of gemm2_sum; 0: all
    prologue: str = "triton"
    ids: str = "int32"
    early_steps: int = 0
    early_items: int = 0

    @property
    def text(self) -> str:
        """On one line."""
        by_slices = any(kind in self.gemm2 for kind in ("_sum_", "_ring_", "_turns_"))
        sliced = (f" slice {self.slice}×{self.slots}" if by_slices else "") + ("" if self.programmatic else " no PDL")
        band = f" band {self.band}" if self.band else ""
        prologue = "" if self.prologue == "triton" else f" {self.prologue} prologue"
        early = f" early {self.early_steps}x{self.early_items}" if self.early_steps or self.early_items else ""
        ids = "" if self.ids == "int32" else f" {self.ids}"
        kernels = f"{self.gemm1.removeprefix('glm_')} {self.gemm2[4:]}{sliced}{band}{prologue}{early}"
        return f"{self.shape} M={self.tokens} {kernels} {self.routing}{ids}"


def checks() -> list[Case]:
    """Every kernel, at counts that leave tiles part-filled; small ones first, so that the first fault is the simplest."""
    cases = []
    for rows in (8, 16, 32, 64):
        pair = (f"glm_gemm1_decode_t{rows}", f"glm_gemm2_decode_t{rows}")
        cases += [
            Case("TP8", 1, *pair, experts=16),
            Case("TP8", 3 * rows, *pair, experts=16, routing="bad"),
            Case("TP4", 3 * rows, *pair, experts=16, programmatic=False),
        ]
    cases += [Case("EP8", 70, "glm_gemm1_decode_t64", "glm_gemm2_decode_t64")]
    cases += [Case("TP8", 64, "triton", "glm_gemm2_decode_t8", experts=16)]
    second = ("glm_gemm2_sum_n128", "glm_gemm2_sum_n256")
    cases += [
        Case("TP8", 700, "triton", second[0], experts=16, routing="bad"),
        Case("TP4", 333, "triton", second[1], experts=16),
    ]
    variants = ("c1", "split", "split_l2")
    for first in (*(f"{kind}_{variant}" for variant in variants for kind in ("row", "columns")), "exact_c1"):
        for gemm2 in second:
            cases += [
                Case("TP8", 16, f"glm_gemm1_{first}", gemm2, experts=1, routing="collapsed"),
                Case("TP8", 700, f"glm_gemm1_{first}", gemm2, experts=16, routing="bad"),
            ]
    quarter = "glm_gemm1_row_quarter"
    cases += [
        Case("TP8", 16, quarter, second[0], experts=1, routing="collapsed"),
        Case("TP8", 700, quarter, second[1], experts=16, routing="bad"),
        Case("TP8", 700, quarter, second[0], experts=16, routing="none"),
        *(
            Case("TP8", tokens, quarter, second[0], routing=how)
            for tokens in (300, 1024)
            for how in ("spread", "skewed", "bad")
        ),
        Case("TP8", 300, quarter, second[0], programmatic=False),
        Case("TP8", 1024, quarter, second[1], prologue="native"),
        Case("TP8", 1024, quarter, "glm_gemm2_ring_n128", routing="bad", prologue="native"),
        Case("TP8", 1024, quarter, "glm_gemm2_turns_lanes_n256", prologue="native"),
    ]
    cases += early_checks()
    for gemm2 in (f"glm_gemm2_{name}" for name in ("ring_n128", "ring_n256", "turns_lanes_n256")):
        cases += [
            Case("TP8", 16, "glm_gemm1_row_c1", gemm2, experts=8, routing="collapsed"),
            Case("TP8", 700, "glm_gemm1_row_c1", gemm2, experts=16, routing="bad"),
            Case("TP4", 333, "glm_gemm1_columns_c1", gemm2, 512, 2, experts=16),
            Case("EP8", 500, "glm_gemm1_columns_c1", gemm2, 256, 3),
            Case("TP2", 700, "triton", gemm2, experts=16),
            Case("TP8", 8191, "triton", gemm2),
            Case("TP8", 8191, "glm_gemm1_row_c1", gemm2, 512, 2, routing="bad"),
            Case("TP8", 8192, "glm_gemm1_row_c1", gemm2, 256, 3, routing="skewed"),
            Case("TP8", 700, "glm_gemm1_row_c1", gemm2, experts=16, routing="none"),
            Case("TP8", 8191, "glm_gemm1_row_c1", gemm2, 256, 2, routing="skewed", band=1024),
        ]
    for gemm2 in second:
        cases += [
            Case("TP4", 333, "glm_gemm1_columns_c1", gemm2, 512, 2, experts=16),
            Case("EP8", 500, "glm_gemm1_columns_c1", gemm2, 256, 3),
            Case("TP8", 8191, "glm_gemm1_row_c1", gemm2, 256, 2),
            Case("TP8", 8191, "glm_gemm1_row_split", gemm2, 256, 2),
            Case("TP8", 8192, "glm_gemm1_row_split_l2", gemm2, 256, 2, routing="skewed"),
            Case("TP4", 2048, "glm_gemm1_columns_split", gemm2, 256, 2, routing="skewed"),
            Case("TP8", 8192, "glm_gemm1_row_c1", gemm2, 512, 3, routing="skewed"),
        ]
    cases += [
        Case("TP8", 8192, "glm_gemm1_row_c1", "glm_gemm2_sum_n256", 256, 3, band=2048),
        Case("TP8", 8191, "glm_gemm1_row_c1", "glm_gemm2_sum_n128", 256, 2, routing="skewed", band=1024),
        Case("TP8", 700, "glm_gemm1_row_c1", "glm_gemm2_sum_n256", 256, 2, routing="bad", experts=16, band=256),
    ]
    return cases + prologue_checks()


def early_checks() -> list[Case]:
    """Weights asked for before they are known to be needed: for the right experts, for wrong ones, and more than there are."""
    row, columns, turns = "glm_gemm1_row_split", "glm_gemm1_columns_split", "glm_gemm2_turns_lanes_n256"
    quarter, early = "glm_gemm1_row_quarter", {"prologue": "native", "early_steps": 8, "early_items": 4}
    return [
        Case("TP8", 300, row, turns, **early),
        Case("TP8", 700, quarter, turns, routing="bad", **early),
        Case("TP8", 4096, row, turns, routing="skewed", **early),
        Case("TP8", 700, row, turns, routing="none", experts=16, **early),
        Case("TP4", 333, columns, "glm_gemm2_ring_n256", experts=16, **{**early, "prologue": "triton"}),
        Case("EP8", 500, columns, "glm_gemm2_sum_n128", **{**early, "early_steps": 99, "early_items": 99}),
    ]


def prologue_checks() -> list[Case]:
    """The native prologue, to the bit as Triton's: one block and a cluster of them, on both sides of the limit, all kinds of
    ids, an expert map, bands; and before each kind of GEMM1."""
    t8, t16 = ((f"glm_gemm1_decode_t{rows}", f"glm_gemm2_decode_t{rows}") for rows in (8, 16))
    row = ("glm_gemm1_row_c1", "glm_gemm2_sum_n256")

    def case(shape: str, tokens: int, kernels: tuple[str, str], **more: Any) -> Case:
        return Case(shape, tokens, *kernels, prologue="native", **more)

    return [
        case("TP8", 1, t8),
        case("TP8", 64, t8, routing="bad", ids="int64"),
        case("TP8", 128, t16, routing="skewed"),
        case("TP8", 129, t16, routing="bad"),
        case("TP8", 64, t8, routing="none", experts=16),
        dataclasses.replace(case("TP8", 64, t8, routing="bad"), prologue="native_c8"),
        dataclasses.replace(case("TP8", 300, t16, ids="int64"), prologue="native_c1"),
        case("EP8", 70, t8, routing="bad"),
        case("EP8", 700, ("glm_gemm1_columns_c1", row[1]), ids="int64"),
        case("TP8", 1024, ("triton", row[1]), routing="bad", experts=16),
        case("TP8", 8192, row, routing="bad"),
        case("TP8", 8191, row, routing="skewed", band=1024),
        case("TP8", 9000, ("triton", row[1]), ids="int64"),  # more pairs a warp than a chunk has
    ]


def timed(shape: str, tokens: int) -> list[Case]:
    """What to time: the first case's steps are all timed, of the others only those that differ. Last, with the native prologue,
    what the rules of thumb take there; `Worker.time` adds the same layer with Triton's. Near the limit between one routing
    block and a cluster either is timed."""
    from vllm_glm_patch.moe.hopper.backend import default_config

    usual = default_config(SHAPES[shape].with_tokens(tokens))
    kinds = ["native_c1", "native_c8"] if 16 <= tokens <= 1024 else ["native"]
    return [
        *gemms_timed(shape, tokens),
        *quarters_timed(shape, tokens),
        *(Case(shape, tokens, usual.gemm1, usual.gemm2, usual.slice, usual.slots, prologue=kind) for kind in kinds),
    ]


def quarters_timed(shape: str, tokens: int) -> list[Case]:
    """GEMM1 by quarters of tiles, where an expert gets few rows: after Triton's prologue, and after the native one, under whose
    end it starts unless it is told not to."""
    if SHAPES[shape].intermediate_size != 192 or not 256 <= tokens <= 2048:
        return []
    first = "glm_gemm1_row_quarter"
    second = [("glm_gemm2_sum_n128", 128, 3), ("glm_gemm2_ring_n128", 256, 3)]
    cases = [Case(shape, tokens, first, *gemm2, prologue=prologue) for gemm2 in second for prologue in ("triton", "native")]
    return [*cases, Case(shape, tokens, first, *second[0], prologue="native", programmatic=False)]


def gemms_timed(shape: str, tokens: int) -> list[Case]:
    """GEMMs to time, before all of which Triton's prologue goes."""
    from vllm_glm_patch.moe.hopper import candidates

    width = SHAPES[shape].intermediate_size
    density = tokens * 8 / 160
    cases = []
    if density <= 64:
        for rows in candidates.heights(density):
            pair = (f"glm_gemm1_decode_t{rows}", f"glm_gemm2_decode_t{rows}")
            cases += [Case(shape, tokens, *pair), Case(shape, tokens, *pair, programmatic=False)]
            cases += [Case(shape, tokens, "triton", pair[1])]
    if density >= 16:
        kind = "row" if width == 192 else "columns"
        variants = [f"glm_gemm1_{kind}_{variant}" for variant in ("c1", "split", "split_l2")]
        first = [*variants, "glm_gemm1_exact_c1", "triton"]
        second = [sliced for sliced in candidates.SLICES if sliced != ("sum_n256", 256, 2)]
        if tokens >= 1024:
            second += candidates.RINGS
        cases += [Case(shape, tokens, name, "glm_gemm2_sum_n256", 256, 2) for name in first]
        cases += [Case(shape, tokens, first[0], f"glm_gemm2_{name}", width_, slots) for name, width_, slots in second]
    if tokens > 2048:
        banded = [("n256", 256, slots, 2048) for slots in (2, 3, 4)]
        banded += [("n128", 128, 3, 4096), ("n128", 128, 4, 4096), ("n128", 256, 3, 2048), ("n256", 512, 2, 2048)]
        banded += [("n256", 256, 3, 4096)]
        cases += [
            Case(shape, tokens, first[0], f"glm_gemm2_sum_{name}", width_, slots, band=band)
            for name, width_, slots, band in banded
            if band < tokens
        ]
        cases += [Case(shape, tokens, "triton", "glm_gemm2_sum_n256", 256, 3, band=2048)]
    return cases


def named(shape: str, tokens: int, gemm1: str, gemm2: str, prologue: str, programmatic: bool, early: str = "0x0") -> list[Case]:
    """One GEMM1 before each of a list of GEMM2, `name:slicexslots` or `name:slicexslots@band`, with each of a list of early
    weights, `stepsxitems`."""
    cases = []
    pairs = [word.partition("x") for word in early.split(",")]
    if not all(steps.isdigit() and items.isdigit() for steps, _, items in pairs):
        raise SystemExit(f"--early is {early!r}; name each as 4x2, K steps of GEMM1 and items of GEMM2")
    for word in gemm2.split(","):
        name, _, sizes = word.partition(":")
        sliced, _, band = sizes.partition("@")
        slice_, _, slots = sliced.partition("x")
        if not (slice_.isdigit() and slots.isdigit() and (band or "0").isdigit()):
            raise SystemExit(
                f"--gemm2 has {word!r}; name each as ring_n256:256x3, with @2048 behind it for bands of 2048 tokens"
            )
        first = gemm1 if gemm1 == "triton" else f"glm_gemm1_{gemm1}"
        second = f"glm_gemm2_{name}"
        case = Case(shape, tokens, first, second, int(slice_), int(slots), programmatic, band=int(band or 0), prologue=prologue)
        cases += [dataclasses.replace(case, early_steps=int(steps), early_items=int(items)) for steps, _, items in pairs]
    return cases


def left_out(case: Case, native: Any, shared_memory: int) -> str:
    """Why a case cannot be launched on a card with so many bytes of shared memory a block, known beforehand; "" where it can.

    The launcher's kernels always fit (abi.h: gemm2_decode_consumers gives up a warpgroup first). Triton's GEMM1 takes the tile
    height of the GEMM2 that follows, whatever its pipeline then needs.
    """
    from vllm_glm_patch.moe.hopper.backend import triton_config
    from vllm_glm_patch.moe.tune import _gemm1_bytes

    if case.gemm1 != "triton":
        return ""
    problem = SHAPES[case.shape].with_tokens(case.tokens)
    gemm1 = triton_config(problem, config_of(case), native).gemm1
    needs = _gemm1_bytes(problem, gemm1)
    if needs <= shared_memory:
        return ""
    return (
        f"Triton's GEMM1 with tiles of {gemm1.block_m} rows, as {case.gemm2} reads them, needs {needs} bytes of shared memory, "
        f"and this card gives a block {shared_memory}"
    )


def config_of(case: Case) -> Any:
    """As the backend takes it."""
    from vllm_glm_patch.moe.hopper.backend import HopperConfig

    both = {field.name for field in dataclasses.fields(HopperConfig)} & {field.name for field in dataclasses.fields(Case)}
    return HopperConfig(**{name: getattr(case, name) for name in both})


def build(defines: list[str]) -> None:
    """Compile the launcher and the cubins into the source tree, with these macros added for this once."""
    flags = ROOT / "csrc/hopper/flags.txt"
    before = flags.read_text()
    try:
        flags.write_text(before + "".join(f"-D{define}\n" for define in defines))
        run_cmake(ROOT / "build/hopper")
    finally:
        flags.write_text(before)


def run_cmake(folder: Path) -> None:
    """Configure, build, install; SystemExit with what the compiler said."""
    for command in (
        ["cmake", "-S", ROOT / "csrc/hopper", "-B", folder, "-G", "Ninja"],
        ["cmake", "--build", folder],
        ["cmake", "--install", folder, "--prefix", PACKAGE],
    ):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command[0]} {command[1]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


class Worker:
    """What the child does; torch is imported only there."""

    def __init__(self) -> None:
        import torch

        from vllm_glm_patch.moe.dispatch import read_card
        from vllm_glm_patch.moe.hopper.library import loader

        self.torch = torch
        self.native = loader().on(0)
        self.card = read_card(0)
        self._weights: dict[tuple[Any, ...], Any] = {}
        self._known: dict[str, float] = {}
        print(f"compiled by {loader().compiler(0)}, {self.card.name}, {self.card.multiprocessors} SMs", flush=True)

    def stream(self) -> int:
        """Address of the current stream."""
        return int(self.torch.cuda.current_stream().cuda_stream)

    def inputs(self, case: Case, seed: int = SEED) -> Any:
        """The case's tensors; weights are kept from case to case."""
        from vllm_glm_patch.moe.generators import make_inputs, make_weights

        base = SHAPES[case.shape]
        experts = case.experts or base.experts
        whole = base.global_experts if case.shape == "EP8" else experts
        problem = dataclasses.replace(
            base, tokens=case.tokens, experts=experts, global_experts=whole, top_k=min(base.top_k, whole)
        )
        key = (problem.intermediate_size, experts)
        if key not in self._weights:
            self._weights.clear()
            self._weights[key] = make_weights(problem, self.torch.Generator("cuda").manual_seed(SEED))
        made = make_inputs(problem, seed, case.routing, "cuda", self._weights[key])  # type: ignore[arg-type]
        return dataclasses.replace(made, topk_ids=made.topk_ids.to(getattr(self.torch, case.ids)))

    def check(self, case: Case) -> dict[str, Any]:
        """Every step against float64, and the same bits twice."""
        from hopper_stages import check_layer

        report = check_layer(self.native, self.inputs(case), config_of(case), self.card.multiprocessors, self.stream)
        return {"case": case.text, "wrong": report.wrong, "lines": report.lines}

    def passes(self, case: Case) -> tuple[list[Any], list[Any]]:
        """(native passes, Triton's passes) on the same inputs; several where one input's weights would stay in L2."""
        from vllm_glm_patch.moe.dispatch import choose
        from vllm_glm_patch.moe.hopper.backend import HopperPass, workspace_bytes
        from vllm_glm_patch.moe.pipeline import Pass, Tensors
        from vllm_glm_patch.moe.workspace import layout

        torch, native, triton = self.torch, [], []
        for index in range(4 if case.tokens <= 64 else 1):
            i = self.inputs(case, SEED + index)

            def tensors(i: Any = i) -> Tensors:
                out = torch.full_like(i.hidden_states, float("nan"))
                return Tensors(*i.positional(), i.expert_map, out)

            def space(size: int) -> Any:
                return torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

            config = config_of(case)
            room = space(workspace_bytes(i.problem, config, self.native))
            count = self.card.multiprocessors
            native.append((HopperPass(self.native, i.problem, config, one := tensors(), room, count, self.stream), one, room))
            theirs = choose(i.problem, self.card)
            room = space(layout(i.problem, theirs).total)
            triton.append((Pass(i.problem, theirs, other := tensors(), room, count), other, room))
        return native, triton

    def time(self, case: Case) -> dict[str, Any]:
        """Microseconds of each step and of the layer, ours and Triton's. What was timed before is not timed again."""
        from vllm_glm_patch.moe.reference import relative_error

        native, triton = self.passes(case)
        found: dict[str, Any] = {"case": case.text}
        for (ours, one, _), (theirs, other, _) in zip(native, triton):
            ours.run()
            theirs.run()
            found["against Triton"] = relative_error(one.out, other.out.double())
        sliced = f"{case.gemm2} {case.slice} {case.slots} {case.band}"
        # The prologue lists tiles by bands.
        banded = f"band {case.band}" if case.band else ""
        kernels = {"prologue": f"{banded} {case.prologue}", "gemm1": case.gemm1, "gemm2": sliced}
        for who, passes in (("native", [p for p, _, _ in native]), ("triton", [p for p, _, _ in triton])):
            for index, (name, _) in enumerate(passes[0].steps()):
                kernel = kernels.get(name, "") if who == "native" else ""
                found[f"{who} {name}"] = self.median(f"{case.shape} {case.tokens} {who} {name} {kernel}", passes, index)
            layer = case.text if who == "native" else ""
            found[f"{who} layer"] = self.median(f"{case.shape} {case.tokens} {who} layer {layer}", passes, None)
        if case.prologue != "triton":
            del native, triton, passes
            with_tritons = dataclasses.replace(case, prologue="triton")
            passes = [one for one, _, _ in self.passes(with_tritons)[0]]
            step = f"{case.shape} {case.tokens} native prologue {banded} triton"
            found["Triton's prologue"] = self.median(step, passes, 0)
            layer = f"{case.shape} {case.tokens} native layer {with_tritons.text}"
            found["native layer with it"] = self.median(layer, passes, None)
        return found

    def median(self, key: str, passes: list[Any], index: int | None) -> float:
        """Microseconds of one step of each pass, or for None of the whole passes, after the steps before it have run."""
        from vllm_glm_patch.moe.timing import median_us

        if key not in self._known:
            for one in passes:
                for _, step in one.steps()[:index]:
                    step()
            calls = [one.run if index is None else one.steps()[index][1] for one in passes]
            self._known[key] = round(median_us(calls), 1)
        return self._known[key]


def work(what: str) -> None:
    """The child: cases come as JSON lines, results go as JSON lines."""
    worker = Worker()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            if reason := left_out(case, worker.native, worker.card.shared_memory):
                result = {"case": case.text, "left out": reason}
            else:
                result = worker.check(case) if what == "check" else worker.time(case)
        except Exception as error:
            print(json.dumps({"case": case.text, "error": f"{type(error).__name__}: {error}"}), flush=True)
            raise
        print(json.dumps(result), flush=True)


class Child:
    """A child process whose answers are waited for with a limit."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._log = log.open("a")
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line of data; {"error"} if the child died or took longer than `limit` seconds."""
        end = time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                self.end()
                return {"error": f"HANGS: no answer within {limit:.0f} s"}
            if line is None:
                return {"error": f"DIED: exit status {self._process.wait()}"}
            if line.startswith("{"):
                made: dict[str, Any] = json.loads(line)
                return made
            print(f"      {line.rstrip()}", flush=True)

    def ask(self, case: Case, limit: float) -> dict[str, Any]:
        """Run a case."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
            self._process.stdin.flush()
        except OSError:
            return {"error": f"DIED: exit status {self._process.wait()}"}
        return self.answer(limit)

    def end(self) -> None:
        """Kill it; a kernel that hangs goes with its process."""
        self._process.kill()
        self._process.wait()


def run_cases(
    words: list[str], cases: list[Case], log: Path, end: float, limit: float = PATIENCE
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Results in order; a new child, started by `words`, after each one that hung, died or was wrong. Stops asking at `end`."""
    child: Child | None = None
    for case in cases:
        if time.monotonic() > end:
            yield case, {"error": "no time left"}
            continue
        if child is None:
            child = Child(words, log)
            ready = child.answer(120.0)
            if "error" in ready:
                text = log.read_text()[-1500:]
                raise SystemExit(f"the child does not start: {ready['error']}\n{text}")
        result = child.ask(case, limit)
        # After a wrong result too: a kernel may have spoilt what the next one meets.
        if "error" in result or result.get("wrong"):
            child.end()
            child = None
        yield case, result
    if child is not None:
        child.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument(
        "--define",
        action="append",
        default=[],
        help="with --build: GLM_WAIT_LIMIT=400000000LL, GLM_GATHER_WAITS, GLM_SUM_TOKENS=16, GLM_STATIC_TILES, GLM_IN_ORDER, "
        "GLM_WHOLE_TILES, GLM_WITHOUT_… of csrc/hopper/ablation.cuh",
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="cases whose text has this")
    parser.add_argument("--gemm2", help="time these and nothing else: name:slicexslots[@band],…")
    parser.add_argument("--gemm1", default="row_split", help="with --gemm2: what goes before each")
    parser.add_argument("--prologue", default="native", help="with --gemm2: triton or native")
    parser.add_argument("--early", default="0x0", help="with --gemm2: stepsxitems,… of weights asked into L2 early")
    parser.add_argument("--alone", action="store_true", help="with --gemm2: no dependent launches")
    parser.add_argument("--shapes", default="TP8")
    parser.add_argument("--tokens", default="8192,1024,64,8,1")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for a case before it counts as hanging")
    parser.add_argument("--work", choices=("check", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return 0
    if options.out is None:
        parser.error("--out is needed: a folder for hopper.jsonl and the children's log")
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.build:
        build(options.define)
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    cases = checks() if options.check else []
    if not options.check:
        counts = list(map(int, options.tokens.split(",")))
        for shape in options.shapes.split(","):
            for tokens in counts:
                if options.gemm2:
                    cases += named(
                        shape, tokens, options.gemm1, options.gemm2, options.prologue, not options.alone, options.early
                    )
                else:
                    cases += timed(shape, tokens)
    cases = [case for case in cases if options.only in case.text]
    data = (options.out / "hopper.jsonl").open("a")
    bad = 0
    summary = []
    words = [sys.executable, __file__, "--work", "check" if options.check else "time"]
    for case, result in run_cases(words, cases, options.out / "child.log", start + options.seconds, options.patience):
        data.write(json.dumps({**dataclasses.asdict(case), **result}) + "\n")
        data.flush()
        if "error" in result:
            bad += 1
            summary.append(f"{case.text}: {result['error'][:300]}")
            print(summary[-1], flush=True)
        elif "left out" in result:
            summary.append(f"{case.text}: left out: {result['left out']}")
            print(summary[-1], flush=True)
        elif options.check:
            if result["wrong"]:
                bad += 1
                summary.append(f"{case.text}: {result['wrong']} wrong")
                # Whole pictures of the first faults only: the end of the output is what one sees.
                print("\n".join([case.text, *(result["lines"] if bad <= 6 else result["lines"][:3])]), flush=True)
            else:
                print(f"ok {case.text}: {result['lines'][-1].strip()}", flush=True)
        else:
            steps = {key: value for key, value in result.items() if key != "case"}
            ratio = steps["triton layer"] / steps["native layer"]
            parts = ", ".join(f"{key} {value:.4g}" for key, value in steps.items())
            summary.append(f"{case.text}: {steps['native layer']:.1f} us, Triton / native {ratio:.2f}")
            print(f"{case.text}\n      {parts}", flush=True)
    print(f"\n{len(cases)} cases, {bad} bad, {time.monotonic() - start:.0f} s")
    print("\n".join(summary[-40:]))
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
