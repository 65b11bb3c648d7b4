"""Reads one call of vLLM's modular MoE kernel: tokens, weights, scales and routing, in every release's way of passing them.

The modular kernel is where all generations meet. From 0.10.0 on the compressed-tensors FP8 method gets there with bf16 tokens,
whole weights and a finished routing, and takes the reduced bf16 result; the kernel object carries the scales and says
how tokens travel between ranks. Up to 0.16.0 it is FusedMoEModularKernel.forward, then FusedMoEKernel.apply. What is
inside of it (quantising, permuting, a workspace of 1.34 GB at 8192 tokens) is not run for a call that is served here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arguments import Arguments

if TYPE_CHECKING:
    import torch

PREPARE = ("MoEPrepareAndFinalizeNoEP", "MoEPrepareAndFinalizeNoDPEPModular")
"""The classes of vLLM that hand tokens to the experts as they are: no all-to-all. Subclasses do something else."""
EXPERTS = ("CutlassExpertsFp8", "TritonExperts", "TritonOrCutlassExperts")
"""The classes of vLLM's kernels that take the weights in the checkpoint's layout: gate rows, then up rows, unshuffled."""
ARGUMENTS = (
    "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts", "expert_map",
    "apply_router_weight_on_input",
)  # fmt: skip
"""What every release's function takes by these names."""
OWN_SCALES = ("w1_scale", "w2_scale")
"""Arguments of the function up to 0.10.2; later the scales hang on the quantisation's description."""
MUST_BE_NONE = ("a1_scale", "a2_scale", "w1_zp", "w2_zp")
"""Arguments up to 0.10.2, and attributes of the description later, that our kernel has no place for."""
NEEDED = ("quant_dtype", "per_act_token_quant", "block_shape")
"""Attributes of the quantisation's description (FusedMoEQuantConfig) that every release has."""
NEITHER = ("w1_bias", "w2_bias", "g1_alphas", "g2_alphas", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
"""Attributes of the description that not every release has; where one is set, our kernel does not fit."""

NEITHER_OF_LAYER = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
"""The same of the layer's configuration (FusedMoEConfig), from which vLLM takes them where the description has none."""


@dataclass
class Call:
    """One call: the tensors of `moe.fused_moe_fp8` as vLLM has them, and the kernel object."""

    kernel: Any
    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None


class Reader:
    """Reads calls of one function, vLLM's original; made once, since `inspect` is slow."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._arguments = Arguments(original)
        self._names = self._arguments.names
        missing = [name for name in ARGUMENTS if name not in self._names]
        if missing:
            raise TypeError(f"the modular kernel takes no {', '.join(missing)}")
        self._scales_given = all(name in self._names for name in OWN_SCALES)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call. `args` begins with the kernel object."""

        def given(name: str) -> Any:
            return self._arguments.get(name, args, kwargs)

        import torch

        kernel, w13 = args[0], given("w1")
        scales: tuple[Any, Any] = (None, None)
        if w13.dtype == torch.float8_e4m3fn:  # those of other quantisations may be no tensors, which some releases assert
            if self._scales_given:
                scales = given("w1_scale"), given("w2_scale")
            else:
                quantisation = kernel.fused_experts.quant_config
                scales = quantisation.w1_scale, quantisation.w2_scale
        return Call(
            kernel, given("hidden_states"), w13, given("w2"), *scales, given("topk_weights"), given("topk_ids"),
            given("expert_map"),
        )  # fmt: skip

    def option(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One more argument by name; None where this release's function does not take it."""
        return self._arguments.get(name, args, kwargs) if name in self._names else None

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **tensors: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other tokens and another routing."""
        return self._arguments.replaced(args, kwargs, tensors)
