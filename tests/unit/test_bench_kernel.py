"""`bench kernel` without a card: what is timed against what, what is kept, and how upstream's functions are called."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import run

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.moe import backends, generators, tables
from vllm_glm_patch.moe.hopper.errors import HopperError
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe
from vllm_glm_patch.tools.bench import kernel, kernel_card, kernel_failure, kernel_run, kernel_upstream, schema
from vllm_glm_patch.tools.bench.kernel import Case, Died, Lab, Ours, Work
from vllm_glm_patch.tools.bench.kernel_card import Roofline
from vllm_glm_patch.tools.processes import Interrupted
from vllm_glm_patch.tools.vllm_moe import NotInThisVllm, call_by_name

CPU = torch.device("cpu")
ROOFLINE = Roofline(copy_tb_s=2.0, read_tb_s=3.0, fp8_tf_s=1000.0)
FAULT = "CUDA error: an illegal memory access was encountered"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def small(shape: str, tokens: int = 1) -> Problem:
    experts = {"TP8": 8, "EP8": 4}[shape]
    return Problem(tokens, hidden_size=64, intermediate_size=32, experts=experts, global_experts=8, top_k=2)


class Timer:
    """Each call says in `us` how long it takes. `turns` are the repetitions, in their order."""

    def __init__(self) -> None:
        self.turns: list[float] = []

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Any:
        return sum(call.us for call in calls)  # type: ignore[attr-defined]

    def repeat(self, prepared: Any, times: int) -> list[float]:
        self.turns.append(prepared)
        return [prepared] * times


def takes(us: float, call: Callable[[], object]) -> Callable[[], Any]:
    call.us = us  # type: ignore[attr-defined]
    return call


def layer(inputs: generators.Inputs) -> torch.Tensor:
    return fused_moe(*inputs.positional(), expert_map=inputs.expert_map, quantised=True).bfloat16()


def ours(problem: Problem) -> Ours:
    def make(inputs: generators.Inputs, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], torch.Tensor]:
        return takes(10.0, lambda: out.copy_(layer(inputs)))

    return Ours("triton", {"path": "grouped"}, 64, make)


def upstream(us: float) -> Any:
    return lambda inputs, space: takes(us, lambda: layer(inputs))


def not_here(inputs: Any, space: Any) -> Any:
    raise NotInThisVllm("no such function")


def broken(inputs: Any, space: Any) -> Any:
    raise RuntimeError("needs a larger tile\nand more")


def dying(inputs: Any, space: Any) -> Any:
    def die() -> None:
        raise RuntimeError(FAULT)

    return takes(1.0, die)


def make_lab(**upstreams: Any) -> Lab:
    return Lab(CPU, 0, Timer(), {"auto": ours}, upstreams, ROOFLINE, rounds=2, replays=3)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernel, "problem_of", small)
    monkeypatch.setattr(kernel, "CHECKED", (16, 17))
    return tmp_path / "kernel.json"


def facts(**changes: str) -> dict[str, str]:
    known = {"cpu": "a CPU", "python": "3.11.2", "vllm": "0.26.0", "vllm_glm_patch": "0.1.0", "card": "NVIDIA H100"}
    return {**known, "torch": "2.11.0", **changes}


def begin(file: Path, tokens: Sequence[int] = (1, 64), seed: int = 0, **changes: str) -> dict[str, Any]:
    result = kernel_run.begin(file, facts(**changes), ["TP8"], tokens, seed)
    result["roofline"] = result["roofline"] or ROOFLINE.as_dict()
    return result


def do(file: Path, lab: Lab, tokens: Sequence[int] = (1, 64), **options: Any) -> dict[str, Any]:
    result = begin(file, tokens)
    shapes, checked = options.pop("shapes", ["TP8"]), options.pop("checked", False)
    Work(lab, result, lambda: schema.write(result, file), **options).do(shapes, checked, tokens, seed=0)
    return schema.read(file)


def test_a_row_has_all_times_the_ratio_to_the_best_and_the_floor(file: Path) -> None:
    result = do(file, make_lab(cutlass=upstream(30.0), triton=upstream(20.0), triton_tuned=not_here))
    assert result["complete"]
    row = result["rows"][1]
    assert (row["vllm"], row["shape"], row["tokens"], row["backend"]) == ("0.26.0", "TP8", 64, "triton")
    assert (row["ours_us"], row["cutlass_us"], row["triton_us"], row["triton_tuned_us"]) == (10.0, 30.0, 20.0, None)
    assert (row["best_upstream"], row["ratio"], row["ratio_low"], row["ratio_high"]) == ("triton", 2.0, 2.0, 2.0)
    assert 0 < row["error"] < 0.06
    assert row["upstream_error"] == pytest.approx(row["error"])
    assert row["failed"] == {"triton_tuned": "not in this vLLM: no such function"}
    assert (row["experts_used"], row["floor_by"]) == (8, "memory")


def test_a_backend_that_fails_is_told_and_the_others_are_timed(file: Path) -> None:
    row = do(file, make_lab(cutlass=broken, triton=upstream(20.0)))["rows"][0]
    assert row["failed"] == {"cutlass": "RuntimeError: needs a larger tile\nand more"}
    assert (row["ours_us"], row["ratio"]) == (10.0, 2.0)
    assert kernel.line_of(row).endswith("cutlass: RuntimeError: needs a larger tile | and more")


def test_without_upstream_there_are_times_and_no_ratio(file: Path) -> None:
    row = do(file, make_lab())["rows"][0]
    assert (row["ours_us"], row["best_upstream"], row["ratio"]) == (10.0, None, None)


def test_implementations_take_turns_and_the_order_is_turned_round(file: Path) -> None:
    lab = make_lab(cutlass=upstream(30.0), triton=upstream(20.0))
    do(file, lab, tokens=[64])
    assert lab.timer.turns == [10.0, 30.0, 20.0, 20.0, 30.0, 10.0]  # type: ignore[attr-defined]


def test_the_spread_is_of_the_rounds_and_a_call_is_one_of_several_inputs() -> None:
    class Warming(Timer):
        def repeat(self, prepared: Any, times: int) -> list[float]:
            self.turns.append(prepared)
            return [prepared * (1 + len(self.turns) / 100)] * times

    calls = {"ours": [takes(10.0, lambda: None)] * 4, "triton": [takes(20.0, lambda: None)] * 4}
    times, failed = kernel.take_turns(calls, Warming(), rounds=2, replays=3)
    assert failed == {}
    assert times["ours"] == pytest.approx([10.1, 10.4])  # its turns are the first and the fourth
    row = kernel.row_of(Case("TP8", 1, "auto"), times, {}, (5.0, "memory"))
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"]


def test_few_tokens_get_several_inputs_so_that_no_weights_stay_in_the_cache() -> None:
    l2_bytes = 50 * 2**20
    assert kernel.inputs_for(kernel.problem_of("TP8", 1), l2_bytes) == 9  # 24 MB each, four times 52 MB
    assert kernel.inputs_for(kernel.problem_of("TP8", 8192), l2_bytes) == 1
    assert kernel.inputs_for(small("TP8"), l2_bytes) == kernel.MOST_INPUTS


def test_inputs_of_a_graph_differ(file: Path) -> None:
    seen = []

    def watch(inputs: Any, space: Any) -> Any:
        seen.append(inputs.topk_ids)
        return takes(20.0, lambda: layer(inputs))

    row = do(file, replace(make_lab(triton=watch), l2_bytes=2**30), tokens=[64])["rows"][0]
    assert row["inputs"] == len(seen) == 16
    assert row["ours_us"] == 10.0
    assert not torch.equal(seen[0], seen[1])


def test_inputs_that_are_not_spread_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = generators.make_routing
    monkeypatch.setattr(generators, "make_routing", lambda problem, generator, _: make(problem, generator, "collapsed"))
    with pytest.raises(AssertionError, match="an expert got 1024 tokens"):
        do(file, make_lab(), tokens=[1024])


def test_what_is_measured_survives_an_interruption_and_is_not_measured_again(file: Path) -> None:
    class Interrupting(Timer):
        def repeat(self, prepared: Any, times: int) -> list[float]:
            if len(self.turns) == 2:
                raise Interrupted(2)
            return super().repeat(prepared, times)

    with pytest.raises(Interrupted):
        do(file, replace(make_lab(), timer=Interrupting()))
    kept = schema.read(file)
    assert ([row["tokens"] for row in kept["rows"]], kept["complete"]) == ([1], False)
    lab = make_lab()
    result = do(file, lab, tokens=[1, 64, 128])
    assert [row["tokens"] for row in result["rows"]] == [1, 64, 128]
    assert len(lab.timer.turns) == 4  # type: ignore[attr-defined]  # two rounds of two counts
    assert result["complete"]


def test_nothing_is_begun_when_the_time_is_up(file: Path) -> None:
    said: list[str] = []
    result = do(file, make_lab(), stop_at=time.monotonic() - 1, say=said.append)
    assert (result["rows"], result["complete"]) == ([], False)
    assert "the same command goes on from here" in said[0]


@pytest.mark.parametrize("name", ["cutlass", "ours"])
def test_after_the_device_has_failed_a_new_process_leaves_out_what_it_failed_under(file: Path, name: str) -> None:
    lab = make_lab(cutlass=dying, triton=upstream(20.0))
    if name == "ours":
        lab = replace(lab, ours={"auto": lambda problem: replace(ours(problem), make=lambda *_: dying(None, None))})
        lab = replace(lab, upstream={"triton": upstream(20.0)})
    deaths = 0
    while True:
        try:
            result = do(file, lab)
            break
        except Died as death:
            deaths += 1
            assert death.name == name
    assert deaths == 2  # once for each count
    for row in result["rows"]:
        assert FAULT in row["failed"][name]
        assert row["ours_us"] == (10.0 if name == "cutlass" else None)
        assert name == "ours" or row["triton_us"] == 20.0
    assert result["findings"][0] == f"{name} died at 1 tokens of TP8: RuntimeError: {FAULT}"


def test_checks_are_kept_and_a_wrong_layer_is_found(file: Path) -> None:
    result = do(file, make_lab(), checked=True, tokens=[])
    assert len(result["checks"]) == 2 + 12
    assert all(found["good"] for found in result["checks"])
    assert {found["routing"] for found in result["checks"]} == set(generators.ROUTINGS)

    def wrong(problem: Problem) -> Ours:
        def make(inputs: generators.Inputs, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], torch.Tensor]:
            return lambda: out.copy_(layer(inputs) * 1.2)

        return replace(ours(problem), make=make)

    other = file.with_name("wrong.json")
    result = do(other, replace(make_lab(), ours={"auto": wrong}), checked=True, tokens=[])
    bad = [found for found in result["checks"] if not found["good"]]
    assert len(bad) == 2 + 9  # an empty routing gives zeros either way
    assert result["findings"][0].startswith("wrong: TP8, 16 tokens, spread routing: error 0.")


def test_a_check_that_the_device_failed_in_is_kept_as_bad_and_not_made_again(file: Path) -> None:
    lab = replace(make_lab(), ours={"auto": lambda problem: replace(ours(problem), make=lambda *_: dying(None, None))})
    deaths = 0
    while True:
        try:
            result = do(file, lab, checked=True, tokens=[])
            break
        except Died:
            deaths += 1
            assert deaths < 20
    assert deaths == len(result["checks"]) == 2 + 12
    assert not any(found["good"] for found in result["checks"])
    assert result["findings"][0] == f"ours died in a check, TP8, 16 tokens, spread routing: RuntimeError: {FAULT}"
    assert schema.read(file)["complete"]


def failing(error: Exception) -> Lab:
    """Ours raises, but for 17 tokens."""

    def make(inputs: generators.Inputs, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], torch.Tensor]:
        if len(inputs.hidden_states) == 17:
            return ours(small("TP8", 17)).make(inputs, out, workspace)

        def fail() -> torch.Tensor:
            raise error

        return takes(1.0, fail)

    return replace(make_lab(triton=upstream(20.0)), ours={"auto": lambda problem: replace(ours(problem), make=make)})


class OutOfResources(Exception):
    """As Triton's: no error of the device."""


LONG = "out of resource: shared memory, Required: 245760, Hardware limit: 232448.\n\nReducing block sizes\nthird\nfourth"


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(LONG),
        ValueError(f"a compiler's words\n{FAULT}"),
        RuntimeError("CUDA error: invalid configuration argument"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        HopperError("glm_gemm1: the driver refuses it: invalid value", code=1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_that_leaves_the_device_well_is_that_cases_failure_and_the_run_goes_on(
    file: Path, error: Exception
) -> None:
    result = do(file, failing(error), checked=True, tokens=[1, 17])
    assert result["complete"]
    bad = [found for found in result["checks"] if not found["good"]]
    assert len(result["checks"]) == 2 + 12 and len(bad) == 1 + 12
    assert all(found["failure"] == {"type": type(error).__name__, "message": str(error)} for found in bad)
    assert [found["tokens"] for found in result["checks"] if "failure" not in found] == [17]
    first, second = result["rows"]
    assert (first["ours_us"], first["triton_us"], second["ours_us"]) == (None, 20.0, 10.0)
    assert first["failed"]["ours"] == f"{type(error).__name__}: {error}"
    told = [found for found in result["findings"] if found.startswith("ours failed")]
    assert len(told) == 1 + 12 + 1
    assert told[0].startswith(f"ours failed in a check, TP8, 16 tokens, spread routing: {type(error).__name__}: ")
    assert told[-1].startswith("ours failed at 1 tokens of TP8: ")
    assert all("fourth" not in found and "\n" not in found for found in told)


def test_what_cannot_even_be_chosen_is_a_failure_of_its_case(file: Path) -> None:
    def nobody(problem: Problem) -> Ours:
        raise HopperError("There is no kernel glm_x")

    result = do(file, replace(make_lab(), ours={"hopper": nobody}), checked=True, tokens=[])
    assert result["complete"] and len(result["checks"]) == 2 + 12
    assert {found["backend"] for found in result["checks"]} == {"hopper"}
    assert result["checks"][0]["failure"] == {"type": "HopperError", "message": "There is no kernel glm_x"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(FAULT),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("anything"),
        HopperError("refused", code=719),
        RuntimeError("CUDA error: something new"),
    ],
)
def test_an_error_that_leaves_the_context_unusable_is_a_failed_device(file: Path, error: Exception) -> None:
    with pytest.raises(Died):
        do(file, failing(error), checked=True, tokens=[])
    (found,) = schema.read(file)["checks"]
    assert found["failure"]["message"] == str(error)
    assert schema.read(file)["findings"][0].startswith("ours died in a check, TP8, 16 tokens, spread routing: ")


def test_a_device_that_was_lost_meanwhile_is_asked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: Any) -> None:
        raise RuntimeError(FAULT)

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert kernel_failure.lost_since(CPU) is None
    assert str(kernel_failure.lost_since(torch.device("cuda"))) == FAULT
    monkeypatch.setattr(kernel, "lost_since", lambda device: RuntimeError(FAULT))
    with pytest.raises(Died, match="OutOfResources"):
        do(file, failing(OutOfResources(LONG)), checked=True, tokens=[])


def test_each_backend_that_is_asked_for_has_rows_of_its_own(file: Path) -> None:
    lab = replace(
        make_lab(triton=upstream(20.0)), ours={"triton": ours, "hopper": lambda p: replace(ours(p), backend="hopper")}
    )
    result = do(file, lab)
    assert [(row["tokens"], row["asked"], row["backend"]) for row in result["rows"]] == [
        *((1, "triton", "triton"), (1, "hopper", "hopper"), (64, "triton", "triton"), (64, "hopper", "hopper"))
    ]
    assert do(file, lab)["rows"] == result["rows"]


def test_backends_are_preferred_around_each_call_and_the_users_tables_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preferred: list[str] = []
    read: list[Path] = []
    monkeypatch.setenv("VLLM_GLM_PATCH_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "use_folder", read.append)
    monkeypatch.setattr(backends, "prefer", preferred.append)
    monkeypatch.setattr(
        backends, "route", lambda problem, card: preferred[-1] if preferred[-1] != "auto" else backends.UPSTREAM
    )
    monkeypatch.setattr("vllm_glm_patch.moe.op.fused_moe_fp8", lambda *_, **__: None)
    monkeypatch.setattr("vllm_glm_patch.moe.op.workspace_bytes", lambda *_: 16)
    made = {name: make(small("TP8")) for name, make in kernel.our_layers(CPU, ["hopper", "auto"]).items()}
    assert read == [tmp_path]
    assert {name: one.backend for name, one in made.items()} == {"hopper": "hopper", "auto": "triton"}
    assert made["hopper"].config["gemm1"].startswith("glm_gemm1_") and "path" in made["auto"].config
    preferred.clear()
    inputs = generators.make_inputs(small("TP8"), 0)
    for name in ("hopper", "auto", "hopper"):
        made[name].make(inputs, torch.empty(0), torch.empty(0))()
    assert preferred == ["hopper", "auto", "hopper"]
    with pytest.raises(UserError, match="--backends has 'cutlass'; give some of auto,triton,hopper"):
        kernel.our_layers(CPU, ["cutlass"])


def test_rows_of_shapes_with_an_expert_map_are_timed_too(file: Path) -> None:
    result = do(file, make_lab(triton=upstream(20.0)), shapes=["TP8", "EP8"])
    assert [(row["shape"], row["tokens"]) for row in result["rows"]] == [("TP8", 1), ("TP8", 64), ("EP8", 1), ("EP8", 64)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vllm": "0.10.1.1"}, "was measured with vllm 0.26.0, and this is 0.10.1.1"),
        ({"card": "NVIDIA H200"}, "was measured with card NVIDIA H100, and this is NVIDIA H200"),
        ({"seed": 3}, "was measured with --seed 0"),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_with(file: Path, changes: dict[str, Any], expected: str) -> None:
    do(file, make_lab())
    with pytest.raises(UserError, match=expected):
        begin(file, **changes)


def test_a_floor_is_set_by_memory_for_few_tokens_and_by_arithmetic_for_many() -> None:
    one, many = kernel.problem_of("TP8", 1), kernel.problem_of("TP1", 8192)
    assert ROOFLINE.floor(one) == (round(one.minimum_bytes() / 3e6, 2), "memory")
    assert ROOFLINE.floor(many) == (round(many.floating_point_operations() / 1e9, 2), "arithmetic")


def test_ceilings_are_bytes_and_operations_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_card, "_BYTES", 1 << 12)
    monkeypatch.setattr(kernel_card, "_SIDE", 32)
    made = []

    def us_of(call: Callable[[], object]) -> list[float]:
        if len(made) < 2:  # torch on a CPU has no FP8 product of this kind
            call()
        made.append(call)
        return [1.0, 2.0, 90.0]

    found = kernel_card.measure(CPU, us_of)
    assert found.copy_tb_s == round(2 * 4096 / 2.0 / 1e6, 3)
    assert (found.read_tb_s, found.fp8_tf_s) == (round(4096 / 2.0 / 1e6, 3), round(2 * 32**3 / 2.0 / 1e6, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    answer = run("bench", "kernel", "--out", tmp_path / "kernel.json")
    assert (answer.code, answer.out) == (2, "")
    assert "`bench kernel` needs a CUDA card" in answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shapes", "TP8,TP3"), "--shapes has 'TP3'; give some of TP8,TP4,TP2,TP1,EP8"),
        (("--tokens", "1,x"), "--tokens is 'x'"),
    ],
)
def test_a_wrong_option_of_the_kernel_is_told(arguments: tuple[str, ...], expected: str) -> None:
    answer = run("bench", "kernel", *arguments)
    assert answer.code == 2
    assert expected in answer.err


def test_a_new_process_gets_the_same_command_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *command: called.append(command))
    monkeypatch.setattr("sys.argv", ["vllm-glm-patch", "bench", "kernel", "--minutes", "3"])
    monkeypatch.setenv(kernel_run._UNTIL, "")
    kernel_run._go_on_in_a_new_process(Died("cutlass", FAULT), 123.0, lambda text: None)
    assert called == [(sys.executable, [sys.executable, "-m", "vllm_glm_patch", "bench", "kernel", "--minutes", "3"])]
    assert kernel_run.os.environ[kernel_run._UNTIL] == "123.0"


def test_the_command_measures_saves_and_goes_on_with_one_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the card."""
    monkeypatch.setattr(kernel, "problem_of", small)
    monkeypatch.setattr(kernel, "CHECKED", ())
    monkeypatch.setattr(kernel_run, "check_card", lambda: None)
    monkeypatch.setattr(kernel_run, "card_facts", lambda with_upstream: facts())
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    labs = [replace(make_lab(triton=upstream(20.0)), roofline=replace(ROOFLINE, read_tb_s=r)) for r in (3.0, 1.0, 1.0)]
    monkeypatch.setattr(kernel_run, "make_lab", lambda with_upstream, asked: labs.pop(0))
    arguments = ("bench", "kernel", "--out", tmp_path)
    first = run(*arguments, "--tokens", 1, "--no-check", "--json")
    assert first.code == 0
    assert first.json() == schema.read(tmp_path / "kernel.json")
    assert "TP8 1 tokens, triton, µs: ours 10.0, triton 20.0" in first.err
    assert run(*arguments, "--tokens", "1,64", "--no-check").code == 0
    result = schema.read(tmp_path / "kernel.json")
    assert [row["tokens"] for row in result["rows"]] == [1, 64]
    assert result["roofline"]["read_tb_s"] == 3.0
    assert result["rows"][1]["floor_us"] == ROOFLINE.floor(small("TP8", 64))[0]
    monkeypatch.setattr(kernel, "_ERROR", 0.0)
    wrong = run(*arguments, "--no-time")
    assert wrong.code == 1
    assert "of 12 checks are good" in wrong.out


# How upstream's functions are called: stand-ins with the signatures of releases.


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        if whole not in sys.modules or not hasattr(sys.modules[whole], "_fake"):
            made = ModuleType(whole)
            made.__path__ = []  # type: ignore[attr-defined]
            made._fake = True  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, whole, made)
            if count > 1:
                setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], made)
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


@pytest.fixture
def inputs() -> generators.Inputs:
    return generators.make_inputs(small("TP8", 16), 0)


SPACE = torch.empty(2 * 32 * 64, dtype=torch.bfloat16)


def test_arguments_are_given_by_name_and_unknown_ones_are_no_guess() -> None:
    assert call_by_name(lambda a, b=2: (a, b), {"a": 1, "c": 3}, "f") == (1, 2)
    with pytest.raises(NotInThisVllm, match="f of this vLLM asks for 'new'"):
        call_by_name(lambda a, new: a, {"a": 1}, "f")


def test_cutlass_of_0_10_1_1_takes_bf16_tokens(monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs) -> None:
    def cutlass_moe_fp8(
        a, w1_q, w2_q, topk_weights, topk_ids, w1_scale, w2_scale, per_act_token=None, activation="silu", a1_scale=None,
        a2_scale=None, expert_map=None, apply_router_weight_on_input=False, global_num_experts=-1,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        return locals()

    module(monkeypatch, f"{FUSED_MOE}.cutlass_moe", cutlass_moe_fp8=cutlass_moe_fp8)
    called = kernel_upstream.cutlass(inputs, SPACE)()
    assert called["a"] is inputs.hidden_states
    assert (called["per_act_token"], called["activation"], called["global_num_experts"]) == (True, "silu", 8)
    assert called["w1_scale"].shape == (8, 64, 1)
    assert (called["a1_scale"], called["expert_map"]) == (None, None)


def test_cutlass_of_0_26_takes_quantised_tokens_strides_and_scratch(
    monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs
) -> None:
    seen: dict[str, Any] = {}

    def run_cutlass_moe_fp8(
        output, hidden_states, w1, w2, topk_ids, activation, global_num_experts, expert_map, w1_scale, w2_scale, a1q_scale,
        a2_scale, ab_strides1, ab_strides2, c_strides1, c_strides2, workspace13, workspace2, expert_num_tokens, out_dtype,
        per_act_token, per_out_ch, use_batched_format, topk_weights, permute_scratch, *, activation_config=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        seen.update(locals())

    class MoEPermuteScratch:
        def __init__(self, num_experts, num_local_experts, device):  # type: ignore[no-untyped-def]
            self.sizes = (num_experts, num_local_experts)

    module(monkeypatch, f"{FUSED_MOE}.experts.cutlass_moe", run_cutlass_moe_fp8=run_cutlass_moe_fp8)
    module(monkeypatch, f"{FUSED_MOE}.activation", MoEActivation=SimpleNamespace(SILU="SILU"))
    module(monkeypatch, f"{FUSED_MOE}.moe_permute_unpermute", MoEPermuteScratch=MoEPermuteScratch)
    quantised = (torch.empty(0), torch.ones(16, 1))
    module(monkeypatch, "vllm._custom_ops", scaled_fp8_quant=lambda x, use_per_token_if_dynamic: quantised)
    out = kernel_upstream.cutlass(inputs, SPACE)()
    assert out is seen["output"]
    assert (seen["hidden_states"], seen["a1q_scale"]) == quantised
    strides = [set(seen[name].tolist()) for name in ("ab_strides1", "ab_strides2", "c_strides1", "c_strides2")]
    assert strides == [{64}, {32}, {64}, {64}]
    assert (seen["activation"], seen["per_out_ch"], seen["use_batched_format"]) == ("SILU", True, False)
    assert seen["permute_scratch"].sizes == (8, 8)
    assert seen["workspace13"].shape == (32, 64)


def test_triton_is_told_the_scheme_as_flags_or_as_one_argument(
    monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs
) -> None:
    def old(
        hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, use_fp8_w8a8=False, per_channel_quant=False,
        global_num_experts=-1, expert_map=None, w1_scale=None, w2_scale=None, a1_scale=None, a2_scale=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        return locals()

    module(monkeypatch, f"{FUSED_MOE}.fused_moe", fused_experts=old)
    called = kernel_upstream.triton(inputs, SPACE)()
    assert (called["use_fp8_w8a8"], called["per_channel_quant"], called["inplace"]) == (True, True, False)

    def new(hidden_states, w1, w2, topk_weights, topk_ids, global_num_experts=-1, expert_map=None, quant_config=None):  # type: ignore[no-untyped-def]
        return locals()

    def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, per_act_token_quant=False, per_out_ch_quant=False):  # type: ignore[no-untyped-def]
        return per_act_token_quant, per_out_ch_quant

    module(monkeypatch, f"{FUSED_MOE}.fused_moe", fused_experts=new)
    module(monkeypatch, f"{FUSED_MOE}.config", fp8_w8a8_moe_quant_config=fp8_w8a8_moe_quant_config)
    assert kernel_upstream.triton(inputs, SPACE)()["quant_config"] == (True, True)


def test_a_vllm_that_asks_for_a_description_it_has_no_maker_of_is_told(
    monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs
) -> None:
    module(monkeypatch, f"{FUSED_MOE}.fused_moe", fused_experts=lambda hidden_states, quant_config: None)
    module(monkeypatch, f"{FUSED_MOE}.config")
    with pytest.raises(NotInThisVllm, match="config has no fp8_w8a8_moe_quant_config"):
        kernel_upstream.triton(inputs, SPACE)


def test_the_tuned_table_is_that_of_the_h200_and_its_nearest_entry(
    monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs, tmp_path: Path
) -> None:
    overrides: list[Any] = []

    class Override:
        def __init__(self, config: Any) -> None:
            overrides.append(config)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            overrides.append(None)

    made = module(monkeypatch, FUSED_MOE, override_config=Override)
    made.__file__ = str(tmp_path / "__init__.py")
    module(monkeypatch, f"{FUSED_MOE}.fused_moe", fused_experts=lambda hidden_states: overrides[-1])
    with pytest.raises(NotInThisVllm, match="no table E=8,N=32,device_name=NVIDIA_H200"):
        kernel_upstream.triton_tuned(inputs, SPACE)
    (tmp_path / "configs").mkdir()
    table = tmp_path / "configs" / "E=8,N=32,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"
    table.write_text(json.dumps({"triton_version": "3", "1": {"a": 1}, "24": {"a": 24}, "64": {"a": 64}}))
    assert kernel_upstream.triton_tuned(inputs, SPACE)() == {"a": 24}
    assert overrides == [{"a": 24}, None]


def test_a_vllm_without_the_function_is_told(monkeypatch: pytest.MonkeyPatch, inputs: generators.Inputs) -> None:
    module(monkeypatch, f"{FUSED_MOE}.experts.cutlass_moe")
    with pytest.raises(NotInThisVllm, match="has no run_cutlass_moe_fp8"):
        kernel_upstream.cutlass(inputs, SPACE)
