"""Stand-ins for the FP8 MoE path of two generations of vLLM, in plain torch on the CPU, right or wrong as told.

They have the names, arguments and results of the real functions, so that what `verify` gives and expects is put to the test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import vllm_glm_patch.upstream
from vllm_glm_patch.tools.verify.card import Card
from vllm_glm_patch.upstream import Upstream as Found

MOE = "vllm.model_executor.layers.fused_moe"
FP8 = torch.float8_e4m3fn
_libraries: list[Any] = []
defects: set[str] = set()
"""What is wrong: "scale" (a row's scale is its neighbour's), "bad-ids" (an id out of range becomes expert 0), "nan" (one NaN
token spoils its neighbour), "router" (NaN gives an id out of range), "permute" (two rows are exchanged)."""


def cutlass_moe_mm(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor,
    expert_offsets: torch.Tensor, problem_sizes: torch.Tensor, a_strides: torch.Tensor, b_strides: torch.Tensor,
    c_strides: torch.Tensor, per_act_token: bool, per_out_ch: bool,
) -> None:  # fmt: skip
    swapped = len(a) <= 64
    for expert, (first, size) in enumerate(zip(expert_offsets.tolist(), problem_sizes.tolist())):
        rows, columns, depth = (size[1], size[0], size[2]) if swapped else size
        assert (columns, depth) == (b.shape[1], b.shape[2])
        here = slice(first, first + rows)
        scales = a_scales[here].roll(1, 0) if "scale" in defects else a_scales[here]
        out[here] = ((a[here].float() @ b[expert].float().T) * scales * b_scales[expert].reshape(1, -1)).bfloat16()


def scaled_fp8_quant(
    input: torch.Tensor, scale: Any = None, num_token_padding: Any = None, scale_ub: Any = None,
    use_per_token_if_dynamic: bool = False, output: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    assert use_per_token_if_dynamic
    x = input.float()
    if "nan" in defects:
        x = torch.where(x.roll(1, 0).isnan().any(1, keepdim=True), float("nan"), x)
    scales = (x.abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    values = (x / scales).clamp(-448, 448).to(FP8)
    return (values if output is None else output.copy_(values)), scales


def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    gate, up = input.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def moe_permute(
    hidden_states: torch.Tensor, a1q_scale: torch.Tensor, topk_ids: torch.Tensor, n_expert: int, n_local_expert: int = -1,
    expert_map: Any = None, permuted_hidden_states: Any = None, scratch: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    top_k = topk_ids.shape[1]
    ids = topk_ids.flatten().long()
    bad = (ids < 0) | (ids >= n_expert)
    local = ids.clamp(0, n_expert - 1) if expert_map is None else expert_map[ids.clamp(0, n_expert - 1)].long()
    local = torch.where(bad | (local < 0), 0 if "bad-ids" in defects else n_local_expert, local)
    order = local.argsort(stable=True)
    if "permute" in defects and len(order) > 2:
        order[:2] = order[:2].flip(0)
    counts = torch.bincount(local, minlength=n_local_expert + 1)[:n_local_expert]
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = hidden_states.view(torch.uint8)[order // top_k]
    if permuted_hidden_states is not None:
        permuted_hidden_states.view(torch.uint8).copy_(rows)
    places = torch.empty_like(order)
    places[local.argsort(stable=True)] = torch.arange(len(order))
    return rows.view(FP8), a1q_scale[order // top_k], first, places.int(), order.int()


def moe_unpermute(
    out: torch.Tensor, permuted_hidden_states: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: Any = None,
) -> None:  # fmt: skip
    places = inv_permuted_idx.view(topk_weights.shape).long()
    here = places < int(expert_first_token_offset[-1])
    parts = permuted_hidden_states[places].float() * topk_weights.unsqueeze(-1)
    out.copy_(torch.where(here.unsqueeze(-1), parts, 0.0).sum(1))


def run_cutlass_moe_fp8(
    output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor,
    activation: Any, global_num_experts: int, expert_map: Any, w1_scale: torch.Tensor, w2_scale: torch.Tensor,
    a1q_scale: torch.Tensor, a2_scale: Any, ab_strides1: torch.Tensor, ab_strides2: torch.Tensor, c_strides1: torch.Tensor,
    c_strides2: torch.Tensor, workspace13: torch.Tensor, workspace2: torch.Tensor, expert_num_tokens: Any, out_dtype: Any,
    per_act_token: bool, per_out_ch: bool, use_batched_format: bool, topk_weights: torch.Tensor, permute_scratch: Any,
) -> None:  # fmt: skip
    experts, width = w1.shape[0], w2.shape[2]
    rows, scales, first, places, _ = moe_permute(
        hidden_states, a1q_scale, topk_ids, global_num_experts, experts, expert_map
    )  # fmt: skip
    counts = first.diff()

    def sizes(columns: int, depth: int) -> torch.Tensor:
        fixed = torch.full_like(counts, columns), torch.full_like(counts, depth)
        return torch.stack([fixed[0], counts, fixed[1]] if len(rows) <= 64 else [counts, *fixed], 1)

    middle = torch.zeros(len(rows), 2 * width, dtype=torch.bfloat16)
    cutlass_moe_mm(middle, rows, w1, scales, w1_scale, first[:-1], sizes(2 * width, w1.shape[2]), *3 * (None,), True, True)
    act = torch.empty(len(rows), width, dtype=torch.bfloat16)
    silu_and_mul(act, middle)
    act, scales = scaled_fp8_quant(act, use_per_token_if_dynamic=True)
    wide = torch.zeros(len(rows), w1.shape[2], dtype=torch.bfloat16)
    cutlass_moe_mm(wide, act, w2, scales, w2_scale, first[:-1], sizes(w1.shape[2], width), *3 * (None,), True, True)
    moe_unpermute(output, wide, topk_weights, places, first)


def cutlass_moe_fp8(
    a: torch.Tensor, w1_q: torch.Tensor, w2_q: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
    w1_scale: torch.Tensor, w2_scale: torch.Tensor, per_act_token: Any = None, activation: str = "silu", a1_scale: Any = None,
    a2_scale: Any = None, expert_map: Any = None, apply_router_weight_on_input: bool = False, global_num_experts: int = -1,
) -> torch.Tensor:  # fmt: skip
    values, scales = scaled_fp8_quant(a, use_per_token_if_dynamic=True)
    output = torch.empty_like(a)
    run_cutlass_moe_fp8(
        output, values, w1_q, w2_q, topk_ids, None, global_num_experts, expert_map, w1_scale, w2_scale, scales, *8 * (None,),
        torch.bfloat16, True, True, False, topk_weights, None,
    )  # fmt: skip
    return output


def get_cutlass_moe_mm_data(
    topk_ids: torch.Tensor, expert_offsets: torch.Tensor, problem_sizes1: torch.Tensor, problem_sizes2: torch.Tensor,
    input_permutation: torch.Tensor, output_permutation: torch.Tensor, num_experts: int, n: int, k: int,
) -> None:  # fmt: skip
    ids = topk_ids.flatten().long()
    valid = (ids >= 0).nonzero().flatten()
    order = valid[ids[valid].argsort(stable=True)]
    counts = torch.bincount(ids[valid], minlength=num_experts)
    expert_offsets.copy_(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    input_permutation[: len(order)] = (order // topk_ids.shape[1]).int()
    output_permutation[order] = torch.arange(len(order), dtype=torch.int32)


def moe_sum(input: torch.Tensor, output: torch.Tensor) -> None:
    output.copy_(input.float().sum(1))


def grouped_topk(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool, num_expert_group: int = 0,
    topk_group: int = 0, scoring_func: str = "softmax", e_score_correction_bias: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    scores = gating_output.sigmoid()
    ids = (scores + e_score_correction_bias).topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if "router" in defects:
        ids = torch.where(weights.isnan(), -1, ids)
    return (weights / weights.sum(-1, keepdim=True)).float(), ids.int()


def install(version: str) -> None:
    """Make it the vLLM of this process."""
    old = version.startswith("0.10.1")
    modules: dict[str, list[Any]] = {
        "vllm": [],
        "vllm._custom_ops": [cutlass_moe_mm, scaled_fp8_quant, *([get_cutlass_moe_mm_data, moe_sum] if old else [])],
        f"{MOE}.cutlass_moe" if old else f"{MOE}.experts.cutlass_moe": [cutlass_moe_fp8 if old else run_cutlass_moe_fp8],
        f"{MOE}.moe_permute_unpermute": [] if old else [moe_permute, moe_unpermute],
        f"{MOE}.fused_moe" if old else f"{MOE}.router.grouped_topk_router": [grouped_topk],
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        sys.modules[name] = module
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ("cutlass_moe_mm", "dynamic_per_token_scaled_fp8_quant", "get_cutlass_moe_mm_data"):
        library.define(f"{name}(Tensor x) -> ()")
    library.define("silu_and_mul(Tensor(a!) out, Tensor input) -> ()")
    library.impl("silu_and_mul", silu_and_mul, "CPU")
    other = torch.library.Library("_moe_C", "FRAGMENT")
    other.define("moe_sum(Tensor x) -> ()")
    _libraries.extend([library, other])
    vllm_glm_patch.upstream.find_installed = lambda: Found(Path("/nowhere"), version)


class Cpu(Card):
    """The backend of a card, on the CPU, with upstream's kernels as above."""

    device = "cpu"

    def prepare(self, options: dict[str, Any]) -> dict[str, Any]:
        install(options["version"])
        defects.update(options.get("defects", []))
        from vllm_glm_patch.tools.verify.upstream import Upstream

        self._add(Upstream(ids_guarded=bool(options.get("ids_guarded"))).kernels())
        return {"card": "CPU", "vllm": options["version"]}

    def start(self, guarded: str) -> None:
        torch.set_num_threads(1)

    def synchronise(self) -> None:
        pass
