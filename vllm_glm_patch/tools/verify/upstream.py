"""vLLM's own FP8 MoE path, kernel by kernel and whole, as its releases 0.10.0 to 0.33.0 call it on Hopper.

Up to 0.10.1.1: get_cutlass_moe_mm_data and a gather, both GEMMs, another gather, moe_sum. From 0.10.2 on: moe_permute,
both GEMMs, moe_unpermute. Whole layers are called as vllm_moe.py does. Functions are looked up at each call, so that what is
patched in their place is what is called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, Optional

import torch
from packaging.version import Version

from ... import upstream
from .. import vllm_moe
from ..vllm_moe import FUSED_MOE
from .backend import Note
from .cases import ROUTINGS, Kernel
from .journal import OK, WRONG, Outcome
from .material import GEMM_LIMIT, QUANTISE_LIMIT, ROUNDING_LIMIT, Buffers, Call, Material, compare, quantise, same, sample

Make = Callable[[Material, Note], Call]
_SWAPPED = 64  # rows up to which vLLM's grouped GEMM takes its problem sizes as (columns, rows, depth); all releases
_BF16 = torch.bfloat16


class Upstream:
    """The path of the vLLM that is installed; imports it. Everything absent is told with its reason.

    Args:
        ids_guarded: the layer takes any id, so a router that gives a NaN token one out of range does no harm.
    """

    def __init__(self, ids_guarded: bool = False) -> None:
        self.ids_guarded = ids_guarded
        self.found = upstream.find_installed()
        self._why: dict[str, str] = {}
        self.ops = self._module("ops", "vllm._custom_ops")
        self.cutlass = self._module("cutlass", *vllm_moe.CUTLASS)
        self.permute = self._module("permute", f"{FUSED_MOE}.moe_permute_unpermute")
        self.router = self._module("router", f"{FUSED_MOE}.router.grouped_topk_router", f"{FUSED_MOE}.fused_moe")
        self.triton = self._module("triton", f"{FUSED_MOE}.fused_moe")

    @property
    def old(self) -> bool:
        """Up to 0.10.1.1: int32 offsets, no moe_permute."""
        return self.found is not None and Version(self.found.release) < Version("0.10.2")

    def _module(self, key: str, *names: str) -> Optional[ModuleType]:
        if self.found is None:
            self._why[key] = "no vLLM is installed in this Python"
            return None
        for name in names:
            try:
                return importlib.import_module(name)
            except Exception as error:  # whatever an import of vLLM runs into here
                gone = isinstance(error, ModuleNotFoundError) and str(error.name or "").startswith("vllm")
                self._why[key] = f"not in vLLM {self.found.version}" if gone else f"{name} cannot be imported: {error}"
        return None

    def _absent(self, key: str, *operators: str) -> str:
        """Why something cannot be called; "" where it can."""
        if getattr(self, key) is None:
            return self._why[key]
        for operator in operators:
            library, _, name = operator.partition(".")
            if not hasattr(getattr(torch.ops, library), name):
                return f"{operator} is not in this vLLM"
        return ""

    def kernels(self) -> list[tuple[Kernel, Make]]:
        """Every kernel of the path and how to call it."""
        gemm = self._absent("ops", "_C.cutlass_moe_mm")
        quantised = self._absent("ops", "_C.dynamic_per_token_scaled_fp8_quant")
        silu = self._absent("ops", "_C.silu_and_mul")
        other = "" if self.found is None else f"not in this path of vLLM {self.found.version}"
        gather = self._absent("ops", "_C.get_cutlass_moe_mm_data") if self.old else self._absent("permute")
        unpermute = self._absent("permute") or (other if self.old else "")
        total = self._absent("ops", "_moe_C.moe_sum") or ("" if self.old else other)
        router = self._absent("router") or ("" if hasattr(self.router, "grouped_topk") else other)

        triton = self._absent("triton") or ("" if hasattr(self.triton, "fused_experts") else other)

        def kernel(name: str, absent: str, routings: tuple[str, ...] = ("spread",), counts: bool = True) -> Kernel:
            return Kernel("upstream", name, routings, counts and self.found is not None, absent)

        good = ("spread", "skewed", "collapsed")
        return [
            (kernel("gemm1", gemm, good), functools.partial(self.gemm, 1)),
            (kernel("gemm2", gemm, good), functools.partial(self.gemm, 2)),
            (kernel("layer", self._absent("cutlass"), ROUTINGS), self.layer),
            (kernel("router", router, ("spread", "nan")), self.route),
            (kernel("quantise", quantised), functools.partial(self.quantise, 1)),
            (kernel("permute", gather, good), self.gather if self.old else self.moe_permute),
            (kernel("silu", silu), self.silu),
            (kernel("requantise", quantised), functools.partial(self.quantise, 2)),
            (kernel("unpermute", unpermute, good), self.moe_unpermute),
            (kernel("sum", total), self.moe_sum),
            (kernel("triton layer", triton, ("spread", "minus-one"), counts=False), self.triton_layer),
        ]

    def quantise(self, which: int, m: Material, note: Note) -> Call:
        """Per-token FP8: of the tokens (1), or of the activations before GEMM2 (2)."""
        x = m.hidden if which == 1 else m.random(m.problem.pairs, m.problem.intermediate_size)
        output = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=m.device)

        def run(b: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
            assert self.ops is not None
            return self.ops.scaled_fp8_quant(  # type: ignore[no-any-return]
                b["input"], use_per_token_if_dynamic=True, output=b["output"]
            )

        def check(result: tuple[torch.Tensor, torch.Tensor]) -> Outcome:
            values, scales = result
            rows = sample(torch.arange(len(x), device=m.device))
            scales = scales.reshape(-1, 1)[rows].double()
            wrong = compare(scales, quantise(x[rows])[1].double(), 1e-5, "the scales")
            if wrong.outcome != OK:
                return wrong
            # Against the input itself: a value on a tie may go either way.
            return compare(values[rows].double() * scales, x[rows].double(), QUANTISE_LIMIT, "the values")

        return Call({"input": x, "output": output}, run, check)

    def gemm(self, which: int, m: Material, note: Note) -> Call:
        """A grouped GEMM over the experts' rows."""
        p, device = m.problem, m.device
        depth, columns = (p.hidden_size, 2 * p.intermediate_size) if which == 1 else (p.intermediate_size, p.hidden_size)
        weights, scales = (m.w13, m.w13_scale) if which == 1 else (m.w2, m.w2_scale)
        if which == 1:
            token = torch.div(m.order, p.top_k, rounding_mode="floor")
            a, a_scales = m.quantised[0].view(torch.uint8)[token].view(torch.float8_e4m3fn), m.quantised[1][token]
        else:
            a, a_scales = quantise(m.random(p.pairs, depth))
        if p.pairs <= _SWAPPED:
            sizes = [torch.full_like(m.counts, columns), m.counts, torch.full_like(m.counts, depth)]
        else:
            sizes = [m.counts, torch.full_like(m.counts, columns), torch.full_like(m.counts, depth)]
        buffers = {
            "out": torch.empty(p.pairs, columns, device=device, dtype=_BF16),
            "a": a,
            "b": weights,
            "a_scales": a_scales.contiguous(),
            "b_scales": scales.unsqueeze(-1).contiguous(),
            "expert_offsets": m.first_rows[:-1].to(torch.int32 if self.old else torch.int64).contiguous(),
            "problem_sizes": torch.stack(sizes, 1).int().contiguous(),
            "a_strides": vllm_moe.strides(p.experts, depth, device),
            "b_strides": vllm_moe.strides(p.experts, depth, device),
            "c_strides": vllm_moe.strides(p.experts, columns, device),
        }

        def run(b: Buffers) -> torch.Tensor:
            assert self.ops is not None
            self.ops.cutlass_moe_mm(*(b[name] for name in buffers), True, True)
            return b["out"]

        def check(out: torch.Tensor) -> Outcome:
            rows = sample(torch.arange(int(m.first_rows[-1]), device=device))
            experts = m.local_ids[m.order[rows]]
            want = torch.zeros(len(rows), columns, dtype=torch.float64, device=device)
            for expert in experts.unique().tolist():
                mine = experts == expert
                x = a.view(torch.uint8)[rows[mine]].view(torch.float8_e4m3fn).double() * a_scales[rows[mine]].double()
                want[mine] = x @ weights[expert].double().T * scales[expert].double()
            return compare(out[rows], want, GEMM_LIMIT)

        return Call(buffers, run, check)

    def silu(self, m: Material, note: Note) -> Call:
        """SwiGLU of GEMM1's result."""
        width = m.problem.intermediate_size
        x = m.random(m.problem.pairs, 2 * width)
        buffers = {"out": torch.empty(m.problem.pairs, width, device=m.device, dtype=_BF16), "input": x}

        def run(b: Buffers) -> torch.Tensor:
            vllm_moe.swiglu(b["out"], b["input"])
            return b["out"]

        def check(out: torch.Tensor) -> Outcome:
            rows = sample(torch.arange(len(x), device=m.device))
            gate, up = x[rows].double().chunk(2, dim=1)
            return compare(out[rows], gate * torch.sigmoid(gate) * up, ROUNDING_LIMIT)

        return Call(buffers, run, check)

    def gather(self, m: Material, note: Note) -> Call:
        """Up to 0.10.1.1: the maps of the permutation, and the gather of tokens and scales by them."""
        p, device = m.problem, m.device
        a, scales = m.quantised
        ids = torch.where(m.local_ids == p.experts, -1, m.local_ids).int().view(p.tokens, p.top_k).contiguous()

        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        buffers = {
            "topk_ids": ids,
            "expert_offsets": empty(p.global_experts + 1),
            "problem_sizes1": empty(p.global_experts, 3),
            "problem_sizes2": empty(p.global_experts, 3),
            "a_map": torch.zeros(p.pairs, dtype=torch.int32, device=device),
            "c_map": empty(p.pairs),
        }

        def run(b: Buffers) -> tuple[torch.Tensor, ...]:
            assert self.ops is not None
            self.ops.get_cutlass_moe_mm_data(
                *(b[name] for name in buffers), p.global_experts, p.intermediate_size, p.hidden_size
            )
            return a.view(torch.uint8)[b["a_map"]], scales[b["a_map"]], b["expert_offsets"], b["c_map"]

        def check(result: tuple[torch.Tensor, ...]) -> Outcome:
            rows, row_scales, offsets, places = result
            return _check_permuted(m, rows, row_scales, offsets[: p.experts + 1], places)

        return Call(buffers, run, check)

    def moe_permute(self, m: Material, note: Note) -> Call:
        """From 0.10.2 on: the same by moe_permute."""
        p = m.problem
        buffers = {"hidden_states": m.quantised[0], "a1q_scale": m.quantised[1], "topk_ids": m.topk_ids}
        if m.expert_map is not None:
            buffers["expert_map"] = m.expert_map
        buffers["permuted_hidden_states"] = torch.empty(p.pairs, p.hidden_size, dtype=torch.float8_e4m3fn, device=m.device)

        def run(b: Buffers) -> tuple[torch.Tensor, ...]:
            assert self.permute is not None
            result = self.permute.moe_permute(**b, n_expert=p.global_experts, n_local_expert=p.experts)
            return result[0].view(torch.uint8), *result[1:4]

        def check(result: tuple[torch.Tensor, ...]) -> Outcome:
            return _check_permuted(m, *result)

        return Call(buffers, run, check)

    def moe_unpermute(self, m: Material, note: Note) -> Call:
        """From 0.10.2 on: the weighted sum of each token's rows."""
        p = m.problem
        rows = m.random(p.pairs, p.hidden_size)
        places = torch.empty_like(m.order)
        places[m.order] = torch.arange(p.pairs, device=m.device)
        buffers = {
            "out": torch.empty_like(m.hidden),
            "permuted_hidden_states": rows,
            "topk_weights": m.topk_weights,
            "inv_permuted_idx": places.int(),
            "expert_first_token_offset": m.first_rows,
        }

        def run(b: Buffers) -> torch.Tensor:
            assert self.permute is not None
            self.permute.moe_unpermute(**b)
            return b["out"]

        def check(out: torch.Tensor) -> Outcome:
            tokens = sample(torch.arange(p.tokens, device=m.device))
            here = (m.local_ids < p.experts).view(p.tokens, p.top_k)[tokens].double()
            parts = rows[places.view(p.tokens, p.top_k)[tokens]].double()
            want = (parts * (m.topk_weights[tokens].double() * here).unsqueeze(-1)).sum(1)
            return compare(out[tokens], want, ROUNDING_LIMIT)

        return Call(buffers, run, check)

    def moe_sum(self, m: Material, note: Note) -> Call:
        """Up to 0.10.1.1: the sum over each token's experts."""
        p = m.problem
        x = m.random(p.pairs, p.hidden_size).view(p.tokens, p.top_k, p.hidden_size)

        def run(b: Buffers) -> torch.Tensor:
            assert self.ops is not None
            self.ops.moe_sum(b["input"], b["output"])
            return b["output"]

        def check(out: torch.Tensor) -> Outcome:
            tokens = sample(torch.arange(p.tokens, device=m.device))
            return compare(out[tokens], x[tokens].double().sum(1), ROUNDING_LIMIT)

        return Call({"input": x, "output": torch.empty_like(m.hidden)}, run, check)

    def route(self, m: Material, note: Note) -> Call:
        """The router of GLM-4.6: sigmoid, correction bias, one group, renormalised."""
        p = m.problem
        bias = 0.1 * torch.randn(p.global_experts, generator=m.generator, device=m.device)
        buffers = {"hidden_states": m.hidden, "gating_output": m.logits, "e_score_correction_bias": bias}

        def run(b: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
            return self._routed(b, p.top_k)

        def check(result: tuple[torch.Tensor, torch.Tensor]) -> Outcome:
            weights, ids = result[0].double(), result[1].long()
            bad = (ids < 0) | (ids >= p.global_experts)
            if self.ids_guarded:
                bad[m.dirty] = False
            if bool(bad.any()):
                return Outcome(WRONG, f"{int(bad.sum())} ids name no expert; the first is {int(ids[bad][0])}")
            clean = ~m.dirty
            scores = torch.sigmoid(m.logits[clean].double())
            best = (scores + bias.double()).topk(p.top_k, dim=1).values.sum(1, keepdim=True)
            chosen = (scores + bias.double()).gather(1, ids[clean]).sum(1, keepdim=True)
            wrong = compare(chosen, best, 1e-4, "not the best experts were chosen")
            if wrong.outcome != OK:
                return wrong
            want = scores.gather(1, ids[clean])
            got = weights[clean] / weights[clean].sum(1, keepdim=True)
            return compare(got, want / want.sum(1, keepdim=True), 1e-3, "the routing weights")

        return Call(buffers, run, check)

    def _routed(self, b: Buffers, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.router is not None
        function = self.router.grouped_topk
        values: dict[str, Any] = {
            **b, "topk": top_k, "renormalize": True, "num_expert_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
            "routed_scaling_factor": 1.0,
        }  # fmt: skip
        with _eager(function):
            weights, ids = vllm_moe.call_by_name(function, values, "grouped_topk")
        return weights, ids

    def layer(self, m: Material, note: Note) -> Call:
        """The whole layer through CUTLASS, tokens to tokens."""
        assert self.cutlass is not None
        whole = self.old and hasattr(self.cutlass, "cutlass_moe_fp8")

        def run(b: Buffers) -> torch.Tensor:
            assert self.cutlass is not None
            given = vllm_moe.Layer(m.problem, **b)
            if whole:
                given = replace(given, topk_weights=given.topk_weights.clone())
                return vllm_moe.cutlass_moe_fp8(self.cutlass.cutlass_moe_fp8, given)()
            size = m.problem.pairs, vllm_moe.workspace_width(m.problem)
            spaces = (torch.empty(size, device=m.device, dtype=_BF16) for _ in range(2))
            return vllm_moe.run_cutlass_moe_fp8(self.cutlass.run_cutlass_moe_fp8, given, *spaces)()

        return Call(self._layer_buffers(m), run, m.check_layer)

    def _layer_buffers(self, m: Material) -> dict[str, torch.Tensor]:
        buffers = {
            "hidden_states": m.hidden,
            "w1": m.w13,
            "w2": m.w2,
            "w1_scale": m.w13_scale.unsqueeze(-1).contiguous(),
            "w2_scale": m.w2_scale.unsqueeze(-1).contiguous(),
            "topk_weights": m.topk_weights,
            "topk_ids": m.topk_ids,
        }
        return buffers if m.expert_map is None else {**buffers, "expert_map": m.expert_map}

    def triton_layer(self, m: Material, note: Note) -> Call:
        """The whole layer through vLLM's Triton kernels, which it takes where it does not take CUTLASS."""

        def run(b: Buffers) -> torch.Tensor:
            assert self.triton is not None
            return vllm_moe.fused_experts(self.triton.fused_experts, vllm_moe.Layer(m.problem, **b))()

        return Call(self._layer_buffers(m), run, m.check_layer)


def _eager(function: Any) -> AbstractContextManager[object]:
    """The router is compiled by torch.compile, which takes longer than all else here; as plain torch it computes the same."""
    stance = getattr(torch.compiler, "set_stance", None)
    compiled = hasattr(function, "_torchdynamo_orig_callable")
    return stance("force_eager") if compiled and stance is not None else nullcontext()


def _check_permuted(
    m: Material, rows: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, places: torch.Tensor
) -> Outcome:
    """Rows [pairs, hidden] uint8 and scales grouped by expert; places [pairs]: the row of each pair."""
    p = m.problem
    pairs = sample((m.local_ids < p.experts).nonzero().flatten(), 4096)
    where = places.flatten()[pairs].long()
    inside = (where >= 0) & (where < p.pairs)
    tokens = torch.div(pairs, p.top_k, rounding_mode="floor")
    a, a_scales = m.quantised
    where = where.clamp(0, p.pairs - 1)
    return (
        same((offsets.flatten().long() == m.first_rows).all(), "the experts' first rows")
        or same(inside.all(), f"{int((~inside).sum())} places outside the rows")
        or same((rows[where] == a.view(torch.uint8)[tokens]).all(), "rows of other tokens")
        or same((scales.flatten()[where] == a_scales.flatten()[tokens]).all(), "scales of other tokens")
        or Outcome(OK, "", 0.0, 0.0)
    )
