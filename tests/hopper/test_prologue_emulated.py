"""The native prologue without a card: through the launcher, under the emulator, against Triton's in its interpreter, to the
bit, and that against a plain list; random sizes, ids of both widths and of every kind, expert maps, bands."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from emulated import run_cases

SEED = random.SystemRandom().randrange(1 << 20)

_CASES = [
    # tokens, top_k, experts here and in all, kernels, routing, ids; tokens of a band
    (1, 8, 16, 16, "decode_t8", "decode_t8", "spread", "int32"),
    (17, 8, 160, 160, "decode_t16", "decode_t8", "bad", "int64"),
    (128, 8, 5, 40, "decode_t8", "decode_t8", "skewed", "int32"),
    (40, 2, 3, 3, "decode_t64", "decode_t64", "none", "int32"),
    (129, 8, 160, 160, "decode_t8", "decode_t32", "spread", "int64"),
    (200, 8, 20, 160, "triton", "decode_t32", "bad", "int32"),
    (300, 8, 12, 12, "row_split", "sum_n128", "skewed", "int32", 128),
    (290, 8, 9, 18, "row_c1", "sum_n256", "bad", "int64", 128),
    (150, 16, 16, 16, "triton", "sum_n128", "collapsed", "int32", 64),
    (170, 7, 511, 511, "row_c1", "sum_n128", "bad", "int32"),
]


def run_all(launcher: str, driver: str, seed: str) -> None:
    """In a process of its own, under Triton's interpreter: a line of JSON a case."""
    import torch

    from tests.gpu.hopper_stages import Report, compare_prologues
    from vllm_glm_patch.moe.generators import make_expert_map, make_routing, make_tokens
    from vllm_glm_patch.moe.hopper.backend import HopperConfig, HopperPass, band_of, triton_config, workspace_bytes
    from vllm_glm_patch.moe.hopper.native import Native
    from vllm_glm_patch.moe.hopper.prologue import run
    from vllm_glm_patch.moe.pipeline import Pass, Tensors
    from vllm_glm_patch.moe.problem import Problem
    from vllm_glm_patch.moe.reference import local_experts

    native = Native(Path(launcher))
    native.open(driver)
    for source in native.sources:
        native.load(0, source, b"")
    for number, (tokens, top_k, experts, all_experts, first, second, routing, kind, *band) in enumerate(_CASES):
        problem = Problem(tokens, 256, 192, experts, all_experts, top_k)
        generator = torch.Generator().manual_seed(int(seed) + number)
        weights, ids = make_routing(problem, generator, routing)  # type: ignore[arg-type]
        expert_map = make_expert_map(problem, rank=1)
        hidden = make_tokens(problem, generator)
        if kind == "int64":
            ids = ids.to(torch.int64)
            ids[ids < 0] *= 1 << 31  # ids whose low half alone would name an expert, too
            ids.view(-1)[0] = (1 << 32) + 1
        # GEMMs are not run: of their tensors only addresses are needed.
        nothing = torch.zeros(16, dtype=torch.uint8)
        weight = nothing.as_strided((1, 1, 16), (2 * 192 * 256, 16, 1))
        tensors = Tensors(hidden, weight, weight, nothing, nothing, weights, ids, expert_map, torch.empty_like(hidden))
        names = [word if word == "triton" else f"glm_gemm{i}_{word}" for i, word in ((1, first), (2, second))]
        config = HopperConfig(*names, slice=256, slots=2, band=sum(band), prologue="native")
        shared = triton_config(problem, config, native)
        size = workspace_bytes(problem, config, native)
        rooms = [torch.full((size,), 0xFF, dtype=torch.uint8) for _ in range(3)]
        layer = HopperPass(native, problem, config, tensors, rooms[0], 2, lambda: 0)
        report = Report()
        for _ in range(2):  # the second one over what the first has left
            layer.prologue()
            ours, theirs, tritons = (Pass(problem, shared, tensors, room, 2, band=band_of(config, shared)) for room in rooms)
            compare_prologues(report, ours, theirs)
            # As Triton's GEMMs ask for it.
            report.wrong += not (run(native, tritons, 0, 0) and torch.equal(rooms[0], rooms[2]))
        local = local_experts(ids, experts, expert_map).flatten()
        valid = (local >= 0).nonzero()[:, 0]
        want = valid[torch.argsort(local[valid], stable=True)]
        report.wrong += not torch.equal(ours.rows[: len(want)].long(), want)
        result = {"case": number, "wrong": report.wrong, "lines": report.lines, "valid": len(want), "bands": ours.bands}
        print(json.dumps({**result, "names": list(dataclasses.asdict(config).values())}), flush=True)


@pytest.fixture(scope="module")
def results(emulated_libraries: tuple[Path, Path]) -> tuple[dict[int, dict[str, Any]], str]:
    """(result of each case that came to an end, what the process printed otherwise)."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    found, ended = run_cases("test_prologue_emulated", emulated_libraries, SEED)
    return found, f"seed {SEED}, {ended}"


@pytest.mark.parametrize("case", range(len(_CASES)), ids=["-".join(map(str, c)) for c in _CASES])
def test_native_prologue_is_tritons_to_the_bit(results: tuple[dict[int, dict[str, Any]], str], case: int) -> None:
    found, otherwise = results
    assert case in found, otherwise
    result = found[case]
    assert result["wrong"] == 0, f"seed {SEED}: " + "\n".join(result["lines"])
    assert len(result["lines"]) == 2
    assert ("band_tiles" in result["lines"][0]) == (result["bands"] > 1) == (len(_CASES[case]) > 8)
    assert (result["valid"] == 0) == (_CASES[case][6] == "none")
