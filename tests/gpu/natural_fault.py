#!/usr/bin/env python3
"""The over-read under PyTorch's own allocator, through vllm._custom_ops.cutlass_moe_mm, with and without the patch.

    natural_fault.py OUT.json        with an affected vLLM (0.10.0 - 0.19.1) on the Python path

Nothing is placed by hand: the scales of one step are allocated until one of them is its segment's last block.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import children
import torch
from packaging.version import Version

import vllm_glm_patch

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 160, 8, 5120, 192  # one rank of GLM-4.6-FP8 at tensor parallel 8
SEGMENT = 2 << 20  # bytes; PyTorch's segment for blocks up to 1 MiB


def call_with_last_block(tokens: int, blocks: int, patched: bool) -> dict[str, Any]:
    """Call the grouped GEMM with scales that end where their segment ends; raises where it faults."""
    from vllm import _custom_ops as ops

    if patched:
        states = {p.id: p.state for p in vllm_glm_patch.install().patches}
        if states["scale-overread"] != "applied":
            raise SystemExit(f"the patch is {states['scale-overread']} here")
    generator = torch.Generator(device="cuda").manual_seed(1)
    n, k, rows = 2 * INTERMEDIATE, HIDDEN, tokens * TOP_K
    ids = torch.rand(tokens, EXPERTS, generator=generator, device="cuda").topk(TOP_K, dim=-1).indices
    count = torch.bincount(ids.flatten(), minlength=EXPERTS)
    offset_type = torch.int32 if Version(importlib.metadata.version("vllm")) < Version("0.10.2") else torch.int64
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])[:-1].to(offset_type)
    sizes = torch.stack([count, torch.full_like(count, n), torch.full_like(count, k)], 1).int().contiguous()

    def fp8(*shape: int) -> torch.Tensor:
        return torch.randint(0, 64, shape, generator=generator, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)

    def stride(value: int) -> torch.Tensor:
        return torch.full((EXPERTS,), value, device="cuda", dtype=torch.int64)

    a, b = fp8(rows, k), fp8(EXPERTS, n, k)
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    b_scales = torch.rand(EXPERTS, n, 1, device="cuda")
    at_end = 0
    for scales in [torch.rand(rows, 1, device="cuda") for _ in range(blocks)]:
        if (scales.data_ptr() + -(-rows * 4 // 512) * 512) % SEGMENT:
            continue
        at_end += 1
        torch.cuda.synchronize()
        ops.cutlass_moe_mm(out, a, b, scales, b_scales, first, sizes, stride(k), stride(k), stride(n), True, True)
        torch.cuda.synchronize()
    return {
        "placements_at_a_segment_end": at_end,
        "rows_of_last_expert": int(count[-1]),
        "experts_used": int((count > 0).sum()),
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    import vllm._custom_ops  # noqa: F401  (before the forks, since it is slow)

    rows = []
    for patched in (False, True):
        for tokens in (8190, 8191, 8192, 8193):
            for blocks in (8, 32):
                case = {"patched": patched, "tokens": tokens, "blocks": blocks}
                rows.append(case | children.run(lambda: call_with_last_block(tokens, blocks, patched)))  # noqa: B023
                print(rows[-1], flush=True)
    result = {"vllm": importlib.metadata.version("vllm"), **children.run(children.machine), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    expected = all((r["outcome"] == "fault") == (not r["patched"] and r["tokens"] == 8192) for r in rows)
    print("as expected" if expected else "NOT AS EXPECTED")
    sys.exit(0 if expected else 1)


if __name__ == "__main__":
    main()
