"""The torch operator: checks its arguments, chooses a configuration, runs the passes.

`vllm_glm_patch::fused_moe_fp8` returns a new tensor, `vllm_glm_patch::fused_moe_fp8_out` writes one it is given. Both
have fake kernels, so torch.compile traces through them, and both are safe to capture in a CUDA graph: no host sync,
no look at any tensor's contents, memory from torch's allocator only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from . import backends, tables
from . import workspace as workspace_module
from .dispatch import Card, Config, choose, read_card
from .pipeline import Pass, Tensors
from .problem import Problem
from .triton.common import INTERPRETED

_FP8 = torch.float8_e4m3fn
_library = torch.library.Library("vllm_glm_patch", "FRAGMENT")
_library.define(
    "fused_moe_fp8(Tensor hidden_states, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale,"
    " Tensor topk_weights, Tensor topk_ids, Tensor? expert_map) -> Tensor"
)
_library.define(
    "fused_moe_fp8_out(Tensor hidden_states, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale,"
    " Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor(a!) out, Tensor(b!)? workspace) -> ()"
)


def fused_moe_fp8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fused mixture of experts: per-token FP8, GEMM1, SwiGLU, per-token FP8, GEMM2, × routing weight, Σ over top-k.

    Args:
        hidden_states: [tokens, hidden] bf16, contiguous. tokens may be 0.
        w13: [experts, 2 · intermediate, hidden] float8_e4m3fn, gate rows first, then up; each expert contiguous.
        w2: [experts, hidden, intermediate] float8_e4m3fn; each expert contiguous.
        w13_scale: [experts, 2 · intermediate] or [..., 1] fp32, one scale a channel.
        w2_scale: [experts, hidden] or [..., 1] fp32.
        topk_weights: [tokens, top_k] fp32.
        topk_ids: [tokens, top_k] int32 or int64. Any value is safe; one that names no local expert adds nothing.
        expert_map: [global experts] int32, local expert or −1 (expert parallelism). Ids count global experts then.
        out: [tokens, hidden] bf16, contiguous; every element is written. Made if None. Must not overlap an input.
        workspace: uint8, contiguous, at least `workspace_bytes(...)` bytes, 256-byte aligned. Made if None.

    Returns:
        `out`, or a new tensor [tokens, hidden] bf16. The same inputs give the same bits.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above; the message names it.
        RuntimeError: no CUDA device and Triton's interpreter is off.
    """
    arguments = (hidden_states, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, expert_map)
    if out is None and workspace is None:
        made: torch.Tensor = torch.ops.vllm_glm_patch.fused_moe_fp8(*arguments)
        return made
    if out is None:
        out = torch.empty_like(hidden_states)
    torch.ops.vllm_glm_patch.fused_moe_fp8_out(*arguments, out, workspace)
    return out


def workspace_bytes(problem: Problem, device: torch.device | str | None = None) -> int:
    """Bytes of workspace that `fused_moe_fp8` needs for up to `problem.tokens` tokens on `device`.

    Configurations differ by token count, so this is the largest need at any count up to it.
    """
    card = read_card(_device_index(torch.device(device) if device is not None else torch.device("cuda")))
    return _largest_need(problem, card)


@functools.lru_cache(maxsize=64)
def _largest_need(problem: Problem, card: Card) -> int:
    # Every count is asked (0.2 s, once): a configuration's need grows with the count, so only its last one matters.
    largest = 0
    before: tuple[Problem, Config] | None = None
    for count in range(1, min(problem.tokens, workspace_module.TOKENS_PER_PASS) + 1):
        part = problem.with_tokens(count)
        name = _backend(part, card)
        if name != "triton":
            largest = max(largest, RUNNERS[name].need(part, card))
            continue
        config = choose.__wrapped__(part, card)
        if before is not None and before[1] != config:
            largest = max(largest, workspace_module.layout(*before).total)
        before = part, config
    return max(largest, workspace_module.layout(*before).total) if before else largest


tables.when_changed(_largest_need.cache_clear)


def run(problem: Problem, config: Config, card: Card, tensors: Tensors, workspace: torch.Tensor) -> None:
    """Run one pass with an explicit configuration: what the tuner and the tests call."""
    Pass(problem, config, tensors, workspace, card.multiprocessors).run()


@functools.lru_cache(maxsize=4096)
def _triton_plan(problem: Problem, card: Card) -> tuple[Config, workspace_module.Layout]:
    """What a pass is run with, and where its buffers lie."""
    config = choose(problem, card)
    return config, workspace_module.layout(problem, config)


def _triton_need(problem: Problem, card: Card) -> int:
    return _triton_plan(problem, card)[1].total


def _triton_run(problem: Problem, card: Card, tensors: Tensors, workspace: torch.Tensor) -> None:
    config, plan = _triton_plan(problem, card)
    Pass(problem, config, tensors, workspace, card.multiprocessors, plan=plan).run()


@dataclass(frozen=True)
class Runner:
    """How one backend of backends.py runs one pass of up to TOKENS_PER_PASS tokens."""

    need: Callable[[Problem, Card], int]
    """Bytes of workspace."""
    run: Callable[[Problem, Card, Tensors, torch.Tensor], None]


def _hopper_need(problem: Problem, card: Card) -> int:
    from .hopper import backend

    return backend.workspace_bytes(problem, backend.choose(problem, card))


def _hopper_run(problem: Problem, card: Card, tensors: Tensors, workspace: torch.Tensor) -> None:
    from .hopper import backend

    backend.run(problem, backend.choose(problem, card), card, tensors, workspace)


RUNNERS: dict[str, Runner] = {
    "triton": Runner(_triton_need, _triton_run),
    "hopper": Runner(_hopper_need, _hopper_run),
}


def _backend(problem: Problem, card: Card) -> str:
    """The backend of ours that serves a problem. Whoever calls this operator has chosen it over upstream's kernel."""
    name = backends.route(problem, card)
    return "triton" if name == backends.UPSTREAM else name


@functools.lru_cache(maxsize=4096)
def _passes(whole: Problem, card: Card, step: int) -> tuple[int, tuple[tuple[int, Problem, str], ...]]:
    """Bytes of workspace that a call needs, and its passes of `step` tokens: first token, sizes and backend."""
    parts = [(first, whole.with_tokens(min(step, whole.tokens - first))) for first in range(0, whole.tokens, step)]
    passes = tuple((first, part, _backend(part, card)) for first, part in parts)
    return max(RUNNERS[name].need(part, card) for _, part, name in passes), passes


tables.when_changed(_triton_plan.cache_clear)
tables.when_changed(_passes.cache_clear)


def _device_index(device: torch.device) -> int | None:
    if device.type == "cuda":
        return device.index if device.index is not None else torch.cuda.current_device()
    if not INTERPRETED.value:
        raise RuntimeError(
            f"fused_moe_fp8 needs a CUDA device, got {device}. On CPU, set TRITON_INTERPRET=1 before the first import."
        )
    return None


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"fused_moe_fp8: {message}")


def problem_of(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> Problem:
    """Sizes read off the tensors; ValueError where they do not fit together. Each call comes here: text is made on refusal."""
    if hidden_states.dim() != 2:
        _refuse(f"hidden_states is {list(hidden_states.shape)}, want [tokens, hidden]")
    if hidden_states.dtype is not torch.bfloat16:
        _refuse(f"hidden_states is {hidden_states.dtype}, want bfloat16")
    tokens, hidden = hidden_states.shape
    if w13.dim() != 3 or w2.dim() != 3:
        _refuse("w13 and w2 must have 3 dimensions: experts, outputs, inputs")
    experts, doubled, _ = w13.shape
    width = doubled // 2
    if w13.shape != (experts, 2 * width, hidden):
        _refuse(f"w13 is {list(w13.shape)} with hidden {hidden}")
    if w2.shape != (experts, hidden, width):
        _refuse(f"w2 is {list(w2.shape)}, want {[experts, hidden, width]} to match w13")
    if experts <= 0 or width <= 0 or hidden <= 0:
        _refuse("experts, intermediate and hidden sizes must be positive")
    for name, weight, inputs in (("w13", w13, hidden), ("w2", w2, width)):
        if weight.dtype is not _FP8:
            _refuse(f"{name} is {weight.dtype}, want float8_e4m3fn")
        if weight.stride()[1:] != (inputs, 1):
            _refuse(f"{name} has strides {list(weight.stride())}; each expert must be contiguous")
    for name, scale, count in (("w13_scale", w13_scale, 2 * width), ("w2_scale", w2_scale, hidden)):
        if scale.dtype is not torch.float32:
            _refuse(f"{name} is {scale.dtype}, want float32")
        if scale.shape != (experts, count, 1) and scale.shape != (experts, count):
            _refuse(f"{name} is {list(scale.shape)}, want {[experts, count]} (one scale a channel)")
    chosen = topk_ids.shape
    if len(chosen) != 2 or chosen[0] != tokens or chosen[1] <= 0:
        _refuse(f"topk_ids is {list(chosen)}, want [{tokens}, top_k]")
    if topk_ids.dtype is not torch.int32 and topk_ids.dtype is not torch.int64:
        _refuse(f"topk_ids is {topk_ids.dtype}, want int32 or int64")
    if topk_weights.shape != chosen:
        _refuse(f"topk_weights is {list(topk_weights.shape)}, unlike topk_ids")
    if topk_weights.dtype is not torch.float32:
        _refuse(f"topk_weights is {topk_weights.dtype}, want float32")
    device, global_experts = hidden_states.device, experts
    if expert_map is not None:
        if expert_map.dim() != 1 or expert_map.dtype is not torch.int32 or expert_map.numel() == 0:
            _refuse(f"expert_map is {list(expert_map.shape)} {expert_map.dtype}, want [global experts] int32")
        global_experts = expert_map.numel()
    for tensor in (w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, expert_map):
        if tensor is not None and tensor.device != device:
            _refuse("all tensors must be on one device")
    return Problem(tokens, hidden, width, experts, global_experts, chosen[1])


def _fused_moe_fp8_out(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
) -> None:
    whole = problem_of(hidden_states, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, expert_map)
    if out.shape != hidden_states.shape or out.dtype is not torch.bfloat16 or not out.is_contiguous():
        _refuse(f"out is {list(out.shape)} {out.dtype}, want contiguous {list(hidden_states.shape)} bfloat16")
    if whole.tokens == 0:
        return
    card = read_card(_device_index(hidden_states.device))
    hidden_states, topk_weights, topk_ids = map(torch.Tensor.contiguous, (hidden_states, topk_weights, topk_ids))
    w13_scale, w2_scale = w13_scale.contiguous(), w2_scale.contiguous()  # [experts, channels, 1] lies as [experts, channels]
    if expert_map is not None:
        expert_map = expert_map.contiguous()
    need, passes = _passes(whole, card, workspace_module.TOKENS_PER_PASS)
    if workspace is None:
        workspace = torch.empty(need, dtype=torch.uint8, device=hidden_states.device)
    if workspace.dtype is not torch.uint8 or not workspace.is_contiguous() or workspace.numel() < need:
        _refuse(
            f"workspace has {workspace.numel()} elements of {workspace.dtype}, want {need} contiguous uint8;"
            " size it by workspace_bytes()"
        )
    if workspace.data_ptr() % 16:
        _refuse("workspace must start at a multiple of 16 bytes (256 for full speed)")
    for first, part, name in passes:
        tensors = Tensors(hidden_states, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, expert_map, out)
        if len(passes) > 1:
            rows = slice(first, first + part.tokens)
            tensors = replace(
                tensors,
                hidden=hidden_states[rows],
                topk_weights=topk_weights[rows],
                topk_ids=topk_ids[rows],
                out=out[rows],
            )
        RUNNERS[name].run(part, card, tensors, workspace)


def _fused_moe_fp8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
    _fused_moe_fp8_out(hidden_states, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, expert_map, out, None)
    return out


for _key in ("CUDA", "CPU"):
    _library.impl("fused_moe_fp8", _fused_moe_fp8, _key)
    _library.impl("fused_moe_fp8_out", _fused_moe_fp8_out, _key)


@torch.library.register_fake("vllm_glm_patch::fused_moe_fp8", lib=_library)  # type: ignore[untyped-decorator]
def _fake(hidden_states: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)


@torch.library.register_fake("vllm_glm_patch::fused_moe_fp8_out", lib=_library)  # type: ignore[untyped-decorator]
def _fake_out(*arguments: torch.Tensor | None) -> None:
    return None
