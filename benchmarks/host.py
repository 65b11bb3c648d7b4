"""The host's part of one call of the fused MoE operator, without a card: everything but the launches themselves.

    python benchmarks/host.py [--tree TREE] [--tokens 1,64,8192] [--out FILE.json]

Launches are mocked, tensors lie in the CPU's memory and the card is an H100 by its sizes; weights are TP8's. Microseconds of a
call with output and workspace given: the shortest of 120 means over 100 calls, since other work on the machine only adds to it.
In a CUDA graph none of this is paid; without one it delays the launches wherever the card has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="whose vllm_glm_patch is timed")
    parser.add_argument("--tokens", default="1,64,8192")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    sys.path.insert(0, str(options.tree))
    result = {**facts(options.tree), "rows": [row(int(tokens)) for tokens in options.tokens.split(",")]}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def row(tokens: int) -> dict[str, Any]:
    """What one call costs: of the operator's function, and through torch's dispatcher."""
    import torch

    from vllm_glm_patch.moe import op, pipeline
    from vllm_glm_patch.moe.dispatch import Card
    from vllm_glm_patch.moe.problem import GLM_SHAPES

    torch.set_num_threads(1)
    card = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0), 0)
    op._device_index, op.read_card = lambda device: 0, lambda index: card  # type: ignore[assignment]
    launched: list[Any] = []
    given = [value for value in pipeline.Pass.__init__.__defaults__ or () if not callable(value)]  # all but `launch`
    pipeline.Pass.__init__.__defaults__ = (lambda kernel, *_, **__: launched.append(kernel), *given)
    p = GLM_SHAPES["TP8"].with_tokens(tokens)
    fp8 = torch.float8_e4m3fn
    arguments = (
        torch.zeros(tokens, p.hidden_size, dtype=torch.bfloat16),
        torch.empty(p.experts, 2 * p.intermediate_size, p.hidden_size, dtype=fp8),
        torch.empty(p.experts, p.hidden_size, p.intermediate_size, dtype=fp8),
        torch.ones(p.experts, 2 * p.intermediate_size, 1),
        torch.ones(p.experts, p.hidden_size, 1),
        torch.rand(tokens, p.top_k),
        torch.zeros(tokens, p.top_k, dtype=torch.int32),
        None,
        torch.empty(tokens, p.hidden_size, dtype=torch.bfloat16),
        torch.empty(200 << 20, dtype=torch.uint8),
    )
    op._fused_moe_fp8_out(*arguments)
    found = {
        "tokens": tokens,
        "launches": len(launched),  # of one call: this is read before the next
        "function_us": shortest(lambda: op._fused_moe_fp8_out(*arguments)),
        "operator_us": shortest(lambda: torch.ops.vllm_glm_patch.fused_moe_fp8_out(*arguments)),
    }
    print(found, flush=True)
    return found


def shortest(call: Callable[[], object], calls: int = 100, rounds: int = 120) -> float:
    """Microseconds of a call."""
    means = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(means[1:]), 1)


def facts(tree: Path) -> dict[str, Any]:
    """What the numbers belong to."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = models[0].partition(":")[2].strip() if models else ""
    return {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__, "commit": commit}


if __name__ == "__main__":
    main()
