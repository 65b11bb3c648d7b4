"""A layer's real weights, ours against vLLM's own kernel: before the server is ready, never while a graph is captured."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..moe.problem import Problem
from . import failures

if TYPE_CHECKING:
    import torch

COUNTS = (1, 64, 8191, 8192)
"""Token counts that are compared where the deployment can have them; its largest step comes on top."""
MOST = 16385
"""Longer steps than this run as passes of 16384 tokens (moe/workspace.py): two passes are enough to compare."""
SLICE = 256
"""Tokens that vLLM's kernel gets at once, so that its workspace stays at 42 MB (5120 wide, top 8) instead of 1.34 GB. A
token's result does not depend on the others."""
TOLERANCE = 0.05
"""Most ‖ours − theirs‖ / ‖theirs‖ of all tokens. Each is 1.3 – 2.1 % from float64 (H100), so some 3 % from the other."""
TOKEN_TOLERANCE = 0.25
"""The same for any one token, so that a single wrong row among 8192 shows: it would be 1 % of all. One expert of eight that is
missing makes some 35 %."""
_SEED = 20

Run = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Takes tokens [n, hidden] bf16, routing weights and ids [n, top_k]; gives [n, hidden] bf16."""


class Differs(Exception):
    """Ours and vLLM's results differ by more than rounding explains; the text says where and by how much."""


class NothingCompiles(Exception):
    """No configuration of ours can be compiled; the text is the first one's error."""


@dataclass(frozen=True)
class Outcome:
    """A comparison that went well."""

    counts: tuple[int, ...]
    difference: float
    """The largest of any count, over all of its tokens."""
    token_difference: float
    """The largest of any one token."""
    seconds: float
    """Of the comparison, without compiling."""
    compiling: float
    """Seconds of the first runs, in which Triton compiles what its cache does not have."""

    def __str__(self) -> str:
        counts = ", ".join(map(str, self.counts))
        return (
            f"{counts} tokens differ by at most {100 * self.difference:.1f} % from vLLM's own kernel, one token by at most "
            f"{100 * self.token_difference:.1f} %; {self.seconds:.2f} s, and {self.compiling:.1f} s for compiling"
        )


def counts_up_to(limit: int) -> tuple[int, ...]:
    """The counts to compare in a deployment whose largest step has `limit` tokens."""
    most = max(1, min(limit, MOST))
    return tuple(sorted({count for count in COUNTS if count <= most} | {most}))


def run_each(problem: Problem, ours: Run, like: Inputs, configurations: Mapping[int, Hashable]) -> dict[Hashable, str]:
    """Run ours once with each token count, so that its kernels are compiled.

    Args:
        configurations: token count → what ours runs it with. The other counts of one that cannot be compiled are not run.

    Returns:
        Configurations that cannot be compiled, with what the compiler says. Not the errors: their frames would keep memory.

    Raises:
        NothingCompiles: that is all of them. Whatever ours raises that says anything else goes on.
    """
    import torch

    refused: dict[Hashable, str] = {}
    if not configurations:
        return refused
    with torch.inference_mode():
        tokens, weights, ids = like.make(problem.with_tokens(max(configurations)))
        for count, configuration in configurations.items():
            if configuration in refused:
                continue
            try:
                ours(tokens[:count], weights[:count], ids[:count])
            except Exception as error:
                if not failures.not_compiled(error):
                    raise
                like.wait()  # a device in error is no matter of one kernel
                refused[configuration] = failures.named(error)
        like.wait()
    if refused and refused.keys() == set(configurations.values()):
        raise NothingCompiles(next(iter(refused.values())))
    return refused


def compare(problem: Problem, ours: Run, theirs: Run, like: Inputs, counts: Sequence[int], step: int = SLICE) -> Outcome:
    """Run both on the same random tokens, with a routing that spreads over all experts.

    Args:
        problem: the layer's sizes.
        like: where and how the layer takes its inputs.
        counts: token counts, ascending.
        step: tokens that vLLM's kernel gets at once.

    Raises:
        Differs: they disagree, or there is nothing to compare with.
    """
    import torch

    with torch.inference_mode():
        tokens, weights, ids = like.make(problem.with_tokens(counts[-1]))
        started = time.perf_counter()
        for count in counts:
            ours(tokens[:count], weights[:count], ids[:count])
        like.wait()
        compiled = time.perf_counter()
        wanted = torch.cat([
            theirs(tokens[i : i + step].clone(), weights[i : i + step].clone(), ids[i : i + step].clone())
            for i in range(0, counts[-1], step)
        ])  # fmt: skip
        if not bool(torch.isfinite(wanted).all()):
            raise Differs("vLLM's own kernel gives values that are not finite with this layer's weights: nothing to compare")
        worst, worst_token = 0.0, 0.0
        for count in counts:
            whole, one = difference(ours(tokens[:count], weights[:count], ids[:count]), wanted[:count])
            if not (whole <= TOLERANCE and one <= TOKEN_TOLERANCE):
                raise Differs(
                    f"with {count} tokens it differs from vLLM's own kernel by {100 * whole:.1f} %, one token by "
                    f"{100 * one:.1f} % (allowed: {100 * TOLERANCE:.0f} %, {100 * TOKEN_TOLERANCE:.0f} %)"
                )
            worst, worst_token = max(worst, whole), max(worst_token, one)
        like.wait()
    ended = time.perf_counter()
    return Outcome(tuple(counts), worst, worst_token, ended - compiled, compiled - started)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """‖ours − theirs‖ / ‖theirs‖ over all tokens, and the largest of any one token; inf where ours is not finite.

    A token whose own result is small, as where few of its experts are on this rank, is measured against a tenth of the
    tokens' root mean square.
    """
    import torch

    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    apart, size = torch.zeros(len(theirs), device=theirs.device), torch.zeros(len(theirs), device=theirs.device)
    for i in range(0, len(theirs), 1024):  # in float32 a whole step would be twice its bf16
        mine, other = ours[i : i + 1024].float(), theirs[i : i + 1024].float()
        apart[i : i + 1024], size[i : i + 1024] = (mine - other).norm(dim=1), other.norm(dim=1)
    if not bool(torch.isfinite(apart).all()):
        return float("inf"), float("inf")
    all_apart, all_size = float(apart.norm()), float(size.norm())
    if all_size == 0.0:
        return (0.0, 0.0) if all_apart == 0.0 else (float("inf"), float("inf"))
    floor = 0.1 * all_size / len(theirs) ** 0.5
    return all_apart / all_size, float((apart / size.clamp(min=floor)).max())


@dataclass(frozen=True)
class Inputs:
    """Where and how a layer takes its inputs."""

    device: torch.device
    ids: torch.dtype
    weights: torch.dtype

    def make(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random tokens, routing weights and ids; the routing is top-k of independent logits, even over the experts."""
        import torch

        from ..moe.generators import make_routing, make_tokens

        generator = torch.Generator(self.device).manual_seed(_SEED)
        weights, ids = make_routing(problem, generator, "spread")
        # uint32 has few operators: the same bits in another name.
        ids = ids.view(torch.uint32) if self.ids == torch.uint32 else ids.to(self.ids)
        return make_tokens(problem, generator), weights.to(self.weights), ids

    def wait(self) -> None:
        """Wait for the device, so that what went wrong on it shows now."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
