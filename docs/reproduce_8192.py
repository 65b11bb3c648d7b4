#!/usr/bin/env python3
"""vLLM 0.10.0 to 0.19.1 on Hopper: cutlass_moe_mm reads past its per-token scales, and a step of 8192 tokens dies of it.

    python reproduce_8192.py [TOKENS ...]      needs vLLM, its torch and one card; nothing is placed by hand

GEMM1 of GLM-4.6-FP8's MoE layer, one rank at tensor parallel 8, called as vLLM calls it, with scales from PyTorch's own
allocator. Each token count runs in a process of its own. Exit code 1: a call faulted.
"""

import os
import sys

import torch
import vllm
from vllm import _custom_ops as ops

EXPERTS, TOP_K, K, N = 160, 8, 5120, 2 * 192
SEGMENT = 2 << 20  # bytes that PyTorch's allocator takes from the driver at a time, for blocks up to 1 MiB
OFFSETS = torch.int32 if vllm.__version__.startswith(("0.10.0", "0.10.1")) else torch.int64


def step(tokens):
    g = torch.Generator("cuda").manual_seed(1)
    rows = tokens * TOP_K
    # A spread routing. With one repeated token or dummy weights the last expert has `tokens` rows, a multiple of 16: no fault.
    ids = torch.rand(tokens, EXPERTS, generator=g, device="cuda").topk(TOP_K, dim=-1).indices
    count = torch.bincount(ids.flatten(), minlength=EXPERTS)
    first = (count.cumsum(0) - count).to(OFFSETS)
    sizes = torch.stack([count, torch.full_like(count, N), torch.full_like(count, K)], 1).int().contiguous()
    k, n = (torch.full((EXPERTS,), width, device="cuda", dtype=torch.int64) for width in (K, N))
    a = torch.randint(64, (rows, K), generator=g, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)
    b = torch.randint(64, (EXPERTS, N, K), generator=g, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)
    b_scales = torch.rand(EXPERTS, N, 1, device="cuda")
    out = torch.empty(rows, N, device="cuda", dtype=torch.bfloat16)
    rounding = -rows * 4 % 512  # bytes behind the last scale that still belong to its block
    told = f"{tokens} tokens: {rows * 4} bytes of scales, {rounding} bytes of rounding behind them"
    ends = 0
    for scales in [torch.rand(rows, 1, device="cuda") for _ in range(64)]:
        if (scales.data_ptr() + rows * 4 + rounding) % SEGMENT:
            continue  # another block of the segment follows: what is read there is never used, so nobody notices
        ends += 1
        torch.cuda.synchronize()
        try:
            ops.cutlass_moe_mm(out, a, b, scales, b_scales, first, sizes, k, k, n, True, True)
            torch.cuda.synchronize()
        except Exception as error:
            end = scales.data_ptr() + rows * 4
            why = f"the scales end at {end:#x}, their segment at {end + rounding:#x}; up to 32 bytes behind them are loaded"
            return f"{told}: FAULT\n    {str(error).splitlines()[0]}\n    {why}", 1
    return f"{told}: ok, {ends} calls with scales at the end of a segment", 0


def main():
    print(f"vLLM {vllm.__version__}, torch {torch.__version__}", flush=True)
    faults = 0
    for tokens in map(int, sys.argv[1:] or (8190, 8191, 8192, 8193)):
        if not os.fork():
            text, code = step(tokens)
            print(text, flush=True)
            os._exit(code)
        faults += os.wait()[1] != 0
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
