"""One process: which MoE layers our kernel serves, from which token count on, and what the log has been told of it.

The choice between our kernel and vLLM's is made in plain Python, by the number of tokens of the very call. That is safe under
torch.compile and in CUDA graphs, since in every release vLLM's whole MoE layer is one opaque operator
(torch.ops.vllm.moe_forward, moe_forward_shared): compiled graphs hold that operator, whatever the count, and what runs inside
of it is not traced; vLLM's own kernel is reachable there as ever. A graph that is captured keeps the choice of its own
count. If the modular kernel is traced after all, by somebody who calls it outside of that operator, vLLM's own code runs:
a choice there would be a guard, and another count a recompilation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..log import logger
from ..settings import Settings
from . import conditions, self_test
from .failures import first_line, lost, named
from .modular_kernel import Call, Reader

if TYPE_CHECKING:
    import torch

    from ..moe.dispatch import Card
    from ..moe.problem import Problem

_UPSTREAM = "vLLM's own kernel"
Around = Callable[[Call], AbstractContextManager[None]]


class DeviceLost(RuntimeError):
    """The device reported an error in our kernel: this process cannot go on. The text says what to set."""

    def __init__(self, when: str, cause: BaseException) -> None:
        super().__init__(
            f"CUDA error in the fused MoE kernel (fused_moe_fp8), in {when}: {first_line(cause)}. This process cannot go on. "
            "Set VLLM_GLM_PATCH_MOE=upstream so that vLLM's own kernel serves, and report this."
        )


@dataclass
class Layer:
    """One MoE layer of this process."""

    number: int
    """In the order in which layers were first run, from 1."""
    reason: str | None
    """Why vLLM's own kernel serves it; None where ours does."""
    problem: Problem | None = None
    """Its sizes."""
    card: Card | None = None
    tested: bool = False
    ours: dict[int, bool] = field(default_factory=dict)
    """Token count -> whether ours serves it."""


class Serving:
    """The state of one process, from `install` to `uninstall`."""

    def __init__(self, settings: Callable[[], Settings], around: Around = lambda call: nullcontext()) -> None:
        self._settings = settings
        self._around = around
        self.refused: str | None = None
        """Why the whole process is served by vLLM's own kernel; None where it is not."""
        self.limit: int | None = None
        """Tokens of the deployment's largest step, where it is known."""
        self.layers: Any = None
        """By the tensor of their first weights, which it does not keep alive."""
        self._left: set[Hashable] = set()
        """Configurations whose kernels cannot be compiled here: their token counts are vLLM's, in all layers."""
        self._compared: tuple[int, ...] = ()
        """Token counts at which the first layer was compared."""
        self._said: set[str] = set()

    def call(self, original: Any, reader: Reader, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call of vLLM's modular kernel: served by ours, or by `original`."""
        import torch

        if self.refused is not None or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        try:
            call = reader.read(args, kwargs)
            layer = self._layer(call, reader, args, kwargs)
        except Exception as error:  # vLLM must go on, whatever there is that we did not think of
            self._say(f"a layer could not be looked at ({named(error)})")
            return original(*args, **kwargs)
        if layer.reason is not None or conditions.has_lora(call):
            return original(*args, **kwargs)
        if not self._ready(layer, call, original, reader, args, kwargs):
            return original(*args, **kwargs)
        if not self._is_ours(layer, call.hidden_states.shape[0]):
            return original(*args, **kwargs)
        try:
            with self._around(call):
                return run(call)
        except DeviceLost:
            raise
        except Exception as error:
            self._raise_if_lost(error, f"serving {call.hidden_states.shape[0]} tokens", call.hidden_states.device)
            layer.reason = f"the kernel failed with {call.hidden_states.shape[0]} tokens ({first_line(error)})"
            self._say(layer.reason, loud=True)
            return original(*args, **kwargs)

    def _layer(self, call: Call, reader: Reader, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layer:
        if self.layers is None:
            self._begin()
        layer: Layer | None = self.layers.get(call.w13)
        if layer is None:
            reason = conditions.why_not(call, lambda name: reader.option(name, args, kwargs))
            layer = Layer(len(self.layers) + 1, reason)
            if reason is None:
                layer.problem = conditions.problem_of(call)
                layer.card = conditions.card_of(call.hidden_states.device)
            else:
                self._say(reason)
            self.layers[call.w13] = layer
        return layer

    def _begin(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        from ..moe import backends, tables

        settings = self._settings()
        tables.use_folder(settings.tables())
        backends.prefer(settings.moe_backend)
        self.layers = WeakIdKeyDictionary()

    def _is_ours(self, layer: Layer, tokens: int) -> bool:
        ours = layer.ours.get(tokens)
        if ours is None:
            from ..moe import backends

            assert layer.problem is not None and layer.card is not None
            routed = backends.route(layer.problem.with_tokens(tokens), layer.card) != backends.UPSTREAM
            ours = layer.ours[tokens] = routed and not self._is_left(layer, tokens)
        return ours

    def _is_left(self, layer: Layer, tokens: int) -> bool:
        """Whether ours would run kernels that cannot be compiled, in any of its passes, where there are such kernels at all."""
        if not self._left:
            return False
        from ..moe import backends
        from ..moe.workspace import TOKENS_PER_PASS

        assert layer.problem is not None and layer.card is not None
        passes = {tokens} if tokens <= TOKENS_PER_PASS else {TOKENS_PER_PASS, tokens % TOKENS_PER_PASS or TOKENS_PER_PASS}
        needed = {backends.configuration(layer.problem.with_tokens(part), layer.card) for part in passes}
        return None in needed or not needed.isdisjoint(self._left)  # None: a pass whose kernels nobody tried

    def _ready(
        self, layer: Layer, call: Call, original: Any, reader: Reader, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether a layer has passed its self-test, which is made now where it can be."""
        if layer.tested:
            return True
        if _is_captured(call):
            return False  # this graph keeps vLLM's own kernel

        def theirs(tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            routed = {"hidden_states": tokens, "topk_weights": weights, "topk_ids": ids}
            new_args, new_kwargs = reader.replaced(args, kwargs, **routed)
            result: torch.Tensor = original(*new_args, **new_kwargs)
            return result

        try:
            self._test(layer, call, theirs)
        except Exception as error:
            self._raise_if_lost(error, "its self-test", call.hidden_states.device)
            what = str(error) if isinstance(error, (self_test.Differs, self_test.NothingCompiles)) else named(error)
            self.refused = f"self-test of layer {layer.number}: {what}"
            logger.warning(
                "The fused MoE kernel is not used in this process (%s). vLLM's own MoE kernel serves, with the other patches "
                "in place. Please report this; VLLM_GLM_PATCH_MOE=upstream starts without the kernel and without its test.",
                self.refused,
            )
            return False
        layer.tested = True
        return True

    def _test(self, layer: Layer, call: Call, theirs: self_test.Run) -> None:
        """The first layer at all counts that matter, by every configuration; each other at one count, in milliseconds."""

        def ours(tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return run(replace(call, hidden_states=tokens, topk_weights=weights, topk_ids=ids))

        assert layer.problem is not None and layer.card is not None
        limit = max(1, self.limit or call.hidden_states.shape[0])
        like = self_test.Inputs(call.hidden_states.device, call.topk_ids.dtype, call.topk_weights.dtype)
        first = not any(other.tested for other in self.layers.values())
        counts = [n for n in self_test.counts_up_to(limit) if self._is_ours(layer, n)]
        if not first:
            others = [n for n in self._compared if self._is_ours(layer, n)]
            counts = [n for n in counts if n <= 64][-1:] or others[:1]
        if not counts:
            return  # upstream's at all counts that are compared; what lies between is tried by nobody here
        if not first:
            self_test.compare(layer.problem, ours, theirs, like, counts)
            return
        logger.info(
            "The fused MoE kernel is compared with vLLM's own. Kernels that Triton's cache does not have are compiled first, "
            "which takes up to a minute."
        )
        started, most = time.perf_counter(), counts[-1]
        warm, ends, theirs_most = plan(layer.problem, layer.card, most, self._left)
        known = _configurations(layer.problem, layer.card, (*warm, *sorted({*counts, *ends})))
        tried = {n: configuration for n, configuration in known.items() if configuration not in self._left}
        refused = self_test.run_each(layer.problem, ours, like, tried)
        if refused:
            self._leave(layer, refused, limit)
            _, ends, theirs_most = plan(layer.problem, layer.card, most, self._left)
        compiling = time.perf_counter() - started
        counts = sorted(n for n in {*counts, *ends} if self._is_ours(layer, n))
        outcome = self_test.compare(layer.problem, ours, theirs, like, counts, max(self_test.SLICE, theirs_most))
        self._compared = tuple(counts)
        outcome = replace(outcome, compiling=compiling + outcome.compiling)
        logger.info("The fused MoE kernel passed its self-test with the weights of a layer: %s.", outcome)

    def _leave(self, layer: Layer, refused: Mapping[Hashable, str], limit: int) -> None:
        """Let vLLM's own kernel serve the token counts of configurations that cannot be compiled, in all layers."""
        assert layer.problem is not None and layer.card is not None
        for configuration, why in refused.items():
            counts = _counts_of(configuration, layer.problem, layer.card, limit)
            logger.warning(
                "The fused MoE kernel for %s tokens cannot be compiled here (%s). vLLM's own MoE kernel serves these counts in "
                "this process; the kernels of other counts are compared with it as ever. Please report this.",
                counts,
                why,
            )
        self._left.update(refused)
        for other in self.layers.values():
            other.ours.clear()

    def _raise_if_lost(self, error: Exception, when: str, device: torch.device) -> None:
        """DeviceLost if the device itself is in error: nothing can run in this process any more, vLLM's kernel neither."""
        cause: BaseException | None = error if lost(error) else None
        if cause is None and device.type == "cuda" and not _out_of_memory(error):
            import torch

            try:
                if not torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize(device)
            except RuntimeError as found:
                cause = found
        if cause is not None:
            raise DeviceLost(when, cause) from error

    def _say(self, reason: str, loud: bool = False) -> None:
        if reason not in self._said:
            self._said.add(reason)
            say = logger.warning if loud else logger.info
            say("vLLM's own kernel serves a MoE layer: %s.", reason)

    def summary(self) -> str:
        """Who serves what, in one line."""
        if self.refused is not None:
            return f"{_UPSTREAM} serves all MoE layers: {self.refused}"
        layers = list(self.layers.values()) if self.layers is not None else []
        if not layers:
            return (
                "no MoE layer came by vLLM's modular kernel: the model has none, or vLLM serves it by a kernel of another kind"
            )
        parts = []
        served = [layer for layer in layers if layer.reason is None]
        if served:
            parts.append(f"{len(served)} of {len(layers)} MoE layers served, {self._ranges(served[0])}")
        for reason, number in Counter(layer.reason for layer in layers if layer.reason is not None).most_common():
            parts.append(f"{_UPSTREAM} serves {number}: {reason}")
        return "; ".join(parts)

    def _ranges(self, layer: Layer) -> str:
        from ..moe import backends

        assert layer.problem is not None and layer.card is not None
        most = self.limit or max(layer.ours, default=1)
        ranges = backends.routes(layer.problem, layer.card, most, lambda tokens: self._is_left(layer, tokens))
        return ", ".join(f"{name} for {first} - {last} tokens" for first, last, name in ranges)


def run(call: Call) -> torch.Tensor:
    """Our kernel in the place of a call: [tokens, hidden] bf16."""
    import torch

    from ..moe import fused_moe_fp8

    assert call.w13_scale is not None and call.w2_scale is not None
    ids = call.topk_ids.view(torch.int32) if call.topk_ids.dtype == torch.uint32 else call.topk_ids
    return fused_moe_fp8(
        call.hidden_states.contiguous(), call.w13, call.w2, call.w13_scale, call.w2_scale, call.topk_weights.float(), ids,
        expert_map=call.expert_map,
    )  # fmt: skip


def plan(problem: Problem, card: Card, most: int, left: Container[Hashable] = frozenset()) -> tuple[list[int], list[int], int]:
    """Token counts up to `most`: those that compile everything, those that run every configuration once, and the largest that
    is upstream's (or 0), as are those of the configurations in `left`.

    Each configuration is compiled at its last count and the one before: Triton compiles for multiples of 16 apart.
    """
    from ..moe import backends
    from ..moe.workspace import TOKENS_PER_PASS

    theirs, last, ends = 0, {}, {}
    for tokens in range(1, min(most, TOKENS_PER_PASS) + 1):
        part = problem.with_tokens(tokens)
        configuration = backends.configuration(part, card)
        if configuration is None or configuration in left:
            theirs = tokens
        else:
            last[configuration, backends.variant(part, card)] = ends[configuration] = tokens
    compiled = {tokens for end in last.values() for tokens in (end - 1, end) if tokens > 0}
    return sorted(compiled), sorted(ends.values()), theirs


def _configurations(problem: Problem, card: Card, counts: Iterable[int]) -> dict[int, Hashable]:
    """What each token count of one pass is run with, in the order of the counts; without those that are upstream's."""
    from ..moe import backends
    from ..moe.workspace import TOKENS_PER_PASS

    found = {n: backends.configuration(problem.with_tokens(n), card) for n in counts if n <= TOKENS_PER_PASS}
    return {n: configuration for n, configuration in found.items() if configuration is not None}


def _counts_of(configuration: Hashable, problem: Problem, card: Card, most: int) -> str:
    """The token counts of one pass up to `most` that a configuration serves, as ranges."""
    from ..moe import backends
    from ..moe.workspace import TOKENS_PER_PASS

    ranges = backends.ranges(min(most, TOKENS_PER_PASS), lambda n: backends.configuration(problem.with_tokens(n), card))
    return ", ".join(f"{first} - {last}" for first, last, found in ranges if found == configuration)


def _is_captured(call: Call) -> bool:
    import torch

    return call.hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"
