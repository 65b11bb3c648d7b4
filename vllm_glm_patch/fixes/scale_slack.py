"""Gives the grouped FP8 GEMM 32 readable bytes behind its per-token scales (patch `scale-overread`).

The GEMM's epilogue loads the scale of row r + 8 under the predicate of row r, so the last tile of the last expert
reads up to 8 float32 past the last row. What it reads there it never uses; it only has to be mapped memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..arguments import Arguments
from . import Context, Factory

if TYPE_CHECKING:
    import torch

SLACK = 8
"""float32 values that must be readable behind the scales: 32 bytes, the most the epilogue reads too far."""
_libraries: list[Any] = []  # an operator lives as long as its library object


def replacements(context: Context) -> Mapping[str, Factory]:
    """Factories for the roles `grouped-gemm` and `quantise`."""
    return {"grouped-gemm": _grouped_gemm, "quantise": _quantise}


def with_slack(scales: torch.Tensor) -> torch.Tensor:
    """The same scales, with at least `SLACK` float32 of their own storage behind them.

    Args:
        scales: float32, one a row, contiguous, any shape.

    Returns:
        `scales` itself where its storage goes on far enough, else a copy: 256 KiB for 8192 tokens of 8 experts.
    """
    import torch

    if torch.compiler.is_compiling():
        copied: torch.Tensor = torch.ops.vllm_glm_patch.copy_with_slack(scales)
        return copied
    needed = scales.storage_offset() + scales.numel() + SLACK
    return scales if scales.untyped_storage().nbytes() >= needed * scales.element_size() else _copy_with_slack(scales)


def _copy_with_slack(scales: torch.Tensor) -> torch.Tensor:
    copy = empty_with_slack(scales.numel(), scales).view(scales.shape)
    copy.copy_(scales)
    return copy


@functools.cache
def define_operator() -> None:
    """Define torch.ops.vllm_glm_patch.copy_with_slack, for compiled graphs.

    An operator, since Inductor sees through padding and slicing and allocates just the values.
    """
    import torch

    library = torch.library.Library("vllm_glm_patch", "FRAGMENT")
    library.define("copy_with_slack(Tensor scales) -> Tensor")
    library.impl("copy_with_slack", _copy_with_slack, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_glm_patch::copy_with_slack", torch.empty_like, lib=library)
    _libraries.append(library)


def empty_with_slack(count: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised float32 vector of `count` values on the device of `like`, with slack behind it."""
    import torch

    return torch.empty(count + SLACK, dtype=torch.float32, device=like.device)[:count]


def _grouped_gemm(original: Any) -> Any:
    arguments = Arguments(original)
    define_operator()

    @functools.wraps(original)
    def cutlass_moe_mm(*args: Any, **kwargs: Any) -> Any:
        if arguments.get("per_act_token", args, kwargs):
            scales = with_slack(arguments.get("a_scales", args, kwargs))
            args, kwargs = arguments.replaced(args, kwargs, {"a_scales": scales})
        return original(*args, **kwargs)

    return cutlass_moe_mm


def _quantise(original: Any) -> Any:
    arguments = Arguments(original)

    @functools.wraps(original)
    def scaled_fp8_quant(*args: Any, **kwargs: Any) -> Any:
        import torch

        def given(name: str) -> Any:
            return arguments.get(name, args, kwargs)

        per_token = given("use_per_token_if_dynamic") and given("scale") is None
        if not per_token or given("num_token_padding") or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        tokens = given("input").shape[0]
        output = given("output")
        if output is None:
            padded = {"num_token_padding": tokens + SLACK}
            more_args, more_kwargs = arguments.replaced(args, kwargs, padded)
            output, scales = original(*more_args, **more_kwargs)
            return output[:tokens], scales[:tokens]
        scales = empty_with_slack(tokens, output).view(tokens, 1)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(output, given("input"), scales, given("scale_ub"))
        return output, scales

    return scaled_fp8_quant
