#!/usr/bin/env python3
"""The grouped GEMM with upstream's epilogue and with the corrected one, its token scales before an unmapped page.

    guard_epilogue.py FOLDER OUT.json      FOLDER: what build.sh made; needs torch and a Hopper card, no vLLM

Each case is a process of its own. As PyTorch rounds blocks, the scales end at the page at multiples of 16 tokens. Exit code 1:
upstream's does not fault at 8192 tokens, the corrected one faults anywhere, or their results differ where both run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import children
import torch
from guardmem import guarded

EXPERTS, TOP_K, HIDDEN, WIDTH = 160, 8, 5120, 192
TOKENS = (8192, 8191, 8190, 8193, 8176, 4096, 2048, 64, 32, 16)
STATES = ("as-released", "corrected")
SHAPES = {"gemm1": (2 * WIDTH, HIDDEN), "gemm2": (HIDDEN, WIDTH)}


class Call(ctypes.Structure):
    _fields_ = [("experts", ctypes.c_int)] + [
        (name, ctypes.c_void_p)
        for name in ("sizes", "a", "a_strides", "b", "b_strides", "a_scales", "b_scales", "out", "out_strides")
    ]


def work(library: str, gemm: str, tokens: int, guard: bool) -> dict[str, Any]:
    """One call; a digest of its result. Runs in a child."""
    columns, depth = SHAPES[gemm]
    generator = torch.Generator("cuda").manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS, generator=generator, device="cuda").topk(TOP_K, dim=-1)[1]
    count = torch.bincount(ids.flatten(), minlength=EXPERTS)
    first = count.cumsum(0) - count
    rows = tokens * TOP_K

    def fp8(*shape: int) -> torch.Tensor:
        codes = torch.randint(0, 240, shape, generator=generator, device="cuda", dtype=torch.uint8)
        return torch.where(codes < 120, codes, codes + 8)  # as many negative ones; no NaN

    a, b = fp8(rows, depth), fp8(EXPERTS, columns, depth)
    a_scales = torch.rand(rows, generator=generator, device="cuda")
    b_scales = torch.rand(EXPERTS, columns, generator=generator, device="cuda")
    if guard:
        a_scales = guarded(a_scales)
    out = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
    sizes = torch.stack([count, torch.full_like(count, columns), torch.full_like(count, depth)], 1).int().contiguous()

    def pointers(tensor: torch.Tensor, starts: torch.Tensor, row_bytes: int) -> torch.Tensor:
        return tensor.data_ptr() + starts * row_bytes

    expert = torch.arange(EXPERTS, device="cuda")
    stride = lambda value: torch.full((EXPERTS,), value, dtype=torch.int64, device="cuda")  # noqa: E731
    kept = [
        sizes, pointers(a, first, depth), stride(depth), pointers(b, expert, columns * depth), stride(depth),
        pointers(a_scales, first, 4), pointers(b_scales, expert, 4 * columns),
        pointers(out, first, 2 * columns), stride(columns),
    ]  # fmt: skip
    call = Call(EXPERTS, *(tensor.data_ptr() for tensor in kept))
    loaded = ctypes.CDLL(library)
    loaded.workspace_bytes.restype = ctypes.c_long
    workspace = torch.empty(loaded.workspace_bytes(ctypes.byref(call)) + 1024, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream().cuda_stream
    status = loaded.run(ctypes.byref(call), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(stream))
    torch.cuda.synchronize()
    if status:
        raise RuntimeError(f"CUTLASS status {status}")
    # The last rows against float64, where the over-read is.
    last = int(count.nonzero()[-1])
    mine = slice(int(first[last]), int(first[last] + count[last]))
    want = a[mine].view(torch.float8_e4m3fn).double() @ b[last].view(torch.float8_e4m3fn).double().T
    want *= a_scales[mine, None].double() * b_scales[last][None].double()
    error = float((out[mine].double() - want).norm() / want.norm())
    digest = hashlib.sha256(out.view(torch.int16).cpu().numpy().tobytes()).hexdigest()
    return {"digest": digest, "error": round(error, 5), "rows_of_last_expert": int(count[last])}


def main() -> int:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, rows, wrong = Path(sys.argv[1]), [], []
    for gemm in SHAPES:
        for tokens in TOKENS:
            digests = set()
            for state in STATES:
                for guard in (True, False):
                    library = str((folder / f"libepilogue-{state}.so").resolve())
                    told = children.run(functools.partial(work, library, gemm, tokens, guard))
                    row = {"epilogue": state, "gemm": gemm, "tokens": tokens, "guarded": guard, **told}
                    rows.append(row)
                    print(*(f"{key}={str(value)[:60]}" for key, value in row.items()), flush=True)
                    name = f"{state} {gemm} {tokens} {'guarded' if guard else 'plain'}"
                    if told["outcome"] == "ok":
                        digests.add(told["digest"])
                        if not told["error"] < 0.02:
                            wrong.append(f"{name}: error {told['error']}")
                    elif state == "corrected" or not guard:
                        wrong.append(f"{name}: {told}")
            if len(digests) != 1:
                wrong.append(f"{gemm} {tokens}: results differ")
        if not any(
            row["epilogue"] == "as-released" and row["guarded"] and row["tokens"] == 8192 and row["outcome"] != "ok"
            for row in rows
            if row["gemm"] == gemm
        ):
            wrong.append(f"{gemm}: upstream's epilogue does not fault at 8192 tokens")
    Path(sys.argv[2]).write_text(json.dumps({**children.run(children.machine), "wrong": wrong, "rows": rows}, indent=1) + "\n")
    print("\n".join(wrong) or "as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
