"""What `verify` gives vLLM's kernels and expects of them, on stand-ins with the signatures of two generations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_glm_patch.tools.verify import cli
from vllm_glm_patch.tools.verify.cases import Grid, Shape
from vllm_glm_patch.tools.verify.journal import OK, WRONG
from vllm_glm_patch.tools.verify.report import Result

pytest.importorskip("torch")

from vllm_glm_patch.tools.verify import upstream as upstream_module

HERE = Path(__file__).parent
# Few values, so that FP8's rounding does not average out as in a real layer; still below the limits.
TP = Shape("TP", 64, 8, 8, hidden_size=128, top_k=4)
EP = Shape("EP", 64, 4, 8, hidden_size=128, top_k=4)
GRID = Grid(shapes=(TP, EP), tokens=(1, 7, 33), few=(9,), sides=("upstream",))
OLD, NEW = "0.10.1.1", "0.26.0"


def run(version: str, *defects: str, grid: Grid = GRID, **options: object) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        return cli.run(grid, 60, {"version": version, "defects": defects, **options}, "verify_vllm:Cpu")


@pytest.fixture(scope="module", params=[OLD, NEW])
def sound(request: pytest.FixtureRequest) -> Result:
    return run(request.param)


def test_right_kernels_pass_every_check(sound: Result) -> None:
    assert [row for row in sound.rows if row["outcome"] != OK] == []
    assert sound.exit_code == 0


def test_each_generation_has_its_own_kernels(sound: Result) -> None:
    called = {row["kernel"] for row in sound.rows}
    every = {"gemm1", "gemm2", "layer", "router", "quantise", "permute", "silu", "requantise"}
    assert called == every | ({"sum"} if sound.state.facts["vllm"] == OLD else {"unpermute"})
    absent = {kernel.name: kernel.absent for kernel in sound.kernels if kernel.absent}
    assert absent["sum" if "unpermute" in called else "unpermute"] == f"not in this path of vLLM {sound.state.facts['vllm']}"


@pytest.mark.parametrize(
    ("version", "defects", "kernels", "routings"),
    [
        (NEW, ["scale"], {"gemm1", "gemm2", "layer"}, {"spread", "skewed", "collapsed", "minus-one", "past-end", "nan"}),
        (NEW, ["permute"], {"layer", "permute"}, {"spread", "skewed", "collapsed", "minus-one", "past-end", "nan"}),
        (OLD, ["nan", "router"], {"layer", "router"}, {"nan"}),
    ],
)
def test_a_planted_defect_is_found_where_it_is_and_nowhere_else(
    version: str, defects: list[str], kernels: set[str], routings: set[str]
) -> None:
    result = run(version, *defects)
    wrong = [row for row in result.rows if row["outcome"] != OK]
    assert {row["outcome"] for row in wrong} == {WRONG}
    assert {row["kernel"] for row in wrong} == kernels
    assert {row["routing"] for row in wrong} <= routings
    assert result.exit_code == 1


def test_silent_garbage_for_ids_that_name_no_expert_is_found() -> None:
    shapes = (TP,)
    result = run(NEW, "bad-ids", grid=Grid(shapes=shapes, tokens=(9,), few=(9,), sides=("upstream",)))
    assert {row["routing"] for row in result.rows if row["outcome"] == WRONG} == {"minus-one", "past-end"}
    assert {row["kernel"] for row in result.rows if row["outcome"] == WRONG} == {"layer"}


def test_a_router_that_gives_nan_tokens_bad_ids_does_no_harm_where_the_layer_guards_them() -> None:
    grid = Grid(shapes=(TP,), tokens=(9,), few=(9,), sides=("upstream",))
    assert run(OLD, "router", grid=grid).exit_code == 1
    assert run(OLD, "router", grid=grid, ids_guarded=True).exit_code == 0


def test_without_vllm_nothing_of_upstream_is_asked_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module.upstream, "find_installed", lambda: None)
    kernels = [kernel for kernel, _ in upstream_module.Upstream().kernels()]
    assert {kernel.absent for kernel in kernels} == {"no vLLM is installed in this Python"}
    assert not any(kernel.counts for kernel in kernels)
    assert GRID.units(kernels) == []
