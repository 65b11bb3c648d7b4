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

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """A card that is not there, and a tuner that finds a configuration for each problem at once; returns what it was given."""
    given: list[Problem] = []

    def find(problems: Any, *, seconds: float, report: Any, seed: int, path: Path) -> Path:
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
