"""The size of one fused MoE call, and what it must move and compute."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, known on the host without looking at any tensor's contents.

    Attributes:
        tokens: rows of the hidden states, 0 and up.
        hidden_size: width of the hidden states, in elements (5120 in GLM-4.6).
        intermediate_size: expert width on this rank, in elements (1536 / TP in GLM-4.6).
        experts: experts whose weights this rank holds.
        global_experts: experts the router chooses from; larger than `experts` only with an expert_map.
        top_k: experts chosen for each token (8 in GLM-4.6).
    """

    tokens: int
    hidden_size: int = 5120
    intermediate_size: int = 192
    experts: int = 160
    global_experts: int = 160
    top_k: int = 8

    @property
    def pairs(self) -> int:
        """(token, chosen expert) pairs: tokens × top_k."""
        return self.tokens * self.top_k

    def with_tokens(self, tokens: int) -> Problem:
        """The same layer with another number of tokens."""
        return replace(self, tokens=tokens)

    @property
    def shape_key(self) -> str:
        """Name of everything but the token count, as the tuned tables spell it."""
        return f"E={self.experts},N={self.intermediate_size},K={self.hidden_size},top_k={self.top_k}"

    @property
    def expert_bytes(self) -> int:
        """FP8 weight bytes of one expert (w13 and w2)."""
        return 3 * self.intermediate_size * self.hidden_size

    def active_experts(self) -> float:
        """Expected number of local experts with at least one token, under uniform independent routing."""
        return self.experts * (1.0 - (1.0 - self.top_k / self.global_experts) ** self.tokens)

    def floating_point_operations(self) -> float:
        """Multiply-adds × 2 of both GEMMs, under uniform routing."""
        local_pairs = self.pairs * self.experts / self.global_experts
        return 2.0 * local_pairs * self.expert_bytes

    def minimum_bytes(self) -> float:
        """Device-memory bytes no version can avoid: tokens in and out once (bf16), used weights once."""
        return 4.0 * self.tokens * self.hidden_size + self.active_experts() * self.expert_bytes


GLM_SHAPES = {
    "TP8": Problem(1, intermediate_size=192),
    "TP4": Problem(1, intermediate_size=384),
    "TP2": Problem(1, intermediate_size=768),
    "TP1": Problem(1, intermediate_size=1536),
    "EP8": Problem(1, intermediate_size=1536, experts=20),
}
"""GLM-4.6's MoE layer as one rank of a deployment has it: tensor parallel over 8, 4, 2, 1; expert parallel over 8."""
