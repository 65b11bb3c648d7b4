"""Compiles each Triton kernel that the shipped tables and the rules of thumb ask for, for sm_90a, by the Triton of this Python.

    PYTHONPATH=WHEEL python tools/triton_releases.py     # WHEEL: the unpacked wheel, where it is not installed

No card is needed: launches are caught and their kernels compiled. A release of vLLM brings its own Triton (0.10.0 brings 3.3,
0.10.2 and 0.11 3.4), and the token counts of what one of them refuses are left to vLLM's own kernel in a server's self-test.
`make test` asks the one Triton of its environment. Exit code 1 where a kernel is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from vllm_glm_patch.moe.problem import GLM_SHAPES
from vllm_glm_patch.tools.bench.kernel import TIMED as COUNTS

CARDS = {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132, "NVIDIA H20": 78}
"""With their multiprocessors; the last has no table of its own."""
SHARED_MEMORY = 232448
"""Bytes of a block, on all of them."""
Variant = tuple[str, tuple[tuple[str, Any], ...], tuple[str, ...], int, int]
"""Kernel, constants, types of the other arguments, warps, stages."""


def launches(shape: str, tokens: int, card_name: str) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, options) of each Triton launch of a pass, native kernels where the table names them."""
    import torch

    from vllm_glm_patch.moe import dispatch, pipeline, tables
    from vllm_glm_patch.moe.dispatch import Card
    from vllm_glm_patch.moe.hopper import backend as native
    from vllm_glm_patch.moe.hopper.library import loader
    from vllm_glm_patch.moe.workspace import layout

    card = Card(card_name, CARDS[card_name], SHARED_MEMORY, (9, 0), 0)
    problem = GLM_SHAPES[shape].with_tokens(tokens)
    entry = tables.entry(problem, card) or {}
    if entry.get("backend") == "hopper":
        config = native.triton_config(problem, native.choose(problem, card), loader().native)
    else:
        config = dispatch.choose(problem, card)
    caught: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def catch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        caught.append((kernel, arguments, options))

    fp8, meta = torch.float8_e4m3fn, "meta"
    p = problem
    tensors = pipeline.Tensors(
        torch.empty(p.tokens, p.hidden_size, dtype=torch.bfloat16, device=meta),
        torch.empty(p.experts, 2 * p.intermediate_size, p.hidden_size, dtype=fp8, device=meta),
        torch.empty(p.experts, p.hidden_size, p.intermediate_size, dtype=fp8, device=meta),
        torch.empty(p.experts, 2 * p.intermediate_size, device=meta),
        torch.empty(p.experts, p.hidden_size, device=meta),
        torch.empty(p.tokens, p.top_k, device=meta),
        torch.empty(p.tokens, p.top_k, dtype=torch.int32, device=meta),
        torch.empty(p.global_experts, dtype=torch.int32, device=meta) if p.global_experts != p.experts else None,
        torch.empty(p.tokens, p.hidden_size, dtype=torch.bfloat16, device=meta),
    )
    room = torch.empty(layout(p, config).total, dtype=torch.uint8, device=meta)
    one = pipeline.Pass(p, config, tensors, room, card.multiprocessors, launch=catch)
    natively = set()
    if entry.get("backend") == "hopper":
        natively = {"gemm2"} | {step for step in ("prologue", "gemm1") if entry.get(step) != "triton"}
    for name, step in one.steps():
        if name not in natively:
            step()
    yield from caught


def variant(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """What Triton compiles once for: constants, the others' types, and the launch's warps and stages."""
    import torch

    names = {torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv", torch.float32: "*fp32", torch.int32: "*i32"}
    bound = inspect.signature(kernel.fn).bind_partial(
        *arguments, **{key: value for key, value in options.items() if key in kernel.arg_names}
    )
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = tuple((name, value) for name, value in bound.arguments.items() if name in constant or value is None)
    types = tuple(
        names[value.dtype] if isinstance(value, torch.Tensor) else "i64" if isinstance(value, int) and value >= 2**31 else "i32"
        for name, value in bound.arguments.items()
        if name not in constant and value is not None
    )
    return (
        kernel.fn.__module__ + ":" + kernel.fn.__name__,
        constants,
        types,
        options.get("num_warps", 4),
        options.get("num_stages", 3),
    )


def refused(kernel: Any, made: Variant) -> str:
    """Why this Triton does not compile it; "" where it does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, constants, types, warps, stages = made
    fixed = dict(constants)
    others = iter(types)
    signature = {name: "constexpr" if name in fixed else next(others) for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if signature[name][0] == "*"
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=fixed, attrs=attributes),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    shared = int(compiled.metadata.shared)
    return f"needs {shared} bytes of shared memory, and a block has {SHARED_MEMORY}" if shared > SHARED_MEMORY else ""


def main() -> int:
    import triton

    seen: dict[Variant, tuple[Any, str]] = {}
    for card in CARDS:
        for shape in GLM_SHAPES:
            for tokens in COUNTS:
                for kernel, arguments, options in launches(shape, tokens, card):
                    seen.setdefault(variant(kernel, arguments, options), (kernel, f"{card} {shape} {tokens}"))
    bad = 0
    for made, (kernel, where) in seen.items():
        if why := refused(kernel, made):
            bad += 1
            print(f"{where}: {made[0]} {dict(made[1])}: {why}", flush=True)
    print(f"Triton {triton.__version__}: {len(seen)} kernels, {bad} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
