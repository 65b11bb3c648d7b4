"""`verify` without a card: the grid, real child processes that really die, the table, the JSON, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run as command
from jsonschema import validate
from verify_backend import FACTS

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.verify import cli
from vllm_glm_patch.tools.verify.card import Card
from vllm_glm_patch.tools.verify.cases import FEW, ROUTINGS, SHAPES, TOKENS, Grid, Kernel, Shape, Unit, quick
from vllm_glm_patch.tools.verify.child import Job, pending
from vllm_glm_patch.tools.verify.journal import ERROR, FAULT, OK, SKIPPED, WRONG, Item, Outcome, Reader, State, begin, end
from vllm_glm_patch.tools.verify.report import Result

HERE = Path(__file__).parent
TP8 = SHAPES[0]
SMALL = Grid(shapes=(TP8,), tokens=(15, 16, 17, 32), few=(17,))


@pytest.fixture(autouse=True)
def backend_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def run(grid: Grid = SMALL, limit: float = 60.0, backend: str = "verify_backend:Fake", **options: Any) -> Result:
    return cli.run(grid, limit, options, backend)


def by_unit(result: Result) -> dict[str, dict[str, Any]]:
    return {Unit(r["side"], r["kernel"], r["shape"], r["routing"], r["tokens"]).id: r for r in result.rows}


# The grid.


def test_the_grid_has_every_boundary_and_shape_of_the_issue() -> None:
    wanted = {1, 8176, 16383, 16384, 16385, *range(8190, 8194), *range(15, 18)}
    wanted |= {size + step for size in (32, 64, 128, 256, 512, 1024, 2048, 4096) for step in (-1, 0, 1)}
    assert set(TOKENS) == wanted
    assert len(TOKENS) == len(wanted)
    assert {(s.intermediate_size, s.experts) for s in SHAPES} >= {(1536 // tp, 160) for tp in (1, 2, 4, 8)} | {(1536, 20)}
    assert {"minus-one", "past-end", "nan"} <= set(ROUTINGS)


def test_a_unit_is_made_of_every_present_kernel_under_the_routings_it_looks_at() -> None:
    kernels = [
        Kernel("ours", "layer", ROUTINGS),
        Kernel("ours", "small", ("spread",), most_tokens=16),
        Kernel("upstream", "gone", absent="why"),
    ]
    units = SMALL.units(kernels)
    assert {u.tokens for u in units if u.kernel == "small"} == {15, 16}
    assert {u.routing for u in units if u.kernel == "layer"} == set(ROUTINGS)
    assert {u.tokens for u in units if u.routing == "nan"} == {17}
    assert not [u for u in units if u.kernel == "gone"]
    assert len({u.id for u in units}) == len(units)
    assert all(Unit.from_id(u.id) == u for u in units)


def test_the_first_units_are_those_that_began_this_project() -> None:
    first = Grid().units([Kernel("upstream", "gemm1"), Kernel("ours", "layer")])[0]
    assert (first.side, first.shape, first.routing, first.tokens) == ("upstream", "TP8", "spread", 8192)


def test_quick_keeps_the_reported_counts_and_one_shape() -> None:
    grid = quick(Grid())
    assert [shape.name for shape in grid.shapes] == ["TP8"]
    assert {8190, 8191, 8192, 8193} <= set(grid.tokens)
    assert len(grid.units([Kernel("ours", "layer", ROUTINGS)])) < 20


# The processes.


def test_the_over_read_is_found_at_multiples_of_16_and_traced_to_its_buffer() -> None:
    result = run()
    spread = {r["tokens"]: r for r in result.rows if r["kernel"] == "gemm" and r["routing"] == "spread"}
    assert {tokens: r["outcome"] for tokens, r in spread.items()} == {15: OK, 16: FAULT, 17: OK, 32: FAULT}
    assert [spread[16]["buffers"], spread[32]["buffers"]] == [["a_scales"], ["a_scales"]]
    assert result.exit_code == 1
    assert "UNSAFE: upstream gemm." in result.verdict()


def test_a_sound_vllm_is_safe() -> None:
    result = run(sound=True)
    assert {r["outcome"] for r in result.rows} == {OK}
    assert len(result.rows) == result.state.total
    assert (result.exit_code, result.left) == (0, 0)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("abort", "the process was ended by SIGABRT"),
        ("segfault", "the process was ended by SIGSEGV"),
        ("kill", "the process was ended by SIGKILL"),
        ("exit", "the process left with exit code 5"),
    ],
)
@pytest.mark.parametrize("fork", [True, False], ids=["forked", "in the child itself"])
def test_a_kernel_that_kills_its_process_is_named_and_the_others_still_run(how: str, told: str, fork: bool) -> None:
    culprit = "upstream/layer/TP8/spread/16"
    result = run(sound=True, ends=[[culprit, how]], fork=fork)
    rows = by_unit(result)
    assert rows[culprit]["outcome"] == FAULT
    assert (rows[culprit]["text"], rows[culprit]["step"]) == (told, "place")
    assert [unit for unit, row in rows.items() if row["outcome"] != OK] == [culprit]
    assert len(rows) == result.state.total
    assert result.exit_code == 1


def test_a_fault_that_no_single_buffer_explains_is_said_to_be_an_inner_one() -> None:
    result = run(sound=True, ends=[["upstream/layer/TP8/spread/16", "kill"]])
    # guarded alone the same call dies again, so give one that only the whole run shows
    (row,) = [r for r in result.rows if r["outcome"] == FAULT]
    assert row["buffers"] == ["hidden_states"]
    state = State(rows=dict(result.state.rows), kernels=result.state.kernels, total=result.state.total)
    state.rows[Item("upstream/layer/TP8/spread/16", "hidden_states")] = {"outcome": OK}
    (line,) = Result(state, SMALL).tables()[1].rows
    assert "so an inner one" in line[4]


def test_a_kernel_that_hangs_is_ended(tmp_path: Path) -> None:
    job = Job(
        str(tmp_path / "journal"),
        "verify_backend:Fake",
        Grid(shapes=(TP8,), tokens=(15,), few=(15,), sides=("upstream",)),
        {"ends": [["upstream/layer/TP8/spread/15", "hang"]], "sound": True},
        unit_seconds=1.0,
    )
    job.save(tmp_path / "job")
    done = subprocess.run([sys.executable, "-m", "vllm_glm_patch.tools.verify", str(tmp_path / "job")], timeout=60)
    assert done.returncode == 0
    reader = Reader(tmp_path / "journal")
    reader.read()
    row = reader.state.rows[Item("upstream/layer/TP8/spread/15")]
    assert (row["outcome"], row["text"]) == (FAULT, "it did not end within 1 s")


def test_a_routing_that_faults_again_and_again_is_not_tried_at_every_count() -> None:
    result = run(Grid(shapes=(TP8,), tokens=(16, 32, 48, 64), few=(16,)))
    gemm = [r for r in result.rows if r["kernel"] == "gemm"]
    assert [r["tokens"] for r in gemm if r["routing"] == "spread"] == [16, 32, 48, 64]
    assert len([r for r in gemm if r["routing"] == "skewed"]) == 1
    assert result.left > 0
    assert f"{result.left} not run (known from another fault" in result.head()


def test_an_exception_of_verify_itself_does_not_pass_for_safe() -> None:
    result = run(sound=True, ends=[["upstream/layer/TP8/spread/16", "raise"]])
    assert result.exit_code == 1


def test_what_could_not_be_called_proves_nothing() -> None:
    result = run(sound=True, ends=[["upstream/layer", "error"]])
    assert result.exit_code == 2
    assert "this proves nothing. upstream layer: it was error" in result.verdict()


def test_a_run_out_of_time_that_has_not_reached_a_kernel_proves_nothing() -> None:
    result = run(limit=0.0, sound=True)
    assert (result.rows, result.exit_code) == ([], 2)
    assert "Give it more --minutes" in result.verdict()


def test_skipped_calls_are_counted_and_no_finding() -> None:
    result = run(sound=True, ends=[["upstream/layer/TP8/spread/32", "skipped"]])
    assert result.exit_code == 0
    assert "1 skipped" in result.head()


def test_a_finding_in_what_this_vllm_does_not_run_is_told_but_does_not_count() -> None:
    result = run(sound=True, ends=[["ours/layer/TP8/minus-one", "wrong"]])
    assert result.exit_code == 0
    assert any("wrong: ours layer" in cell for row in result.tables()[1].rows for cell in row)


def test_nothing_that_can_be_checked_is_the_users_error() -> None:
    with pytest.raises(UserError, match="needs a CUDA build"):
        run(refuse="verify needs a CUDA build of torch")


def test_a_card_that_cannot_be_started_is_told_once() -> None:
    with pytest.raises(UserError, match="The card cannot be used: no CUDA-capable device is detected"):
        run(no_start=True)


def test_where_a_fork_cannot_use_the_card_the_child_does_it_itself() -> None:
    result = run(no_start_in_a_fork=True)
    assert len([r for r in result.rows if r["outcome"] == FAULT]) > 2
    assert all(r["buffers"] == ["a_scales"] for r in result.rows if r["outcome"] == FAULT)
    assert result.exit_code == 1
    assert "refused" not in result.as_dict()["facts"]


def test_a_child_that_dies_before_it_runs_anything_is_told_with_its_last_words() -> None:
    with pytest.raises(UserError, match=r"left with code 9. It said:\nno such library"):
        run(dies_at_start=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_keeps_what_it_found_and_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import json, sys
sys.path[:0] = [{str(HERE)!r}]
from test_verify import run
result = run(seconds=0.2, limit=300.0)
json.dump(result.as_dict(), open({str(tmp_path / "out.json")!r}, "w"))
sys.exit(result.exit_code)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as started:
        journal = wait_for_a_row(started.pid)
        started.send_signal(number)
        assert started.wait(60) == 1  # the over-read was among what it had found
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["interrupted"]
    assert 0 < len(result["rows"]) < result["total"]
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(journal.parent).encode() in text_of(p)]


def wait_for_a_row(pid: int) -> Path:
    """The journal of a run that has found its first fault; `pid` is the run."""
    for _ in range(600):
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            words = text_of(arguments).split(b"\0")
            if b"vllm_glm_patch.tools.verify" in words and parent_of(arguments.parent) == pid:
                journal = Path(words[-2].decode()).with_name("journal.jsonl")
                if journal.exists() and '"fault"' in journal.read_text():
                    return journal
        time.sleep(0.05)
    raise AssertionError("the run found no fault within 30 s")


def text_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parent_of(process: Path) -> int:
    fields = text_of(process / "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def test_interrupted_without_a_finding_is_130() -> None:
    assert Result(State(), SMALL, interrupted=True).exit_code == 130


# The backend of a real card, as far as it goes without one.


def test_the_real_backend_says_what_it_lacks() -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(UserError, match=r"needs a CUDA build of torch, and .* is none\. Run it in vLLM's own Python"):
        run(backend=cli.BACKEND)


@pytest.mark.parametrize(
    ("error", "routing", "outcome"),
    [
        (lambda torch: torch.OutOfMemoryError("CUDA out of memory"), "spread", SKIPPED),
        (lambda torch: RuntimeError("CUDA error: an illegal memory access was encountered"), "spread", FAULT),
        (lambda torch: RuntimeError("Failed to initialize the TMA descriptor 1"), "minus-one", FAULT),
        (lambda torch: AssertionError("topk_ids"), "past-end", WRONG),
        (lambda torch: AssertionError("hidden size"), "spread", ERROR),
        (lambda torch: TypeError("unexpected keyword argument 'x'"), "minus-one", ERROR),
    ],
)
def test_an_exception_of_a_call_is_judged(
    error: Callable[[Any], Exception], routing: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    card = Card()
    monkeypatch.setattr(card, "synchronise", lambda: None)
    assert card._judged(error(torch), routing).outcome == outcome


def test_a_card_that_cannot_be_waited_for_has_faulted_whatever_the_exception_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    card = Card()

    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(card, "synchronise", lost)
    assert card._judged(TypeError("x"), "spread").outcome == FAULT


# What is pending, and the journal.


def test_the_first_fault_of_a_kernel_is_traced_before_anything_else_runs() -> None:
    units = SMALL.units([Kernel("upstream", "gemm", ("spread",))])
    state = State(buffers={units[0].id: ["a", "b"]}, rows={Item(units[0].id): {"outcome": FAULT}})
    assert pending(state, units, "TP8") == [Item(units[0].id, "a"), Item(units[0].id, "b")]


def test_later_faults_are_only_asked_whether_it_is_the_same_buffer_and_at_the_end() -> None:
    units = SMALL.units([Kernel("upstream", "gemm", ("spread",))])
    rows = {Item(unit.id): {"outcome": FAULT} for unit in units[:2]}
    rows |= {Item(units[0].id, "a"): {"outcome": OK}, Item(units[0].id, "b"): {"outcome": FAULT}}
    state = State(buffers={unit.id: ["a", "b"] for unit in units}, rows=rows)
    assert pending(state, units, "TP8") == [Item(unit.id) for unit in units[2:]]
    state.rows |= {Item(unit.id): {"outcome": OK} for unit in units[2:]}
    assert pending(state, units, "TP8") == [Item(units[1].id, "b")]


def test_a_line_that_is_cut_off_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    item = Item("ours/layer/TP8/spread/1")
    begin(path, item)
    reader = Reader(path)
    reader.read()
    assert reader.state.open == item
    end(path, item, Outcome(OK, "", float("inf"), 0.1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    reader.read()
    assert not reader.state.rows
    path.write_bytes(whole)
    reader.read()
    assert reader.state.rows[item]["error"] is None
    assert reader.state.open is None


# What is shown.

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "exit_code", "verdict", "interrupted", "facts", "grid", "total", "not_run", "kernels", "rows"],
    "properties": {
        "schema": {"const": "vllm-glm-patch verify 1"},
        "exit_code": {"enum": [0, 1, 2, 130]},
        "verdict": {"type": "string"},
        "interrupted": {"type": "boolean"},
        "seconds": {"type": "number"},
        "version": {"type": "string"},
        "facts": {"type": "object"},
        "grid": {"type": "object", "required": ["shapes", "tokens", "sides"]},
        "total": {"type": ["integer", "null"]},
        "not_run": {"type": "integer"},
        "kernels": {"type": "array", "items": {"required": ["side", "name", "routings", "counts", "absent"]}},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["side", "kernel", "shape", "routing", "tokens", "outcome", "error", "limit", "text", "buffers"],
                "properties": {
                    **{name: {"type": "string"} for name in ("side", "kernel", "shape", "routing", "text", "step")},
                    "tokens": {"type": "integer"},
                    "outcome": {"enum": ["ok", "wrong", "fault", "error", "skipped"]},
                    "error": {"type": ["number", "null"]},
                    "limit": {"type": ["number", "null"]},
                    "buffers": {"type": "array", "items": {"type": "string"}},
                    "traced": {"type": "boolean"},
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def mixed() -> Result:
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), before])
    try:
        return run(ends=[["upstream/layer/TP8/minus-one", "wrong"], ["upstream/layer/TP8/past-end", "nan"]])
    finally:
        os.environ["PYTHONPATH"] = before


def test_json_is_valid_and_finite(mixed: Result) -> None:
    text = json.dumps(mixed.as_dict(), allow_nan=False)
    validate(json.loads(text), SCHEMA)


def test_the_table_says_what_faults_where_and_what_is_absent(mixed: Result) -> None:
    kernels, findings = mixed.tables()
    rows = {row[0]: row for row in kernels.rows}
    assert rows["upstream gemm"][2] != "0"
    assert rows["upstream sum"][-1] == "not in this path of vLLM 0.10.1.1"
    assert rows["ours layer"][-1] == "not what this vLLM runs here"
    told = {row[:4]: row[4] for row in findings.rows}
    assert told["fault: upstream gemm", "TP8", "spread", "16, 32"] == "past the end of a_scales"
    assert told["wrong: upstream layer", "TP8", "minus-one", "17"] == "error 0.5, allowed 0.08. 3 of 128 sampled rows"
    assert told["wrong: upstream layer", "TP8", "past-end", "17"].startswith("error not finite, allowed 0.08")
    assert FACTS["card"] in mixed.head()


def test_it_is_told_on_the_terminal_and_written_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mixed: Result) -> None:
    monkeypatch.setattr(cli.facts, "cards", lambda: (["0: Fake"], ""))
    monkeypatch.setattr(cli, "run", lambda grid, limit, options: mixed)
    result = command("verify", "--json", tmp_path / "out.json")
    assert result.code == 1
    assert "UNSAFE: upstream gemm, upstream layer." in result.out
    assert "past the end of a_scales" in result.out
    validate(json.loads((tmp_path / "out.json").read_text()), SCHEMA)
    assert command("verify", "--json", "-").json()["exit_code"] == 1


# The command line.


def test_without_a_card_it_says_so_and_leaves_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.facts, "cards", lambda: ([], "nvidia-smi is not there"))
    result = command("verify")
    assert (result.code, result.out) == (2, "")
    assert "verify needs a Hopper card, and none is here: nvidia-smi is not there" in result.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shape", "TP16"], "--shape is 'TP16'; known are TP8, EP8, TP4, TP2, TP1, EP4."),
        (["--tokens", "8192,x"], "--tokens has 'x'; give numbers from 1 to 65536"),
        (["--tokens", "0"], "--tokens has '0'"),
        (["--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["--upstream-only", "--ours-only"], "exclude each other"),
        (["--json", "/nowhere/out.json"], "there is no folder /nowhere"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.facts, "cards", lambda: (["0: Fake"], ""))
    result = command("verify", *options)
    assert result.code == 2
    assert told in result.err


def test_options_choose_the_grid() -> None:
    grid = cli.chosen(False, True, False, ["ep8", "tp1"], "8192, 17")
    assert [shape.name for shape in grid.shapes] == ["EP8", "TP1"]
    assert (grid.tokens, grid.few, grid.sides) == ((8192, 17), (8192, 17), ("ours",))
    assert cli.chosen(False, False, False, None, None).few == FEW
    assert cli.chosen(True, False, True, ["TP1"], None).shapes[0].name == "TP1"


def test_the_time_is_told_before_it_begins() -> None:
    short = cli.estimate(quick(Grid()), 60)
    assert re.search(r"TP8; 9 token counts\. About [234]\d s on an H100, .* at most 1 minutes", short), short
    assert "minutes on an H100, more where something faults, at most 6 minutes" in cli.estimate(Grid(), 360)


# Our own kernel, really run.


TINY = Grid(
    shapes=(Shape("tiny", 32, 4, 8, hidden_size=64, top_k=2),), tokens=(1, 5), few=(5,), sides=("ours",)
)  # fmt: skip


def test_our_kernel_is_right_for_every_routing_through_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = run(TINY, backend="verify_backend:Interpreted")
    assert [r for r in result.rows if r["outcome"] != OK] == []
    assert {r["routing"] for r in result.rows} == set(ROUTINGS)
    assert {r["kernel"] for r in result.rows} == {"layer", "steps"}
    assert result.exit_code == 0


def test_a_fault_in_a_step_of_our_kernel_is_told_with_the_step_and_its_buffers_are_tried_one_by_one() -> None:
    pytest.importorskip("triton")
    result = run(TINY, backend="verify_backend:Interpreted", fault_at=5)
    (fault,) = [r for r in result.rows if r["outcome"] == FAULT]
    assert (fault["kernel"], fault["tokens"], fault["step"]) == ("steps", 5, "gemm2")
    assert (fault["traced"], fault["buffers"]) == (True, [])
    tried = {item.guard for item in result.state.rows if item.unit == "ours/steps/tiny/spread/5"}
    assert {"all", "hidden_states", "w13", "topk_ids", "expert_map", "workspace", "out"} < tried
    assert result.exit_code == 1
