"""Calls each replacement as one release calls it, over a stand-in with that release's signature, on a CPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from packaging.version import Version

from tools.matrix_source import Call, Function, Parameter, Record, signature
from vllm_glm_patch import catalog
from vllm_glm_patch.adapters import conditions, serving
from vllm_glm_patch.adapters.modular_kernel import EXPERTS as KERNELS
from vllm_glm_patch.adapters.modular_kernel import NEEDED, PREPARE
from vllm_glm_patch.fixes import Context, Factory
from vllm_glm_patch.moe.dispatch import Card
from vllm_glm_patch.moe.generators import make_inputs
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe, relative_error
from vllm_glm_patch.settings import Settings

BUDGET, EXPERTS, TOKENS, TOP_K, WIDTH, VOCABULARY = 8192, 8, 4, 2, 16, 1000
SLACK_BYTES = 32


@dataclass(frozen=True)
class Outcome:
    """What became of one release."""

    calls: int
    """Calls of replacements that were made."""
    problems: tuple[str, ...]


class Wrong(Exception):
    """A replacement does not do what it promises; the text says what."""


@dataclass
class Case:
    """One replacement, one place that calls it, and what the stand-in was called with."""

    record: Record
    function: Function
    call: Call
    factory: Callable[[Settings, bool], Factory]
    made: int = 0
    received: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self, fakes: Mapping[str, Any], body: Callable[[dict[str, Any]], Any], settings: Settings | None = None,
        relied_on: bool = True, instance: Any = None,
    ) -> Any:  # fmt: skip
        """Call the replacement in this place's way; a constant that the place passes goes before our fake."""
        self.received.clear()
        args, kwargs = self._arguments(fakes, instance)
        wrapped = self.factory(settings or Settings(), relied_on)(self._stand_in(body))
        self.made += 1
        return wrapped(*args, **kwargs)

    def given(self, fakes: Mapping[str, Any], name: str) -> Any:
        """What the place passes as `name`, or the default."""
        bound = self._bound(None)
        value = bound.get(name)
        if value is None:
            return self.function.signature().parameters[name].default
        return value.constant if value.known else fakes.get(name, f"fake {name}")

    def _bound(self, instance: Any) -> dict[str, Any]:
        first = (instance,) if self.function.is_method else ()
        bound = self.function.signature().bind(*first, *self.call.positional, **self.call.keywords)
        return dict(bound.arguments)

    def _arguments(self, fakes: Mapping[str, Any], instance: Any) -> tuple[list[Any], dict[str, Any]]:
        first = [instance] if self.function.is_method else []
        names = list(self.function.signature().parameters)[len(first) :]
        self._bound(instance)
        args = [v.constant if v.known else fakes.get(n, f"fake {n}") for n, v in zip(names, self.call.positional)]
        kwargs = {n: v.constant if v.known else fakes.get(n, f"fake {n}") for n, v in self.call.keywords.items()}
        return first + args, kwargs

    def _stand_in(self, body: Callable[[dict[str, Any]], Any]) -> Any:
        declared = self.function.signature()

        def original(*args: Any, **kwargs: Any) -> Any:
            bound = declared.bind(*args, **kwargs)
            bound.apply_defaults()
            self.received.append(dict(bound.arguments))
            return body(dict(bound.arguments))

        original.__signature__ = declared  # type: ignore[attr-defined]
        return original


def check(record: Record) -> Outcome:
    """Call every replacement in every way this release calls it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of operations on a few values: threads only wait for each other
    try:
        return _check(record)
    finally:
        torch.set_num_threads(threads)


def _check(record: Record) -> Outcome:
    problems = [f"{name} is not defined in this release" for name in record.missing]
    made = 0
    for function in record.functions:
        where = f"{function.patch}, {function.site}"
        checker = CHECKS.get(function.role)
        if checker is None:
            problems.append(f"{where}: the role {function.role!r} has no check; add one to tools/matrix_calls.py")
            continue
        if not function.calls:
            problems.append(f"{where}: nothing in this release calls it in a way that its source spells out")
        for call in function.calls:
            case = Case(record, function, call, _factory(record, function))
            try:
                checker(case)
            except Wrong as wrong:
                problems.append(f"{where}, called in {call.file}: {wrong}")
            except Exception as error:  # whatever a replacement raises is a finding, not our end
                problems.append(f"{where}, called in {call.file}: {type(error).__name__}: {error}")
            made += case.made
    return Outcome(made, tuple(problems))


def _factory(record: Record, function: Function) -> Callable[[Settings, bool], Factory]:
    patch = next(p for p in catalog.patches() if p.id == function.patch)

    def make(settings: Settings, relied_on: bool) -> Factory:
        context = Context(Version(record.version), lambda: settings, lambda: relied_on)
        factory: Factory = importlib.import_module(patch.fix).replacements(context)[function.role]
        return factory

    return make


def _need(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def _slack(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's own storage behind its last value."""
    used = int(tensor.storage_offset()) + tensor.numel()
    return tensor.untyped_storage().nbytes() - used * tensor.element_size()


def _same(received: Mapping[str, Any], sent: Callable[[str], Any], but: tuple[str, ...] = ()) -> None:
    for name, value in received.items():
        if name not in but and name != "self":
            _need(value is sent(name) or value == sent(name), f"{name} does not arrive as it was passed")


def _grouped_gemm(case: Case) -> None:
    for per_token in (True, False):
        fakes = {"a_scales": torch.rand(64, 1), "per_act_token": per_token}
        _need(_slack(fakes["a_scales"]) == 0, "the fake scales have slack of their own")  # type: ignore[arg-type]
        _need(case.run(fakes, lambda given: "result") == "result", "the result does not come back")
        (received,) = case.received
        _same(received, lambda name, fakes=fakes: case.given(fakes, name), but=("a_scales",))  # type: ignore[misc]
        scales = received["a_scales"]
        if per_token:
            _need(_slack(scales) >= SLACK_BYTES, f"only {_slack(scales)} bytes behind a_scales")
            _need(torch.equal(scales, fakes["a_scales"]), "the values of a_scales changed")  # type: ignore[arg-type]
        else:
            _need(scales is fakes["a_scales"], "per-tensor scales were touched")


def _quantise(case: Case) -> None:
    for per_token, static in itertools.product((True, False), repeat=2):
        fakes = {
            "input": torch.zeros(TOKENS, WIDTH), "scale": torch.ones(1) if static else None, "num_token_padding": None,
            "use_per_token_if_dynamic": per_token, "output": torch.zeros(TOKENS, WIDTH),
        }  # fmt: skip
        _quantise_with(case, fakes)


def _quantise_with(case: Case, fakes: Mapping[str, Any]) -> None:
    operator_calls: list[tuple[Any, ...]] = []

    def body(given: dict[str, Any]) -> Any:
        rows = max(given["num_token_padding"] or 0, given["input"].shape[0])
        dynamic = given["scale"] is None and given["use_per_token_if_dynamic"]
        output = torch.zeros(rows, WIDTH) if given["output"] is None else given["output"]
        return output, torch.ones(rows, 1) if dynamic else torch.ones(1)

    operators = SimpleNamespace(dynamic_per_token_scaled_fp8_quant=lambda *given: operator_calls.append(given))
    with mock.patch.object(torch.ops, "_C", operators, create=True):
        output, scales = case.run(fakes, body)

    def sent(name: str) -> Any:
        return case.given(fakes, name)

    if not sent("use_per_token_if_dynamic") or sent("scale") is not None or sent("num_token_padding"):
        _same(case.received[0], sent)
        return
    _need(scales.shape == (TOKENS, 1), f"the scales have the shape {tuple(scales.shape)}")
    _need(_slack(scales) >= SLACK_BYTES, f"only {_slack(scales)} bytes behind the scales")
    _need(output.shape == (TOKENS, WIDTH), f"the output has the shape {tuple(output.shape)}")
    if sent("output") is not None:
        _need(output is sent("output"), "the caller's output is not the one that is filled")
        (given,) = operator_calls
        _need(
            len(given) == case.record.operator_arguments,
            f"the operator takes {case.record.operator_arguments} arguments and gets {len(given)}",
        )
        _need(given[0] is output and given[1] is sent("input") and given[2] is scales, "the operator's arguments are mixed up")


def _routing_fakes(**more: Any) -> dict[str, Any]:
    ids = torch.tensor([[0, 1], [-1, 2], [EXPERTS, 100_000], [3, 7]], dtype=torch.int32)
    return {
        "topk_ids": ids, "topk_weights": torch.rand(TOKENS, TOP_K) + 1, "hidden_states": torch.zeros(TOKENS, WIDTH),
        "output": torch.zeros(TOKENS, TOP_K, WIDTH), "global_num_experts": EXPERTS, "expert_map": None,
        "a1q_scale": torch.rand(TOKENS, 1) + 1, "use_batched_format": False, "apply_router_weight_on_input": False, **more,
    }  # fmt: skip


def _check_routing(fakes: Mapping[str, Any], received: Mapping[str, Any], weights: torch.Tensor, before: torch.Tensor) -> None:
    given, ids = fakes["topk_ids"], received["topk_ids"]
    valid = (given >= 0) & (given < EXPERTS)
    _need(((ids >= 0) & (ids < EXPERTS)).all(), f"ids out of range arrive: {ids.tolist()}")
    _need(torch.equal(ids[valid], given[valid]), "valid ids changed")
    _need(ids.dtype == given.dtype, "the ids changed their dtype")
    _need(not weights[~valid].any(), "an id out of range keeps its weight")
    _need(torch.equal(weights[valid], before[valid]), "the weights of valid ids changed")
    scales, used = received["a1q_scale"], valid.any(dim=1)
    _need(torch.equal(scales[used], fakes["a1q_scale"][used]), "the scales of tokens with valid ids changed")
    _need(not scales[~used].any(), "a token without a valid id keeps its scale")


def _run(case: Case) -> None:
    for expert_map in (None, torch.arange(EXPERTS, dtype=torch.int32)):
        fakes = _routing_fakes(expert_map=expert_map)
        before = fakes["topk_weights"].clone()
        case.run(fakes, lambda given: None)
        (received,) = case.received
        _same(received, lambda name, f=fakes: case.given(f, name), but=("topk_ids", "topk_weights", "a1q_scale"))  # type: ignore[misc]
        _check_routing(fakes, received, received["topk_weights"], before)
    fakes = _routing_fakes(use_batched_format=True)
    case.run(fakes, lambda given: None)
    _same(case.received[0], lambda name: case.given(fakes, name))


def _apply(case: Case) -> None:
    for on_input in (False, True):
        fakes = _routing_fakes(apply_router_weight_on_input=on_input)
        before = fakes["topk_weights"].clone()
        case.run(fakes, lambda given: given["output"].fill_(1), instance="the experts")
        (received,) = case.received
        _same(received, lambda name, f=fakes: case.given(f, name), but=("topk_ids", "a1q_scale"))  # type: ignore[misc]
        valid = (fakes["topk_ids"] >= 0) & (fakes["topk_ids"] < EXPERTS)
        weights = fakes["topk_weights"].where(valid, 0) if on_input else fakes["topk_weights"]
        _check_routing(fakes, received, weights, before)
        if on_input:
            _need(torch.equal(fakes["output"].amax(2).bool(), valid), "rows of ids out of range are not cleared, or others are")


def _config(record: Record, chunked: bool = True) -> Any:
    values = {
        "max_num_batched_tokens": BUDGET, "max_num_scheduled_tokens": None, "enable_chunked_prefill": chunked,
        "chunked_prefill_enabled": chunked,
    }  # fmt: skip
    model = SimpleNamespace(
        max_model_len=BUDGET, get_vocab_size=lambda: VOCABULARY, enforce_eager=False,
        hf_text_config=SimpleNamespace(num_experts_per_tok=TOP_K),
    )  # fmt: skip
    fields = {name: values[name] for name in record.config_fields}
    return SimpleNamespace(scheduler_config=SimpleNamespace(**fields), model_config=model, additional_config={})


def _scheduler(case: Case) -> None:
    expected = {"captured": BUDGET, "guarded": BUDGET - 1, "off": BUDGET}
    for policy, relied_on, chunked in itertools.product((*expected, "auto"), (True, False), (True, False)):
        config, scheduler = _config(case.record, chunked), SimpleNamespace()

        def body(given: dict[str, Any], config: Any = config) -> None:
            values = {
                "vllm_config": given["vllm_config"], "scheduler_config": config.scheduler_config,
                "max_model_len": config.model_config.max_model_len, "max_num_scheduled_tokens": BUDGET,
            }  # fmt: skip
            for name in case.function.sets:
                setattr(given["self"], name, values[name])

        case.run({"vllm_config": config}, body, Settings(shape_policy=policy), relied_on, scheduler)
        (received,) = case.received
        _need(received["vllm_config"] is config, "vllm_config does not arrive")
        chosen = ("captured" if relied_on else "guarded") if policy == "auto" else policy
        want = expected[chosen] if chunked else BUDGET
        found = scheduler.max_num_scheduled_tokens
        _need(found == want, f"the budget under {policy}, chunked prefill {chunked}, is {found} and should be {want}")


class _Model(torch.nn.Module):
    """A router, where those of the GLM family stand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mlp = torch.nn.ModuleDict({"gate": torch.nn.Linear(WIDTH, EXPERTS)})

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> Any:
        return self.mlp["gate"](self.embedding(input_ids))


@dataclass
class _Runner:
    """A model runner whose dummy run has a release's signature and runs the model on equal tokens."""

    parameters: tuple[Parameter, ...]
    model: _Model = field(default_factory=_Model)
    runs: list[tuple[dict[str, Any], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        declared = signature(self.parameters[1:])

        def dummy_run(*args: Any, **kwargs: Any) -> None:
            given = declared.bind(*args, **kwargs).arguments
            ids = torch.zeros(given["num_tokens"], dtype=torch.int64)
            with torch.no_grad():
                self.model(input_ids=ids, positions=None)
            distinct = self.seen
            self.runs.append((dict(given), distinct))

        dummy_run.__signature__ = declared  # type: ignore[attr-defined]
        self._dummy_run = dummy_run
        self.seen = 0
        self.model.embedding.register_forward_pre_hook(self._see)

    def _see(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.seen = len(args[0].unique())

    def get_model(self) -> _Model:
        return self.model


def _worker(case: Case) -> None:
    _need(case.record.dummy_runs, "no model runner of this release has a dummy run")
    for file, parameters in case.record.dummy_runs.items():
        for policy in ("captured", "guarded", "off"):
            runner = _Runner(parameters)
            worker = SimpleNamespace(vllm_config=_config(case.record), model_runner=runner, device="cpu")
            result = case.run({}, lambda given: "times", Settings(shape_policy=policy), instance=worker)
            _need(result == "times", "the result does not come back")
            _need(len(case.received) == 1, "vLLM's own warm-up is not called once")
            wanted = 1 if policy == "captured" else 0
            _need(len(runner.runs) == wanted, f"{len(runner.runs)} dummy runs of {file} under {policy} instead of {wanted}")
            for given, distinct in runner.runs:
                _need(given["num_tokens"] == BUDGET, f"the dummy run of {file} has {given['num_tokens']} tokens")
                knows = any(parameter.name == "skip_eplb" for parameter in parameters)
                _need(given.get("skip_eplb", False) is knows, f"the dummy run of {file} is seen by the load balancer")
                _need(distinct > VOCABULARY // 2, f"the dummy run of {file} has only {distinct} different tokens")


GLM = Problem(TOKENS, WIDTH, WIDTH, EXPERTS, EXPERTS, TOP_K)


def _kernel(record: Record, tensors: Mapping[str, Any], prepare: str, experts: str, **described: Any) -> Any:
    """A kernel object as the release has it: classes by its names, a description with its attributes."""
    values = {
        "w1_scale": tensors["w1_scale"], "w2_scale": tensors["w2_scale"], "quant_dtype": torch.float8_e4m3fn,
        "per_act_token_quant": True, **described,
    }  # fmt: skip
    known = {name: values.get(name) for name in record.moe["description"]}
    kernel = SimpleNamespace(prepare_finalize=type(prepare, (), {})(), fused_experts=type(experts, (), {})())
    kernel.fused_experts.quant_config = SimpleNamespace(**known)
    kernel.impl = SimpleNamespace(shared_experts=None)
    return kernel


def _modular_kernel(case: Case) -> None:
    moe = case.record.moe
    _need(moe["prepare"], f"none of {', '.join(PREPARE)} is defined: every layer would be left to vLLM")
    _need(moe["experts"], f"none of {', '.join(KERNELS)} is defined: every layer would be left to vLLM")
    _need(set(NEEDED) <= set(moe["description"]), f"FusedMoEQuantConfig has only {', '.join(moe['description'])}")
    _need(moe["opaque"], "the MoE layers are not in an opaque operator: a compiled graph would trace the choice of a kernel")
    for prepare, experts, mapped in itertools.product(moe["prepare"], moe["experts"], (False, True)):
        fakes, tensors = _layer(case, mapped)
        if mapped and case.given(fakes, "expert_map") is None:
            continue  # this place has all experts on every rank
        kernel = _kernel(case.record, tensors, prepare, experts)
        out, given = _called(case, fakes, kernel, tensors)
        _need(isinstance(out, torch.Tensor), "a layer that can be served is not served: vLLM's kernel served the layer")
        want = _reference(fakes, tensors)
        _need(relative_error(out, want) < 0.02, "a layer that can be served has a wrong result")
        _need(all(id(one["hidden_states"]) != id(fakes["hidden_states"]) for one in given), "vLLM's kernel served the layer")
        _need(given, "the layer was not compared with vLLM's kernel")
    for name, change in _LEFT_ALONE.items():
        fakes, tensors = _layer(case, False)
        kernel = _kernel(case.record, tensors, moe["prepare"][-1], moe["experts"][-1])
        settings = change(kernel, fakes) or Settings()
        if case.given(fakes, "activation") != fakes["activation"]:
            continue  # this place has one activation
        out, given = _called(case, fakes, kernel, tensors, settings)
        _need(out == "vLLM's" and len(given) == 1, f"a layer with {name} is not left to vLLM")
        _same(given[0], lambda n, f=fakes: case.given(f, n))  # type: ignore[misc]


def _other(kernel: Any, fakes: dict[str, Any], **change: Any) -> None:
    fakes.update(change)


def _described(kernel: Any, fakes: dict[str, Any], **change: Any) -> None:
    vars(kernel.fused_experts.quant_config).update(change)


_LEFT_ALONE: Mapping[str, Callable[[Any, dict[str, Any]], Settings | None]] = {
    "an all-to-all": lambda kernel, fakes: setattr(kernel, "prepare_finalize", SimpleNamespace()),
    "experts of another kernel": lambda kernel, fakes: setattr(
        kernel.fused_experts, "__class__", type("FlashInferExperts", (), {})
    ),
    "LoRA": lambda kernel, fakes: setattr(kernel.fused_experts, "_lora_context", "context"),
    "another activation": lambda kernel, fakes: _other(kernel, fakes, activation="gelu"),
    "half tokens": lambda kernel, fakes: _other(kernel, fakes, hidden_states=fakes["hidden_states"].half()),
    "scales of blocks": lambda kernel, fakes: _described(kernel, fakes, block_shape=[128, 128]),
    "scales a tensor": lambda kernel, fakes: _described(kernel, fakes, per_act_token_quant=False),
    "moe_backend upstream": lambda kernel, fakes: Settings(moe_backend="upstream"),
}


def _layer(case: Case, mapped: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call, and the weights with their scales: half of the experts on this rank where `mapped`."""
    problem = replace(GLM, experts=EXPERTS // 2) if mapped else GLM
    made = make_inputs(problem, 7)
    tensors = {"w1": made.w13, "w2": made.w2, "w1_scale": made.w13_scale[..., None], "w2_scale": made.w2_scale[..., None]}
    fakes = {
        **tensors, "hidden_states": made.hidden_states, "topk_weights": made.topk_weights, "topk_ids": made.topk_ids,
        "expert_map": made.expert_map, "global_num_experts": EXPERTS, "activation": "silu", "inplace": False,
        "apply_router_weight_on_input": False, "a1_scale": None, "a2_scale": None, "w1_zp": None, "w2_zp": None,
        "shared_experts": None, "shared_experts_input": None,
    }  # fmt: skip
    return fakes, tensors


def _reference(passed: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
    """A layer in float64, of what was passed and these weights."""
    weights = [tensors[name] for name in ("w1", "w2", "w1_scale", "w2_scale")]
    x, *routing = (passed[name] for name in ("hidden_states", "topk_weights", "topk_ids"))
    return fused_moe(x, weights[0], weights[1], weights[2], weights[3], routing[0], routing[1], expert_map=passed["expert_map"])


def _called(
    case: Case, fakes: dict[str, Any], kernel: Any, tensors: Mapping[str, Any], settings: Settings | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """What a call gives, and what vLLM's kernel was called with. Ours is a float64 stand-in on the CPU."""

    def ours(call: Any) -> torch.Tensor:
        passed = {name: getattr(call, name) for name in ("hidden_states", "topk_weights", "topk_ids", "expert_map")}
        weights = {"w1": call.w13, "w2": call.w2, "w1_scale": call.w13_scale, "w2_scale": call.w2_scale}
        return _reference(passed, weights).to(torch.bfloat16)

    def theirs(given: dict[str, Any]) -> Any:
        if given["hidden_states"] is fakes["hidden_states"]:
            return "vLLM's"
        return _reference(given, tensors).to(torch.bfloat16)

    with (
        mock.patch.object(serving, "run", ours),
        mock.patch.object(conditions, "card_of", lambda device: Card("H100", 132, 232448, (9, 0))),
    ):
        out = case.run(fakes, theirs, settings, instance=kernel)
    return out, list(case.received)


def _profile(case: Case) -> None:
    worker = SimpleNamespace(vllm_config=_config(case.record))
    result = case.run({}, lambda given: "bytes", instance=worker)
    _need(result == "bytes", "the result does not come back")
    _need(len(case.received) == 1, "vLLM's own profiling run is not called once")


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "grouped-gemm": _grouped_gemm,
    "quantise": _quantise,
    "run": _run,
    "apply": _apply,
    "scheduler": _scheduler,
    "worker": _worker,
    "modular-kernel": _modular_kernel,
    "profile": _profile,
}
