#!/usr/bin/env python3
"""vLLM's CUTLASS FP8 MoE layer with and without our patches: same bits for valid ids, what bad ids do, and the cost.

    layer_with_patch.py OUT.json [checks|cost]       with any vLLM 0.10.0 - 0.33.0 on the Python path

Each check runs in a child. Times are CUDA-graph replay medians, both sides alternating in one process.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import torch

import vllm_glm_patch

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 160, 8, 5120, 192  # one rank of GLM-4.6-FP8 at tensor parallel 8
TOKENS = (1, 16, 64, 256, 1024, 4096, 8191, 8192)
BAD = (-1, EXPERTS, 100000, 2**31 - 1, -(2**31), 1 << 20)


class Layer:
    """One MoE layer with random FP8 weights, called through whatever this vLLM offers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(device="cuda").manual_seed(seed)
        self.w1, self.w1_scale = self._weights(2 * INTERMEDIATE, HIDDEN)
        self.w2, self.w2_scale = self._weights(HIDDEN, INTERMEDIATE)

    def _weights(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        fp8 = torch.empty(EXPERTS, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.empty(EXPERTS, rows, 1, device="cuda")
        for expert in range(EXPERTS):
            weight = torch.randn(rows, columns, generator=self.generator, device="cuda") * columns**-0.5
            scale[expert] = weight.abs().amax(1, keepdim=True) / 448
            fp8[expert] = (weight / scale[expert]).to(torch.float8_e4m3fn)
        return fp8, scale

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = torch.randn(tokens, HIDDEN, generator=self.generator, device="cuda").bfloat16()
        logits = torch.rand(tokens, EXPERTS, generator=self.generator, device="cuda")
        weights, ids = logits.topk(TOP_K, dim=-1)
        return hidden, weights / weights.sum(-1, keepdim=True), ids.int()

    def __call__(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        module = _module()
        if hasattr(module, "cutlass_moe_fp8"):
            return module.cutlass_moe_fp8(
                hidden, self.w1, self.w2, weights, ids, self.w1_scale, self.w2_scale, per_act_token=True,
                global_num_experts=EXPERTS,
            )  # fmt: skip
        from vllm import _custom_ops as ops

        tokens = hidden.shape[0]
        output = torch.empty_like(hidden)
        quantised, scales = ops.scaled_fp8_quant(hidden, use_per_token_if_dynamic=True)
        wide = torch.empty(tokens * TOP_K, HIDDEN, device="cuda", dtype=torch.bfloat16)
        by_name = {
            "output": output, "hidden_states": quantised, "w1": self.w1, "w2": self.w2, "topk_ids": ids,
            "topk_weights": weights, "activation": _silu(), "global_num_experts": EXPERTS, "expert_map": None,
            "activation_callable": lambda out, x: torch.ops._C.silu_and_mul(out, x), "w1_scale": self.w1_scale,
            "w2_scale": self.w2_scale, "a1q_scale": scales, "a2_scale": None, "ab_strides1": _stride(HIDDEN),
            "ab_strides2": _stride(INTERMEDIATE), "c_strides1": _stride(2 * INTERMEDIATE), "c_strides2": _stride(HIDDEN),
            "workspace13": wide, "workspace2": torch.empty_like(wide), "expert_num_tokens": None,
            "out_dtype": torch.bfloat16, "per_act_token": True, "per_out_ch": True, "use_batched_format": False,
            "permute_scratch": None,
        }  # fmt: skip
        run = module.run_cutlass_moe_fp8
        run(**{name: by_name[name] for name in inspect.signature(run).parameters})
        return output


def _module() -> Any:
    import importlib

    for name in ("experts.cutlass_moe", "cutlass_moe"):
        try:
            return importlib.import_module(f"vllm.model_executor.layers.fused_moe.{name}")
        except ModuleNotFoundError:
            continue
    raise SystemExit("this vLLM has no CUTLASS MoE")


def _silu() -> Any:
    try:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    except ImportError:
        return "silu"
    return MoEActivation.SILU


def _stride(value: int) -> torch.Tensor:
    return torch.full((EXPERTS,), value, device="cuda", dtype=torch.int64)


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
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: None,
        "scale-overread": lambda: vllm_glm_patch.install(vllm_glm_patch.Settings(disable=("routing-ids",))),
        "every patch": lambda: vllm_glm_patch.install(vllm_glm_patch.Settings()),
    }
    for name, install in variants.items():
        install()
        for _ in range(3):
            layer(hidden, weights, ids)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            layer(hidden, weights, ids)
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
