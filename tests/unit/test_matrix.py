"""The replacements under the signatures and calls of real releases, from stored records; and that the checks can fail."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools import matrix_calls, matrix_entries, matrix_source
from tools.matrix_source import Call, Record, Value
from vllm_glm_patch import catalog
from vllm_glm_patch.adapters import conditions
from vllm_glm_patch.fixes import full_step, routing_ids, scale_slack
from vllm_glm_patch.tools import vllm_moe

KNOWN = vllm_moe._known
STORED = sorted((Path(__file__).parent / "data" / "calls").glob("*.json"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "versions.md"


def load(version: str) -> Record:
    """The stored record of one release."""
    (file,) = (file for file in STORED if file.stem == version)
    return Record.from_json(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("version", [file.stem for file in STORED])
def test_every_replacement_keeps_its_promise_as_this_release_calls_it(version: str) -> None:
    record = load(version)
    outcome = matrix_calls.check(record)
    assert not outcome.problems
    assert outcome.calls >= sum(len(function.calls) for function in record.functions) > 0


def test_releases_of_every_way_to_call_the_moe_layer_are_stored() -> None:
    assert {"0.10.1.1", "0.10.2", "0.17.1", "0.32.0"} <= {file.stem for file in STORED}
    assert {function.role for version in ("0.10.1.1", "0.17.1") for function in load(version).functions} == {
        "scheduler", "worker", "apply", "run", "grouped-gemm", "quantise", "modular-kernel", "profile",
    }  # fmt: skip


def test_a_stored_record_comes_back_as_it_was() -> None:
    record = load("0.17.1")
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_document_says_for_every_release_what_the_catalog_says() -> None:
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    ids = re.findall(r"\[([a-z-]+)\]", " ".join(lines[0]))
    rows = {line[0]: dict(zip(ids, line[1:])) for line in lines if re.fullmatch(r"[\d.]+", line[0])}
    assert list(rows) == list(catalog.releases()), "run `make matrix`"
    for patch in catalog.patches():
        for release in catalog.releases():
            has_it = patch.affects.contains(release)
            expected = catalog.NOT_NEEDED if not has_it else "applied" if patch.fix else catalog.NOT_MADE
            assert rows[release][patch.id] == expected, "run `make matrix`"


# The checks can fail.


@pytest.mark.parametrize(
    ("version", "module", "name", "broken", "complaint"),
    [
        ("0.17.1", scale_slack, "with_slack", lambda scales: scales, "only 0 bytes behind a_scales"),
        ("0.17.1", scale_slack, "SLACK", 7, "only 28 bytes behind"),
        ("0.10.1.1", full_step, "guard", lambda scheduler: None, "the budget under guarded"),
        ("0.10.2", full_step, "warm_up", lambda worker: None, "0 dummy runs"),
    ],
    ids=["slack of GEMM1", "28 bytes", "guard", "warm-up"],
)
def test_a_fix_that_does_nothing_or_too_little_is_found(
    monkeypatch: pytest.MonkeyPatch, version: str, module: Any, name: str, broken: Any, complaint: str
) -> None:
    monkeypatch.setattr(module, name, broken)
    assert any(complaint in problem for problem in matrix_calls.check(load(version)).problems)


@pytest.mark.parametrize("version", ["0.10.1.1", "0.10.2", "0.32.0"])
def test_ids_that_are_not_guarded_are_found(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def nothing(ids: torch.Tensor, weights: torch.Tensor, experts: int, scales: Any = None) -> routing_ids.Routing:
        return routing_ids.Routing(ids, weights, scales)

    monkeypatch.setattr(routing_ids, "sanitise", nothing)
    assert any("ids out of range arrive" in problem for problem in matrix_calls.check(load(version)).problems)


@pytest.mark.parametrize("version", ["0.10.1.1", "0.17.1", "0.32.0"])
def test_a_moe_layer_that_is_not_served_or_served_wrongly_is_found(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(conditions, "why_not", lambda call, option: "never")
    assert any("AttributeError" in p or "not served" in p or "served the layer" in p for p in problems_of(load(version)))
    monkeypatch.setattr(conditions, "why_not", lambda call, option: None)
    assert any("is not left to vLLM" in problem for problem in problems_of(load(version)))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("prepare", "every layer would be left to vLLM"),
        ("experts", "every layer would be left to vLLM"),
        ("description", "FusedMoEQuantConfig has only"),
        ("opaque", "not in an opaque operator"),
    ],
)
def test_a_release_without_what_the_adapters_go_by_is_found(what: str, complaint: str) -> None:
    record = load("0.17.1")
    without = replace(record, moe={**record.moe, what: ()})
    assert any(complaint in problem for problem in problems_of(without))


def problems_of(record: Record) -> tuple[str, ...]:
    return matrix_calls.check(record).problems


def changed(record: Record, which: str, **more: Any) -> Record:
    """The record with the functions of one role changed."""
    return replace(record, functions=tuple(replace(f, **more) if f.role == which else f for f in record.functions))


def test_a_call_that_the_signature_does_not_take_is_found() -> None:
    wrong = Call("vllm/some.py", (), {"no_such_argument": Value(False)})
    problems = matrix_calls.check(changed(load("0.17.1"), "run", calls=(wrong,))).problems
    assert len(problems) == 1
    assert "called in vllm/some.py" in problems[0]


def test_a_parameter_that_the_fix_reads_and_a_release_has_not_is_found() -> None:
    record = load("0.17.1")
    (function,) = (f for f in record.functions if f.role == "run")
    renamed = tuple(replace(p, name="ids") if p.name == "topk_ids" else p for p in function.parameters)
    problems = matrix_calls.check(changed(record, "run", parameters=renamed)).problems
    assert any("topk_ids" in problem for problem in problems)


def test_a_function_that_nothing_calls_and_a_role_without_a_check_are_found() -> None:
    record = load("0.17.1")
    assert "nothing in this release calls it" in matrix_calls.check(changed(record, "run", calls=())).problems[0]
    assert "has no check" in matrix_calls.check(changed(record, "run", role="new")).problems[0]


def test_a_scheduler_that_keeps_its_budget_elsewhere_is_found() -> None:
    problems = matrix_calls.check(changed(load("0.17.1"), "scheduler", sets=("vllm_config", "scheduler_config"))).problems
    assert any("max_num_scheduled_tokens" in problem for problem in problems)


# Calling a release from outside.


@pytest.fixture(scope="module")
def layer_script() -> Any:
    """tests/gpu/layer_with_patch.py, with small sizes and no card."""
    folder = Path(__file__).parents[1] / "gpu"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("layer_with_patch", folder / "layer_with_patch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    p = matrix_entries.PROBLEM
    module.EXPERTS, module.TOP_K, module.HIDDEN, module.INTERMEDIATE = p.experts, p.top_k, p.hidden_size, p.intermediate_size
    return module


@pytest.mark.parametrize("version", [file.stem for file in STORED])
def test_each_release_is_called_from_outside_as_it_declares_it(version: str) -> None:
    assert {"run_cutlass_moe_fp8", "fused_experts", "scaled_fp8_quant"} <= set(load(version).entries)
    assert matrix_entries.check(load(version)) == ()


@pytest.mark.parametrize("version", [file.stem for file in STORED])
def test_the_script_for_a_card_calls_the_layer_as_this_release_declares_it(version: str, layer_script: Any) -> None:
    record = load(version)
    entry = "cutlass_moe_fp8" if "cutlass_moe_fp8" in record.entries else "run_cutlass_moe_fp8"
    layer = layer_script.Layer(5, "cpu")
    hidden, weights, ids = layer.inputs(matrix_entries.PROBLEM.tokens)
    with matrix_entries.stand_in(record) as received:
        out = layer(hidden, weights, ids)
    given = vllm_moe.Layer(
        matrix_entries.PROBLEM, hidden, layer.w1, layer.w2, layer.w1_scale, layer.w2_scale, weights, ids
    )  # fmt: skip
    assert matrix_entries.wrong_in(given, entry, received) == ""
    assert out.shape == hidden.shape and bool((out == 1).all())


def test_releases_of_every_way_to_be_called_from_outside_are_stored() -> None:
    ways = {}
    for file in STORED:
        entries = load(file.stem).entries
        takes = {name: {parameter.name for parameter in entries.get(name, ())} for name in matrix_source.ENTRIES}
        whole = takes["cutlass_moe_fp8"]
        how = "none" if not whole else "config" if "quant_config" in whole else "strides" if "ab_strides1" in whole else "plain"
        ways[file.stem] = (how, "permute_scratch" in takes["run_cutlass_moe_fp8"])
    assert set(ways.values()) == {("plain", False), ("strides", False), ("config", False), ("none", False), ("none", True)}


@pytest.mark.parametrize(
    ("name", "broken", "complaint"),
    [
        ("_strides", lambda layer: {}, "asks for 'ab_strides1'"),
        ("_quant_config", lambda function, layer: {"quant_config": SimpleNamespace(w1_scale=layer.w1_scale)}, "the scheme"),
        ("_known", lambda layer: {**KNOWN(layer), "w2_scale": layer.w1_scale}, "w2_scale arrives as"),
    ],
    ids=["strides", "scheme", "scales"],
)
def test_a_call_from_outside_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, complaint: str
) -> None:
    monkeypatch.setattr(vllm_moe, name, broken)
    assert any(complaint in problem for problem in matrix_entries.check(load("0.13.0")))


# Reading a release.


def test_declarations_and_calls_are_read_from_source_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = (
        "@dataclass\nclass MoEPermuteScratch:\n    topk: int\n    size: int | None = None\n    ids: T = field(init=False)\n"
    )
    files = {
        "__init__.py": "raise RuntimeError\n",
        "model_executor/layers/fused_moe/moe_permute_unpermute.py": scratch,
        "_custom_ops.py": "def cutlass_moe_mm(a, /, b, c=3, *, d=None, e=make()):\n    raise RuntimeError\n",
        "engine/arg_utils.py": "class EngineArgs:\n    def create_engine_config(self): ...\n",
        "layer.py": "ops.cutlass_moe_mm(x, 2, d=True)\ncutlass_moe_mm(*many)\ntorch.ops._C.cutlass_moe_mm(x)\n",
    }
    for name, text in files.items():
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(text)
    (patch,) = (p for p in catalog.patches() if p.id == "scale-overread")
    only = replace(patch, sites=tuple(site for site in patch.sites if site.role == "grouped-gemm"))
    monkeypatch.setattr(catalog, "patches", lambda: [only])
    record = matrix_source.read(tmp_path, "0.17.1")
    assert record.missing == ()
    (function,) = record.functions
    assert str(function.signature()) == "(a, /, b, c=3, *, d=None, e='computed')"
    assert str(matrix_source.signature(record.entries["MoEPermuteScratch"])) == "(topk, size=None)"
    assert record.entry_modules["MoEPermuteScratch"] == "vllm.model_executor.layers.fused_moe.moe_permute_unpermute"
    assert function.calls == (Call("vllm/layer.py", (Value(False), Value(True, 2)), {"d": Value(True, True)}),)


def test_what_a_release_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    missing = matrix_source.read(tmp_path, "0.17.1").missing
    assert "vllm._custom_ops.cutlass_moe_mm" in missing
    assert "vllm.engine.arg_utils.EngineArgs.create_engine_config" in missing
