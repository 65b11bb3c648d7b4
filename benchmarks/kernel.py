"""The fused MoE layer: checked against float64 first, then timed against upstream's, in one process, alternating.

    python benchmarks/kernel.py --out $OUT/kernel.json [--vllm SITE] [--shapes TP8,EP8] [--tokens 1,64,8192]
    python benchmarks/kernel.py --check --out $OUT/check.json        # correctness only

SITE is a folder with an importable vLLM 0.26.0 (shared/GPU_LAB.md says how to carry one); without it only ours is timed.
Times are medians of CUDA-graph replays, microseconds of the whole layer: bf16 tokens in, reduced bf16 out. A graph makes
the call on several inputs where one input's weights would stay in L2; both sides get the same inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

import torch

from vllm_glm_patch.moe import fused_moe_fp8, generators, workspace_bytes
from vllm_glm_patch.moe.dispatch import choose, read_card
from vllm_glm_patch.moe.op import problem_of
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe, relative_error
from vllm_glm_patch.moe.timing import capture, replay_times
from vllm_glm_patch.moe.workspace import TOKENS_PER_PASS, layout

SHAPES = {
    "TP8": Problem(1, intermediate_size=192),
    "TP4": Problem(1, intermediate_size=384),
    "TP2": Problem(1, intermediate_size=768),
    "TP1": Problem(1, intermediate_size=1536),
    "EP8": Problem(1, intermediate_size=1536, experts=20),
}
TIMED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
# Tile edges, the multiples of 16 that upstream over-reads at, and the full scheduler step and its neighbours.
BOUNDARIES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513, 1024, 2047, 4096, 8190, 8191, 8192, 8193]


def facts(site: str | None) -> dict[str, str]:
    """What the numbers depend on besides the code."""
    import triton

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "unknown"

    found = {
        "card": torch.cuda.get_device_name(),
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("COMMIT") or run("git", "rev-parse", "HEAD"),
        "vllm": "none",
    }
    if site:
        import vllm

        found["vllm"] = vllm.__version__
    return found


def check(problem: Problem, weights: tuple[torch.Tensor, ...], seed: int, routing: generators.Routing) -> dict[str, Any]:
    """One call under poisoned output and workspace, twice; error against float64 with and without FP8 steps."""
    inputs = generators.make_inputs(problem, seed, routing, "cuda", weights)
    problem_of(*inputs.positional(), inputs.expert_map)
    outs = []
    for poison in (0xFF, 0x7F):
        out = torch.full_like(inputs.hidden_states, float("nan"))
        workspace = torch.full((workspace_bytes(problem, "cuda"),), poison, dtype=torch.uint8, device="cuda")
        fused_moe_fp8(*inputs.positional(), expert_map=inputs.expert_map, out=out, workspace=workspace)
        outs.append(out)
    exact = fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=False)
    steps = fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=True)
    error, step_error = relative_error(outs[0], exact), relative_error(outs[0], steps)
    same = torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16))
    if not bool(exact.any()):  # no id named an expert
        error = step_error = 0.0 if not outs[0].any() else float("inf")
    # FP8 steps cost 3 – 4 %; a wrong row, scale or weight costs far more. Against the same steps little is left.
    good = error < 0.06 and step_error < 0.03 and same
    return {
        "tokens": problem.tokens,
        "routing": routing,
        "error": error,
        "error_to_fp8_steps": step_error,
        "repeats": same,
        "good": good,
    }


def time_layer(problem: Problem, weights: tuple[torch.Tensor, ...], seed: int, upstream: bool, replays: int) -> dict[str, Any]:
    """Median µs of ours and of each upstream backend, alternating, and both errors on the first input."""
    count = 8 if problem.tokens <= 16 else 4 if problem.tokens <= 256 else 1
    sets = [generators.make_inputs(problem, seed + i, "spread", "cuda", weights) for i in range(count)]
    need = workspace_bytes(problem, "cuda")
    workspace = torch.empty(need, dtype=torch.uint8, device="cuda")
    outs = [torch.empty_like(inputs.hidden_states) for inputs in sets]
    calls: dict[str, list[Any]] = {
        "ours": [
            lambda i=i, o=o: fused_moe_fp8(*i.positional(), expert_map=i.expert_map, out=o, workspace=workspace)
            for i, o in zip(sets, outs)
        ]
    }
    row: dict[str, Any] = {"tokens": problem.tokens}
    if upstream:
        from upstream_moe import backends

        wide = 2 * problem.pairs * max(problem.hidden_size, 2 * problem.intermediate_size)
        space = torch.empty(wide, dtype=torch.bfloat16, device="cuda")
        for inputs in sets:
            for name, call in backends(inputs, space).items():
                calls.setdefault(name, []).append(call)
    exact = fused_moe(*sets[0].positional(), expert_map=sets[0].expert_map, quantised=False)
    graphs, errors = {}, {}
    for name, some in calls.items():
        try:
            errors[name] = relative_error(some[0](), exact)
            graphs[name] = capture(some)
        except Exception as error:
            if "illegal" in str(error):
                raise
            row[f"{name}_failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    del exact
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(4):
        for name, graph in graphs.items():
            times[name] += replay_times(graph, replays)
    us = {name: statistics.median(found) / count for name, found in times.items()}
    row |= {f"{name}_us": round(value, 2) for name, value in us.items()}
    row["error"] = errors["ours"]
    others = {name: us[name] for name in us if name != "ours"}
    if others:
        best = min(others, key=lambda name: others[name])
        row |= {"best_upstream": best, "ratio": round(others[best] / us["ours"], 3), "upstream_error": errors[best]}
    part = dataclasses.replace(problem, tokens=min(problem.tokens, TOKENS_PER_PASS))
    config = choose(part, read_card(torch.cuda.current_device()))
    row["backend"] = "triton"
    row["config"] = config.to_dict()
    row["workspace_mb"] = round(layout(part, config).total / 1e6, 1)
    row["sets"] = count
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm", metavar="SITE")
    parser.add_argument("--shapes", default="TP8")
    parser.add_argument("--tokens", default=",".join(map(str, TIMED)))
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--no-check", action="store_true", help="timing only")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    stop = time.monotonic() + options.seconds
    if options.vllm:
        sys.path.insert(0, options.vllm)
    result: dict[str, Any] = {**facts(options.vllm), "seed": options.seed, "checks": [], "rows": []}
    failed = 0

    def flush() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    print({key: result[key] for key in ("card", "driver", "torch", "triton", "commit", "vllm", "seed")}, flush=True)
    for shape in options.shapes.split(","):
        weights = generators.make_weights(SHAPES[shape], torch.Generator("cuda").manual_seed(options.seed))
        if not options.no_check:
            cases = [(n, "spread") for n in BOUNDARIES]
            cases += [(n, routing) for n in (3, 65, 777) for routing in ("skewed", "collapsed", "bad", "none")]
            for tokens, routing in cases:
                if time.monotonic() > stop:
                    break
                found = check(dataclasses.replace(SHAPES[shape], tokens=tokens), weights, options.seed, routing)
                result["checks"].append({"shape": shape, **found})
                failed += not found["good"]
                if not found["good"]:
                    print("WRONG", shape, found, flush=True)
            done = [c for c in result["checks"] if c["shape"] == shape]
            worst = max((c["error"] for c in done), default=0.0)
            print(f"{shape}: {sum(c['good'] for c in done)} of {len(done)} checks good, worst error {worst:.4f}", flush=True)
            flush()
        if options.check:
            continue
        for tokens in map(int, options.tokens.split(",")):
            if time.monotonic() > stop:
                print("out of time", flush=True)
                break
            problem = dataclasses.replace(SHAPES[shape], tokens=tokens)
            row = {"vllm": result["vllm"], "shape": shape}
            row |= time_layer(problem, weights, options.seed, bool(options.vllm), options.replays)
            result["rows"].append(row)
            flush()
            shown = {key: value for key, value in row.items() if key.endswith(("_us", "ratio", "_failed", "_mb"))}
            print(f"{shape} {tokens:6d} error {row['error']:.4f} / {row.get('upstream_error', 0.0):.4f} {shown}", flush=True)
        del weights
    flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
