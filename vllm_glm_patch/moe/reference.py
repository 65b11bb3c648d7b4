"""The plain truth in float64, with the contract's FP8 steps and without them. Written for reading, not for speed."""

from __future__ import annotations

from collections.abc import Callable

import torch

FP8_MAX = 448.0
MIN_SCALE = 1.0 / (448.0 * 512.0)


def quantise_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width] → E4M3 values as float64 and fp32 scales [rows, 1] as float64: amax / 448, at least MIN_SCALE."""
    amax = x.abs().amax(dim=1, keepdim=True).float()
    # In float64 first: on a card torch divides fp32 by a number by multiplying with its reciprocal, which is one bit off,
    # and rows whose values lie on ties (amax 1.75 · 2**n: a thirtieth of all their values) would be rounded otherwise.
    scale = torch.clamp((amax.double() / FP8_MAX).float(), min=MIN_SCALE)
    q = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.double(), scale.double()


def local_experts(topk_ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """[tokens, top_k] int64: local expert, or −1 where an id names none."""
    ids = topk_ids.to(torch.int64)
    if expert_map is None:
        return torch.where((ids >= 0) & (ids < experts), ids, -1)
    known = (ids >= 0) & (ids < expert_map.numel())
    local = expert_map.to(torch.int64)[torch.where(known, ids, 0)]
    return torch.where(known & (local >= 0) & (local < experts), local, -1)


def fused_moe(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    quantised: bool = True,
    stored: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `fused_moe_fp8` approximates: [tokens, hidden] float64. Arguments as there.

    quantised: with the two per-token FP8 steps of the contract; False leaves activations exact (weights stay as they
    are stored), which is what relative errors are reported against.
    stored: what becomes of SwiGLU's float64 results before their FP8 step where a kernel stores them in between: rounding,
    which takes those that lie near the middle between two FP8 values to the other one.
    """
    experts = w13.shape[0]
    local = local_experts(topk_ids, experts, expert_map)
    x = hidden_states.double()
    if quantised:
        q, scale = quantise_per_token(x)
        x = q * scale
    out = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        token, choice = (local == expert).nonzero(as_tuple=True)
        gate_up = x[token] @ w13[expert].double().T * w13_scale[expert].reshape(1, -1).double()
        gate, up = gate_up.chunk(2, dim=1)
        y = gate * torch.sigmoid(gate) * up
        if stored is not None:
            y = stored(y).double()
        if quantised:
            q, scale = quantise_per_token(y)
            y = q * scale
        z = y @ w2[expert].double().T * w2_scale[expert].reshape(1, -1).double()
        out.index_add_(0, token, z * topk_weights[token, choice].double()[:, None])
    return out


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; inf if anything in `got` is not finite."""
    got = got.double()
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp(min=1e-300))
