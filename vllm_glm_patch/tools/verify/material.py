"""The inputs of one case, and how results are compared with float64. The same shape, tokens and routing: the same inputs."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ...moe.generators import BAD_IDS, Routing, Weights, make_expert_map, make_routing, make_tokens, make_weights
from ...moe.problem import Problem
from ...moe.reference import fused_moe, local_experts, quantise_per_token
from .cases import Shape
from .journal import OK, WRONG, Outcome

SAMPLED = 128  # tokens or rows of a result that are compared with float64, the first and the last among them
# Largest relative error of a row. FP8 activations cost 1.3 – 2.1 % of a whole layer (H100, all backends) and up to some
# 4 % of a row with few local experts; one wrong expert of eight is 35 %. A GEMM of given FP8 values: bf16 rounding, and the
# 14 bits in which Hopper adds FP8 products, up to 1 % at a depth of 5120. Quantising: half an FP8 step, 2.6 % on average.
LAYER_LIMIT = 0.08
GEMM_LIMIT = 0.03
QUANTISE_LIMIT = 0.05
ROUNDING_LIMIT = 0.01

Buffers = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        buffers: everything it is given, by name; any of them may be moved before an unmapped page.
        run: calls it with such buffers. Its result must not keep a buffer that it only reads.
        check: compares a result with float64.
    """

    buffers: dict[str, torch.Tensor]
    run: Callable[[Buffers], Any]
    check: Callable[[Any], Outcome]


@functools.lru_cache(maxsize=1)
def weights_of(shape: Shape, device: str) -> Weights:
    """The weights of a shape, made once; the shape before is given up."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(shape.name.encode()))
    problem = Problem(1, shape.hidden_size, shape.intermediate_size, shape.experts, shape.global_experts, shape.top_k)
    return make_weights(problem, generator)


class Material:
    """Inputs of one shape, token count and routing."""

    def __init__(self, shape: Shape, tokens: int, routing: str, device: str) -> None:
        self.device = device
        self.problem = Problem(
            tokens, shape.hidden_size, shape.intermediate_size, shape.experts, shape.global_experts, shape.top_k
        )
        self.w13, self.w2, self.w13_scale, self.w2_scale = weights_of(shape, device)
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(f"{shape.name}/{tokens}/{routing}".encode()))
        self.hidden = make_tokens(self.problem, self.generator)
        made: Routing = routing if routing in ("skewed", "collapsed") else "spread"  # type: ignore[assignment]
        self.topk_weights, self.topk_ids = make_routing(self.problem, self.generator, made)
        self.logits = torch.randn(tokens, shape.global_experts, generator=self.generator, device=device)
        self.dirty = torch.zeros(tokens, dtype=torch.bool, device=device)
        """Tokens of which nothing is asked but that they harm no other: they are NaN."""
        expert_map = make_expert_map(self.problem)
        self.expert_map = None if expert_map is None else expert_map.to(device)
        if routing in ("minus-one", "past-end"):
            self._spoil_ids(routing)
        if routing == "nan":
            self._spoil_tokens()

    def _spoil_ids(self, routing: str) -> None:
        """A fifth of the ids, and all of the last token's, name no expert."""
        p = self.problem
        past = [i + p.global_experts if 0 <= i < p.global_experts else i for i in BAD_IDS if i >= 0]
        values = torch.tensor([-1] if routing == "minus-one" else [p.global_experts, *past], dtype=torch.int32)
        pick = torch.randint(len(values), self.topk_ids.shape, generator=self.generator, device=self.device)
        where = torch.rand(self.topk_ids.shape, generator=self.generator, device=self.device) < 0.2
        where[-1] = True
        self.topk_ids = torch.where(where, values.to(self.device)[pick], self.topk_ids).contiguous()

    def _spoil_tokens(self) -> None:
        """Every third token, but never the last of several, is NaN: its hidden state, logits and weights."""
        self.dirty[:-1:3] = True
        self.hidden[self.dirty] = float("nan")
        self.topk_weights[self.dirty] = float("nan")
        self.logits[self.dirty] = float("nan")
        self.logits[self.dirty, ::2] = float("inf")

    @functools.cached_property
    def local_ids(self) -> torch.Tensor:
        """[pairs] int64: the local expert of each pair, or the number of experts where it has none."""
        local = local_experts(self.topk_ids, self.problem.experts, self.expert_map).flatten()
        return torch.where(local < 0, self.problem.experts, local)

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """[experts] int64: rows of each local expert."""
        return torch.bincount(self.local_ids, minlength=self.problem.experts + 1)[: self.problem.experts]

    @functools.cached_property
    def first_rows(self) -> torch.Tensor:
        """[experts + 1] int64: where the rows of each expert begin, and where the last one's end."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """[pairs] int64: pairs grouped by local expert, those without one last."""
        return torch.argsort(self.local_ids, stable=True)

    @functools.cached_property
    def quantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states in FP8 [tokens, hidden] and their scales [tokens, 1] fp32."""
        return quantise(self.hidden)

    def random(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width] bf16, normal."""
        return torch.randn(rows, width, generator=self.generator, device=self.device, dtype=torch.float32).bfloat16()

    def check_layer(self, out: torch.Tensor) -> Outcome:
        """Compare a layer's output [tokens, hidden] with float64 at sampled tokens; NaN tokens are not asked."""
        rows = sample((~self.dirty).nonzero().flatten())
        want = fused_moe(
            self.hidden[rows], self.w13, self.w2, self.w13_scale, self.w2_scale, self.topk_weights[rows], self.topk_ids[rows],
            expert_map=self.expert_map, quantised=False,
        )  # fmt: skip
        outcome = compare(out[rows], want, LAYER_LIMIT)
        if outcome.outcome == OK and not bool(torch.isfinite(out[~self.dirty]).all()):
            return Outcome(WRONG, "a token outside the sample is not finite", None, LAYER_LIMIT)
        return outcome


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width] → FP8 and scales [rows, 1] fp32; NaN stays where it was."""
    rows = [quantise_per_token(part) for part in x.split(4096)]
    values = torch.cat([value.to(torch.float8_e4m3fn) for value, _ in rows])
    return values, torch.cat([scale.float() for _, scale in rows])


def sample(rows: torch.Tensor, count: int = SAMPLED) -> torch.Tensor:
    """At most `count` of `rows`, evenly spaced, with the first and the last."""
    if rows.numel() <= count:
        return rows
    places = torch.linspace(0, rows.numel() - 1, count, device=rows.device, dtype=torch.float64).round().long()
    return rows[places]


def compare(got: torch.Tensor, want: torch.Tensor, limit: float, text: str = "") -> Outcome:
    """Row by row: ‖got − want‖ / ‖want‖ in float64, where a row below a tenth of the average counts as a tenth of it."""
    if want.numel() == 0:
        return Outcome(OK, "nothing to compare", 0.0, limit)
    got = got.double()
    norms = want.norm(dim=1)
    average = float(norms.square().mean().sqrt())
    if average == 0.0:
        average = 1.0  # every row is to be zero
    error = (got - want).norm(dim=1) / norms.clamp(min=0.1 * average)
    error = torch.where(torch.isfinite(got).all(dim=1), error, float("inf"))
    worst = float(error.max())
    if worst <= limit:
        return Outcome(OK, "", worst, limit)
    return Outcome(WRONG, text or f"{int((error > limit).sum())} of {len(error)} sampled rows", worst, limit)


def same(good: Any, text: str) -> Optional[Outcome]:
    """None where it is so, else WRONG with this text."""
    return None if bool(good) else Outcome(WRONG, text)
