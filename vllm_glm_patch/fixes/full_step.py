"""Handles the step of exactly max_num_batched_tokens: warmed up at start, or never scheduled (patch `full-step`)."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..log import follow_vllm, logger
from . import Context, Factory, full_step_probe

_SEED = 8192


class FullStepFailed(RuntimeError):
    """The warm-up of the full-budget step failed; the text says in what and what to set."""


def replacements(context: Context) -> Mapping[str, Factory]:
    """Factories for the roles `scheduler` and `worker`."""
    return {
        "scheduler": functools.partial(_scheduler_init, context),
        "worker": functools.partial(_warm_up_after, context),
    }


def policy(context: Context, vllm_config: Any) -> str:
    """`captured`, `guarded` or `off` for this deployment; `auto` is resolved."""
    chosen = context.settings().with_config(getattr(vllm_config, "additional_config", None)).shape_policy
    if chosen != "auto":
        return chosen
    return "captured" if context.relied_on() else "guarded"


def on_engine_config(context: Context, vllm_config: Any) -> None:
    """Add the full-budget step to compile_sizes, where that is switched on and vLLM compiles."""
    settings = context.settings().with_config(getattr(vllm_config, "additional_config", None))
    if not settings.compile_full_step:
        return
    compilation = vllm_config.compilation_config
    compile_sizes = getattr(compilation, "compile_sizes", None)
    tokens = full_step(vllm_config)
    if policy(context, vllm_config) != "captured":
        logger.warning("compile_full_step has no effect: the shape policy here is not `captured`.")
    elif vllm_config.model_config.enforce_eager or compile_sizes is None:
        logger.warning("compile_full_step has no effect: vLLM does not compile here (--enforce-eager or no compilation).")
    elif tokens not in compile_sizes:
        compilation.compile_sizes = sorted([*compile_sizes, tokens])
        logger.info(
            "The step of %d tokens is compiled as a static shape; compile_sizes is %s.", tokens, compilation.compile_sizes
        )


def full_step(vllm_config: Any) -> int:
    """Tokens of the largest step this deployment can schedule."""
    scheduler = vllm_config.scheduler_config
    limit = getattr(scheduler, "max_num_scheduled_tokens", None)
    return int(min(scheduler.max_num_batched_tokens, limit or scheduler.max_num_batched_tokens))


def _scheduler_init(context: Context, original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        follow_vllm()
        if policy(context, self.vllm_config) == "guarded":
            guard(self)

    return __init__


def guard(scheduler: Any) -> None:
    """Take one token off a scheduler's budget, unless a prompt may need all of it at once."""
    config = scheduler.scheduler_config
    full = config.max_num_batched_tokens
    if scheduler.max_num_scheduled_tokens < full:
        logger.info("No step has %d tokens: max_num_scheduled_tokens is already %d.", full, scheduler.max_num_scheduled_tokens)
        return
    chunked = getattr(config, "enable_chunked_prefill", None)
    if chunked is None:
        chunked = getattr(config, "chunked_prefill_enabled", True)
    longest = getattr(scheduler, "max_model_len", None) or scheduler.vllm_config.model_config.max_model_len
    if full <= 1 or (not chunked and longest >= full):
        logger.warning(
            "The step of %d tokens is not kept from being scheduled: chunked prefill is off and a prompt may need all of it "
            "(max_model_len %d). Set --max-num-batched-tokens to %d or turn chunked prefill on.",
            full, longest, longest + 1,
        )  # fmt: skip
        return
    scheduler.max_num_scheduled_tokens = full - 1
    logger.info("The scheduler emits at most %d tokens a step, never %d (shape policy `guarded`).", full - 1, full)


def _warm_up_after(context: Context, original: Any) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        follow_vllm()
        if policy(context, self.vllm_config) == "captured":
            warm_up(self)
        return result

    return compile_or_warm_up_model


def warm_up(worker: Any) -> None:
    """Run the full-budget step once, with tokens that are routed to all experts.

    A device that reports an error is lost to this process, so that ends the start. Whatever else goes wrong is told,
    and serving goes on: it says nothing against a step that traffic takes another way.

    Raises:
        FullStepFailed: the device reported an error; the text names the kernel where it is known.
    """
    import torch

    tokens = full_step(worker.vllm_config)
    run = getattr(worker.model_runner, "_dummy_run", None)
    if run is None:
        logger.warning("The step of %d tokens is not warmed up: this worker has no dummy run.", tokens)
        return
    options = {"skip_eplb": True} if "skip_eplb" in inspect.signature(run).parameters else {}
    started = time.perf_counter()
    try:
        with (
            torch.inference_mode(),  # the runner's own tensors may be of that kind, and then change only in it
            full_step_probe.watching() as probe,
            _varied_inputs(worker, probe),
            _no_garbage_from_attention(worker),
        ):
            run(tokens, **options)
            _wait_for(worker)
            spread = probe.spread()
    except Exception as error:
        if not _is_device_error(error):
            advice = " Lower --gpu-memory-utilization." if isinstance(error, torch.OutOfMemoryError) else ""
            told = f"{type(error).__name__}: {_first_line(error)}"
            logger.warning("The step of %d tokens could not be warmed up (%s); serving goes on.%s", tokens, told, advice)
            return
        raise FullStepFailed(
            f"The step of {tokens} tokens (max_num_batched_tokens) failed while it was warmed up, in "
            f"{_where(error)}. Set VLLM_GLM_PATCH_SHAPE_POLICY=guarded so that it is never scheduled, or =off to start "
            "without this warm-up; `vllm-glm-patch doctor` tells what is known of this vLLM."
        ) from error
    seconds = time.perf_counter() - started
    logger.info("Warmed up the step of %d tokens in %.2f s; %s.", tokens, seconds, spread or "its routing could not be seen")
    if spread is not None and spread.used * 2 < spread.experts:
        logger.warning(
            "The warm-up of %d tokens used only %d of %d experts; it proves little.", tokens, spread.used, spread.experts
        )


def _is_device_error(error: BaseException) -> bool:
    by_name = type(error).__name__ in ("KernelFailed", "AcceleratorError")
    return by_name or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _where(error: BaseException) -> str:
    if isinstance(error, full_step_probe.KernelFailed):
        return str(error)
    return f"a kernel that could not be pinned down ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no text"])[0]


def _wait_for(worker: Any) -> None:
    import torch

    if getattr(worker, "device", None) is not None and torch.device(worker.device).type == "cuda":
        torch.cuda.synchronize(worker.device)


@contextmanager
def _varied_inputs(worker: Any, probe: full_step_probe.Probe) -> Iterator[None]:
    """Let the model see random tokens in the place of the dummy run's equal ones, and the probe see the router."""
    import torch

    model = worker.model_runner.get_model()
    vocabulary = worker.vllm_config.model_config.get_vocab_size()
    touched: list[tuple[torch.Tensor, torch.Tensor]] = []

    def vary(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [*zip(("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), args), *kwargs.items()]
        for name, value in named:
            if name in ("input_ids", "inputs_embeds") and isinstance(value, torch.Tensor):
                _randomise(value, vocabulary, touched)
            elif name == "intermediate_tensors" and value is not None:
                for tensor in value.tensors.values():
                    _randomise(tensor, vocabulary, touched)

    def watch(module: Any, args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        probe.saw_logits(logits, _top_k(worker.vllm_config))

    hooks = [model.register_forward_pre_hook(vary, with_kwargs=True)]
    hooks += [gate.register_forward_hook(watch) for gate in _routers(model)]
    try:
        yield
        for tensor, before in touched:  # not after a fault: the device would only repeat it, in the place of its cause
            tensor.copy_(before)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _no_garbage_from_attention(worker: Any) -> Iterator[None]:
    """Let attention on a CPU put out zeros, as it does on a GPU where there is nothing to attend to.

    vLLM's CPU attention returns its output uninitialised in a dummy run (seen in 0.32.0). NaN in it would reach the
    router, and all tokens would take the same experts.
    """
    on_cpu = str(getattr(worker, "device", "")) == "cpu"
    modules = worker.model_runner.get_model().modules() if on_cpu else ()
    backends = [module.impl for module in modules if hasattr(getattr(module, "impl", None), "forward")]
    for backend in backends:
        backend.forward = functools.partial(_zeros_from, backend.forward)  # this object's own, before its class's
    try:
        yield
    finally:
        for backend in backends:
            del backend.forward


def _zeros_from(forward: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    result = forward(*args, **kwargs)
    return result.zero_() if isinstance(result, torch.Tensor) else result


def _randomise(tensor: Any, vocabulary: int, touched: list[tuple[Any, Any]]) -> None:
    import torch

    touched.append((tensor, tensor.clone()))
    generator = torch.Generator(device=tensor.device).manual_seed(_SEED)
    if tensor.is_floating_point():
        tensor.normal_(generator=generator)
    else:
        tensor.random_(0, vocabulary, generator=generator)


def _routers(model: Any) -> list[Any]:
    """The modules whose output is router logits: `mlp.gate` of every MoE layer of the GLM and DeepSeek families."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def _top_k(vllm_config: Any) -> int:
    text = vllm_config.model_config.hf_text_config
    return int(getattr(text, "num_experts_per_tok", 1) or 1)
