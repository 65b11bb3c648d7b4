#!/usr/bin/env python3
"""vLLM's CUTLASS FP8 MoE layer with and without our patches: same bits for valid ids, what bad ids do, and the cost.

    layer_with_patch.py OUT.json [checks|cost]       with any vLLM 0.10.0 - 0.33.0 on the Python path

Each check runs in a child. Times are CUDA-graph replay medians, both sides alternating in one process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import torch

import vllm_glm_patch
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.tools import vllm_moe

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 160, 8, 5120, 192  # one rank of GLM-4.6-FP8 at tensor parallel 8
TOKENS = (1, 16, 64, 256, 1024, 4096, 8191, 8192)
BAD = (-1, EXPERTS, 100000, 2**31 - 1, -(2**31), 1 << 20)


class Layer:
    """One MoE layer with random FP8 weights, called through whatever this vLLM offers."""

    def __init__(self, seed: int, device: str = "cuda") -> None:
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.w1, self.w1_scale = self._weights(2 * INTERMEDIATE, HIDDEN)
        self.w2, self.w2_scale = self._weights(HIDDEN, INTERMEDIATE)

    def _weights(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        fp8 = torch.empty(EXPERTS, rows, columns, device=self.device, dtype=torch.float8_e4m3fn)
        scale = torch.empty(EXPERTS, rows, 1, device=self.device)
        for expert in range(EXPERTS):
            weight = torch.randn(rows, columns, generator=self.generator, device=self.device) * columns**-0.5
            scale[expert] = weight.abs().amax(1, keepdim=True) / 448
            fp8[expert] = (weight / scale[expert]).to(torch.float8_e4m3fn)
        return fp8, scale

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = torch.randn(tokens, HIDDEN, generator=self.generator, device=self.device).bfloat16()
        logits = torch.rand(tokens, EXPERTS, generator=self.generator, device=self.device)
        weights, ids = logits.topk(TOP_K, dim=-1)
        return hidden, weights / weights.sum(-1, keepdim=True), ids.int()

    def call(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A call of this vLLM's layer as it is now, patched or not; all that it needs but the layer's own buffers is made."""
        problem = Problem(len(hidden), HIDDEN, INTERMEDIATE, EXPERTS, EXPERTS, TOP_K)
        given = vllm_moe.Layer(problem, hidden, self.w1, self.w2, self.w1_scale, self.w2_scale, weights, ids)
        module = _module()
        if hasattr(module, "cutlass_moe_fp8"):
            return vllm_moe.cutlass_moe_fp8(module.cutlass_moe_fp8, given)
        width = vllm_moe.workspace_width(problem)
        spaces = [torch.empty(problem.pairs, width, device=hidden.device, dtype=torch.bfloat16) for _ in range(2)]
        return vllm_moe.run_cutlass_moe_fp8(module.run_cutlass_moe_fp8, given, spaces[0], spaces[1])

    def __call__(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.call(hidden, weights, ids)()


def _module() -> Any:
    for name in vllm_moe.CUTLASS:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit("this vLLM has no CUTLASS MoE")


def reference(layer: Layer, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float64, no quantisation of activations; an id out of range contributes nothing."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        w1 = layer.w1[expert].double() * layer.w1_scale[expert].double()
        w2 = layer.w2[expert].double() * layer.w2_scale[expert].double()
        gate, up = (hidden[token].double() @ w1.T).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ w2.T
        out.index_add_(0, token, result * weights[token, slot].double()[:, None])
    return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def same_bits(tokens: int) -> dict[str, Any]:
    """Outputs for valid ids with and without every patch, and the error of both."""
    layer = Layer(tokens)
    hidden, weights, ids = layer.inputs(tokens)
    load = torch.bincount(ids.flatten().long(), minlength=EXPERTS)
    plain = layer(hidden, weights.clone(), ids)
    vllm_glm_patch.install()
    patched = layer(hidden, weights.clone(), ids)
    vllm_glm_patch.uninstall()
    plain, patched = plain.view(tokens, -1, HIDDEN).squeeze(1), patched.view(tokens, -1, HIDDEN).squeeze(1)
    return {
        "tokens": tokens, "equal": torch.equal(plain, patched), "experts_used": int((load > 0).sum()),
        "error": relative(patched, reference(layer, hidden, weights, ids)),
    }  # fmt: skip


def bad_ids(tokens: int, patched: bool, share: float) -> dict[str, Any]:
    """Ids out of range: the error over tokens that have one, over the others, and whether the others keep their bits."""
    layer = Layer(tokens + 1)
    hidden, weights, ids = layer.inputs(tokens)
    good = layer(hidden, weights.clone(), ids).view(tokens, HIDDEN)
    touched = torch.rand(ids.shape, generator=layer.generator, device="cuda") < share
    touched[-1] = True  # one token without any valid id
    which = torch.randint(0, len(BAD), ids.shape, generator=layer.generator, device="cuda")
    bad = torch.where(touched, torch.tensor(BAD, device="cuda", dtype=torch.int32)[which], ids)
    if patched:
        vllm_glm_patch.install()
    found = layer(hidden, weights.clone(), bad).view(tokens, HIDDEN)
    torch.cuda.synchronize()
    expected = reference(layer, hidden, weights, bad)
    some = touched.any(1)
    none = touched.all(1)
    return {
        "tokens": tokens, "tokens_with_bad_ids": int(some.sum()), "finite": bool(found.isfinite().all()),
        "error_with_bad_ids": relative(found[some & ~none], expected[some & ~none]) if (some & ~none).any() else None,
        "largest_without_any_valid_id": found[none].abs().max().item(),
        "others_keep_their_bits": torch.equal(found[~some], good[~some]),
    }  # fmt: skip


def cost(tokens: int) -> dict[str, Any]:
    """CUDA-graph medians of the layer: plain, with the slack alone, with every patch."""
    layer = Layer(3)
    hidden, weights, ids = layer.inputs(tokens)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    calls: list[Callable[[], torch.Tensor]] = []
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: None,
        "scale-overread": lambda: vllm_glm_patch.install(vllm_glm_patch.Settings(disable=("routing-ids",))),
        "every patch": lambda: vllm_glm_patch.install(vllm_glm_patch.Settings()),
    }
    for name, install in variants.items():
        install()
        call = layer.call(hidden, weights, ids)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
        calls.append(call)  # with the buffers that the graph uses
        vllm_glm_patch.uninstall()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(60):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 200)
    return {"tokens": tokens, **{f"{name} us": round(statistics.median(t), 2) for name, t in times.items()}}


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    which = sys.argv[2] if len(sys.argv) == 3 else "checks cost"
    _module()
    result: dict[str, Any] = {"vllm": importlib.metadata.version("vllm"), **children.run(children.machine)}
    if "checks" in which:
        result |= checks()
    if "cost" in which:
        result["cost"] = [_show(children.run(lambda: cost(t))) for t in TOKENS]  # noqa: B023
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


def checks() -> dict[str, Any]:
    result: dict[str, Any] = {}
    result["same_bits"] = [_show(children.run(lambda: same_bits(t))) for t in TOKENS]  # noqa: B023
    result["bad_ids"] = []
    for patched in (False, True):
        for tokens, share in ((64, 0.001), (64, 0.3), (8192, 0.00001), (8192, 0.1)):
            row = children.run(lambda: bad_ids(tokens, patched, share))  # noqa: B023
            result["bad_ids"].append(_show({"patched": patched, "share": share, **row}))
    return result


def _show(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
