"""`vllm-glm-patch tune`: shapes, counts, where the table goes, and errors that say what to do. No card is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from vllm_glm_patch.moe import dispatch, tables, tune
from vllm_glm_patch.moe.dispatch import Card, Config
from vllm_glm_patch.moe.problem import GLM_SHAPES, Problem
from vllm_glm_patch.tools import tune as command
from vllm_glm_patch.tools import tune_from_bench
from vllm_glm_patch.tools.bench import schema

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """A card that is not there, and a tuner that finds a configuration for each problem at once; returns what it was given."""
    given: list[Problem] = []

    def find(problems: Any, *, seconds: float, report: Any, seed: int, path: Path, kinds: Any) -> Path:
        assert kinds == ["triton", "hopper"]
        report({"precompile": {}, "jobs": 1, "seconds": 0.1})
        for problem in problems:
            given.append(problem)
            report({"tokens": problem.tokens, "group": "gemm1", "us": 12.5})
            found = seconds >= 60
            if found:
                tune._extend(path, H100, problem, Config())
            report({"done": problem.tokens, "shape": problem.shape_key, "found": found})
        return path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "read_card", lambda index: H100)
    monkeypatch.setattr(tune, "tune", find)
    return given


def test_without_a_card_it_says_where_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("tune")
    assert result.code == 2
    assert "needs an NVIDIA Hopper card, and torch sees none here. Run it on the machine that serves." in result.err


def test_another_card_is_named(card: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "read_card", lambda index: Card("NVIDIA A100", 108, 166912, (8, 0)))
    result = run("tune")
    assert result.code == 2
    assert "NVIDIA A100 has 8.0" in result.err


@pytest.mark.parametrize("name", GLM_SHAPES)
def test_the_shapes_of_the_model_go_by_name(name: str) -> None:
    assert command.problem_of(name.lower()) == GLM_SHAPES[name]


def test_shapes_go_by_numbers() -> None:
    assert command.problem_of("E=128,N=96,K=4096,top_k=6") == Problem(1, 4096, 96, 128, 128, 6)
    assert command.problem_of("E=20, N=1536, G=160") == GLM_SHAPES["EP8"]


@pytest.mark.parametrize("shape", ["TP3", "E=160", "N=192,E=0", "E=1,E=2,N=3", "E=4,N=192", "E=20,N=1536,G=10", ""])
def test_a_shape_that_is_none_is_named(shape: str) -> None:
    result = run("tune", "--shape", shape)
    assert result.code == 2
    assert f"--shape is {shape!r}" in result.err


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-4", "131073", "1.5"])
def test_counts_that_are_none_are_named(tokens: str) -> None:
    result = run("tune", "--tokens", tokens)
    assert result.code == 2
    assert "--tokens has" in result.err


def test_no_time_is_an_error() -> None:
    assert "--minutes is 0" in run("tune", "--minutes", "0").err


def test_the_table_goes_into_the_users_folder_where_serving_finds_it(
    card: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GLM_PATCH_TUNED_DIR", str(tmp_path / "tuned"))
    result = run("tune", "--shape", "TP8", "--shape", "TP4", "--tokens", "64,8192")
    assert result.code == 0
    path = tmp_path / "tuned" / "NVIDIA_H100_80GB_HBM3.json"
    assert f"4 of 4 counts tuned for {H100.name}; the table is {path}" in result.out
    assert [p.tokens for p in card] == [8192, 64, 8192, 64]
    tables.check(json.loads(path.read_text()))
    try:
        tables.use_folder(tmp_path / "tuned")
        assert dispatch.choose(Problem(8192), H100) == Config()
    finally:
        tables.use_folder(None)


def test_another_file_is_extended_and_the_variable_to_serve_with_is_told(card: list[Problem], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    assert run("tune", "--tokens", "64", "--out", str(path)).code == 0
    result = run("tune", "--tokens", "8", "--out", str(path))
    assert list(json.loads(path.read_text())["shapes"][Problem(1).shape_key]) == ["8", "64"]
    assert f"VLLM_GLM_PATCH_TUNED_DIR={tmp_path}" in result.out


@pytest.mark.parametrize(("name", "why"), [("mine.txt", "ends in .json"), ("bad.json", "cannot be extended")])
def test_a_file_that_cannot_be_a_table_is_refused_before_any_work(
    card: list[Problem], tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "bad.json").write_text("[]")
    result = run("tune", "--out", str(tmp_path / name))
    assert result.code == 2
    assert why in result.err
    assert card == []


def test_nothing_tuned_in_the_time_leaves_with_1(card: list[Problem], tmp_path: Path) -> None:
    result = run("tune", "--minutes", "0.5", "--tokens", "64", "--out", str(tmp_path / "t.json"))
    assert result.code == 1
    assert "Nothing was tuned in 0.5 minutes" in result.err


# From a result of `bench kernel`.


def row(tokens: int, ours: float | None, cutlass: float | None, triton: float | None = None, **more: Any) -> dict[str, Any]:
    times = {"ours_us": ours, "cutlass_us": cutlass, "triton_us": triton, "triton_tuned_us": 0.1}
    return {"shape": "TP8", "tokens": tokens, "backend": "triton", "config": Config().to_dict(), **times, **more}


def bench_result(*rows: dict[str, Any], card: str = H100.name, kind: str = "bench kernel") -> dict[str, Any]:
    return {"kind": kind, "machine": {"card": card}, "rows": list(rows)}


@pytest.mark.parametrize(
    ("ours", "cutlass", "triton", "winner"),
    [
        (100.0, 200.0, 50.0, None),  # vLLM would run CUTLASS, however fast its Triton kernel is
        (100.0, 98.0, None, None),  # within what repeats differ by
        (100.0, 96.0, None, "upstream"),
        (100.0, None, 90.0, "upstream"),
    ],
)
def test_a_count_goes_to_the_kernel_that_was_faster(
    ours: float, cutlass: float | None, triton: float | None, winner: str | None
) -> None:
    (entry,) = tune_from_bench.entries(bench_result(row(64, ours, cutlass, triton)))["TP8"].values()
    assert entry.get("backend") == winner


def test_the_fastest_of_our_backends_is_entered_and_what_was_not_timed_is_not() -> None:
    rows = [row(8, 100.0, 200.0), row(8, 80.0, 200.0, backend="other", config={"tile": 3}), row(8, 90.0, 200.0)]
    found = tune_from_bench.entries(bench_result(*rows, row(16, None, 5.0), row(32, 5.0, None)))
    assert found == {"TP8": {"8": {"backend": "other", "tile": 3}}}


def test_the_native_kernels_run_what_was_measured_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from vllm_glm_patch.moe.hopper import backend as native

    measured = native.HopperConfig("glm_gemm1_row_c1", "glm_gemm2_sum_n128", 128, 4)
    assert measured != native.default_config(Problem(8192))
    made = bench_result(row(8192, 20.0, 30.0, backend="hopper", config=dataclasses.asdict(measured)))
    monkeypatch.setattr(schema, "read", lambda file: made)
    monkeypatch.setenv("VLLM_GLM_PATCH_TUNED_DIR", str(tmp_path))
    assert run("tune", "--from", "kernel.json").code == 0
    try:
        tables.use_folder(tmp_path)
        assert native.choose(Problem(8192), H100) == measured
    finally:
        tables.use_folder(None)


def test_a_result_becomes_a_table_that_decides_who_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_glm_patch.moe import backends

    made = bench_result(row(4, 20.0, 30.0), row(64, 100.0, 80.0), row(256, 200.0, 300.0))
    monkeypatch.setattr(schema, "read", lambda file: made)
    monkeypatch.setenv("VLLM_GLM_PATCH_TUNED_DIR", str(tmp_path))
    result = run("tune", "--from", "kernel.json")
    assert result.code == 0, result.err
    assert "3 counts entered, 1 of them left to vLLM's own kernel" in result.out
    try:
        tables.use_folder(tmp_path)
        assert backends.routes(Problem(1), H100, 1024) == [(1, 31, "triton"), (32, 128, "upstream"), (129, 1024, "triton")]
    finally:
        tables.use_folder(None)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (bench_result(row(64, 1.0, 2.0), kind="bench serve"), "--from takes one of `bench kernel`"),
        (bench_result(row(64, 1.0, None)), "no count at which both kernels were timed"),
        (bench_result(row(64, 1.0, 2.0), card="NVIDIA H9"), "neither a table nor a card here"),
        (bench_result(row(64, 1.0, 2.0, config={"path": "nonsense", "no": 1})), "does not fit this release"),
    ],
    ids=["kind", "not timed", "card", "config"],
)
def test_a_result_that_cannot_become_a_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(schema, "read", lambda file: made)
    result = run("tune", "--from", "kernel.json", "--out", str(tmp_path / "t.json"))
    assert result.code == 2
    assert why in result.err
    assert not (tmp_path / "t.json").exists()
