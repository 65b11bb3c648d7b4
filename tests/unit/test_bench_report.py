"""The result file of `bench serve` and the report made from it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.bench import result as results
from vllm_glm_patch.tools.bench import schema
from vllm_glm_patch.tools.bench.client import METRICS
from vllm_glm_patch.tools.bench.server import read_death

PNG = b"\x89PNG\r\n\x1a\n"


def measured(side: str, leg: int, case: str, concurrency: int, value: float, **other: object) -> dict[str, Any]:
    run = {
        "leg": leg,
        "side": side,
        "case": case,
        "concurrency": concurrency,
        "request_rate": None,
        "repeat": 1,
        "seed": 0,
        "status": schema.OK,
        "requested": 4,
        "completed": 4,
        "metrics": dict.fromkeys(METRICS, value * concurrency),
        "file": f"{leg}-{side}/{case}.json",
    }
    return {**run, **other}


def make_result(**changes: Any) -> dict[str, Any]:
    """Two cases, prefill under three loads and decode under one, each side measured twice."""
    loads = [("prefill", 1), ("prefill", 4), ("prefill", 16), ("decode <b>", 8)]
    sides = [("upstream", 1, 10.0), ("patched", 2, 14.0), ("patched", 3, 16.0), ("upstream", 4, 10.0)]
    result = {
        "kind": "bench serve",
        "schema_version": schema.VERSION,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T04:04:05+00:00",
        "complete": True,
        "machine": {"cpu": "a CPU", "python": "3.11.2", "vllm": "0.26.0", "vllm_glm_patch": "0.1.0", "card": "NVIDIA H100"},
        "plan": {
            "model": "glm",
            "serve_flags": ["-tp", "8"],
            "order": "ABBA",
            "repeats": 1,
            "warmups": 1,
            "minutes": None,
            "groups": [],
            "warm_each": "load",
            "deaths": 2,
            "points": [{"case": c, "concurrency": n, "request_rate": None, "prompts": 4, "flags": []} for c, n in loads],
        },
        "servers": [
            {
                "leg": leg,
                "side": side,
                "cards": None,
                "status": "ended",
                "startup_s": 30.0 + leg,
                "kv_cache_tokens": 4096,
                "peak_memory_mib": 1000.0,
                "memory_source": "nvidia-smi",
                "death": None,
                "log": f"{leg}-{side}/server-1.log",
            }
            for side, leg, _ in sides
        ],
        "runs": [measured(side, leg, case, n, value) for side, leg, value in sides for case, n in loads],
        "findings": [],
        "rows": [],
    }
    return {**result, **changes}


def written(folder: Path, **changes: Any) -> Path:
    results.write(make_result(**changes), folder / "serve.json")
    return folder


def test_a_result_that_was_written_is_read_back_with_its_rows(tmp_path: Path) -> None:
    read = schema.read(written(tmp_path) / "serve.json")
    (row,) = [r for r in read["rows"] if r["metric"] == "output_throughput" and r["concurrency"] == 4]
    assert {name: row[name] for name in ("vllm", "case", "upstream", "patched", "ratio", "ratio_low", "ratio_high")} == {
        "vllm": "0.26.0",
        "case": "prefill",
        "upstream": 40.0,
        "patched": 60.0,
        "ratio": 1.5,
        "ratio_low": 1.4,
        "ratio_high": 1.6,
    }
    assert (row["upstream_runs"], row["patched_runs"]) == (2, 2)


def test_runs_with_failed_requests_are_not_compared(tmp_path: Path) -> None:
    result = make_result()
    result["runs"] = [{**run, "status": schema.FAILED} if run["leg"] == 3 else run for run in result["runs"]]
    rows = results.make_rows(result)
    assert {(row["ratio"], row["patched_runs"]) for row in rows if row["case"] == "prefill"} == {(1.4, 1)}


def test_nothing_is_left_of_the_temporary_file(tmp_path: Path) -> None:
    written(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["serve.json"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.pop("machine"), "at the top: 'machine' is a required property"),
        (lambda r: r["rows"][0].update(ratio="fast"), "at rows/0/ratio: 'fast'"),
        (lambda r: r["runs"][1].update(side="left"), "at runs/1/side: 'left'"),
        (lambda r: r.update(more=1), "at the top: Additional properties"),
        (lambda r: r.update(schema_version=9), "has schema_version 9; this release reads 1"),
    ],
)
def test_a_file_that_departs_from_the_schema_is_refused_and_the_place_named(tmp_path: Path, change: Any, expected: str) -> None:
    file = written(tmp_path) / "serve.json"
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))
    with pytest.raises(UserError) as error:
        schema.read(tmp_path / "serve.json")
    assert expected in str(error.value)


def test_a_result_that_departs_from_the_schema_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="complete"):
        written(tmp_path, complete="yes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "no JSON", "[]"])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "serve.json").write_text(content)
    answer = run("bench", "report", tmp_path)
    assert answer.code == 2
    assert str(tmp_path) in answer.err
    assert "serve.json" in answer.err


def test_the_report_is_a_page_that_needs_no_network_and_pngs(tmp_path: Path) -> None:
    answer = run("bench", "report", written(tmp_path))
    assert answer.code == 0
    names = [Path(line).name for line in answer.out.splitlines()]
    assert names == ["report.html", "1-ratios.png", "1-prefill.png"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names[1:])
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*|url\(|@import|<script", page) == []
    assert page.count("data:image/png;base64,") == 2


def test_the_page_has_the_numbers_what_was_found_and_the_machine(tmp_path: Path) -> None:
    run("bench", "report", written(tmp_path, findings=["upstream died at request 3"], complete=False))
    page = (tmp_path / "report.html").read_text()
    assert "upstream died at request 3" in page
    assert "ended before it was complete" in page
    assert "NVIDIA H100" in page
    assert '<td class="n better">1.500 (1.400 – 1.600)</td>' in page  # more tokens a second
    assert '<td class="n worse">1.500 (1.400 – 1.600)</td>' in page  # a longer latency
    assert "decode &lt;b&gt;" in page
    assert "<b>" not in page


def test_single_runs_and_a_spread_over_1_give_no_verdict(tmp_path: Path) -> None:
    runs = make_result()["runs"]
    run("bench", "report", written(tmp_path, runs=[one for one in runs if one["leg"] < 3]))
    page = (tmp_path / "report.html").read_text()
    assert "1.400 (1.400 – 1.400)" in page
    slow = [{**one, "metrics": dict.fromkeys(METRICS, 1.0)} if one["leg"] == 3 else one for one in runs]
    run("bench", "report", written(tmp_path / "wide", runs=slow))
    for text in (page, (tmp_path / "wide" / "report.html").read_text()):
        assert not re.findall(r'class="n (?:better|worse)">[^<]*</td><td class="n ">[12] \+ [12]', text.split("<h3>Servers")[0])


def test_several_results_are_put_side_by_side(tmp_path: Path) -> None:
    old = make_result()
    old["machine"] = {**old["machine"], "vllm": "0.10.1.1"}
    folders = [written(tmp_path / "new"), written(tmp_path / "old", machine=old["machine"])]
    answer = run("bench", "report", *folders, "--out", tmp_path / "both", "--json")
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Serving: all results" in page
    assert '<th class="n">vLLM 0.10.1.1 on NVIDIA H100: ratio</th>' in page
    assert len(answer.json()["files"]) == 5
    assert set(answer.json()["rows"]) == {"vLLM 0.26.0 on NVIDIA H100", "vLLM 0.10.1.1 on NVIDIA H100"}


def test_a_report_of_one_side_alone_has_no_bars(tmp_path: Path) -> None:
    result = copy.deepcopy(make_result())
    result["runs"] = [run for run in result["runs"] if run["side"] == "patched"]
    answer = run("bench", "report", written(tmp_path, runs=result["runs"]))
    assert [Path(line).name for line in answer.out.splitlines()] == ["report.html", "1-prefill.png"]


def test_an_error_that_is_no_known_defect_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("(EngineCore pid=1) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    death = read_death(log, 1)
    assert (death.error, death.patch, death.grade) == ("CUDA out of memory. Tried to allocate 2 GiB", None, None)
    log.write_text("(EngineCore pid=1) ERROR RuntimeError: CUDA error: an illegal memory access was encountered\n")
    death = read_death(log, 1)
    assert (death.grade, death.text()) == ("possible", "an illegal memory access was encountered (possible: scale-overread)")
    log.write_text("")
    assert read_death(log, -9).text() == "exit code -9, and no error in its log"


def kernel_row(shape: str, tokens: int, ours: float | None, best: float, **other: Any) -> dict[str, Any]:
    low, high = (0.95 * best / ours, 1.05 * best / ours) if ours else (None, None)
    row = {
        "vllm": "0.26.0",
        "shape": shape,
        "tokens": tokens,
        "asked": "auto",
        "backend": "triton",
        "ours_us": ours,
        "cutlass_us": 1.2 * best,
        "triton_us": best,
        "triton_tuned_us": None,
        "best_upstream": "triton",
        "ratio": best / ours if ours else None,
        "ratio_low": low,
        "ratio_high": high,
        "error": 0.034,
        "upstream_error": 0.035,
        "floor_us": best / 4,
        "floor_by": "memory",
        "inputs": 1,
        "weights_mb": 472.0,
        "experts_used": 160,
        "most_tokens": 450,
        "workspace_mb": 148.0,
        "config": {},
        "failed": {"triton_tuned": "not in this vLLM: no table"},
    }
    return {**row, **other}


def make_kernel_result(**changes: Any) -> dict[str, Any]:
    """Two shapes, ours twice as fast for many tokens, slower for few, and one count that failed."""
    counts = [1, 8, 64, 512, 4096, 8192]
    rows = [
        kernel_row(shape, n, (30 + n / 8) * (1.5 if n < 8 else 0.5), 30 + n / 8) for shape in ("TP8", "EP8") for n in counts
    ]
    rows[3] = kernel_row("TP8", 512, None, 94.0, failed={"ours": "RuntimeError: no <tile> fits"})
    result = {
        "kind": schema.KERNEL,
        "schema_version": schema.VERSION,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:12:05+00:00",
        "complete": True,
        "machine": make_result()["machine"],
        "findings": [],
        "plan": {"shapes": ["TP8", "EP8"], "tokens": counts, "seed": 0, "rounds": 4, "replays": 10, "method": "m", "l2": "l"},
        "roofline": {"copy_tb_s": 2.41, "read_tb_s": 2.9, "fp8_tf_s": 1469.0},
        "checks": [],
        "rows": rows,
    }
    return {**result, **changes}


def kernel_written(folder: Path, **changes: Any) -> Path:
    schema.write(make_kernel_result(**changes), folder / "kernel.json")
    return folder


def test_times_of_the_layer_are_drawn_beside_serving(tmp_path: Path) -> None:
    answer = run("bench", "report", kernel_written(written(tmp_path)))
    assert answer.code == 0
    names = [Path(line).name for line in answer.out.splitlines()]
    assert names == [
        "report.html", "1-ratios.png", "1-prefill.png", "2-kernel-TP8.png", "2-kernel-EP8.png", "2-kernel-ratios.png",
    ]  # fmt: skip
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names[1:])
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*|url\(|@import|<script", page) == []
    assert page.count("data:image/png;base64,") == 5
    assert "Serving: vLLM 0.26.0 on NVIDIA H100" in page
    assert "The MoE layer: vLLM 0.26.0 on NVIDIA H100" in page


def test_the_page_of_the_layer_has_ratios_ceilings_and_why_a_number_is_missing(tmp_path: Path) -> None:
    run("bench", "report", kernel_written(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert '<td class="n better">2.000 (1.900 – 2.100)</td>' in page
    assert '<td class="n worse">0.667 (0.633 – 0.700)</td>' in page
    assert "ours: RuntimeError: no &lt;tile&gt; fits (TP8 512)" in page
    assert "triton_tuned: not in this vLLM: no table (TP8 1, TP8 8, " in page
    assert "copy 2.41 TB/s, read 2.9 TB/s, dense FP8 1469.0 TF/s" in page
    assert "Not checked against float64 in this run." in page


def test_layers_of_several_cards_are_put_side_by_side(tmp_path: Path) -> None:
    other = {**make_result()["machine"], "card": "0: NVIDIA H200, driver 580, 143771 MiB"}
    folders = [kernel_written(tmp_path / "h100"), kernel_written(tmp_path / "h200", machine=other)]
    answer = run("bench", "report", *folders, "--out", tmp_path / "both")
    assert "kernel-all.png" in [Path(line).name for line in answer.out.splitlines()]
    page = (tmp_path / "both" / "report.html").read_text()
    assert "The MoE layer: all results" in page
    assert "vLLM 0.26.0 on NVIDIA H200: ratio</th>" in page


def test_backends_that_were_asked_for_have_pictures_of_their_own(tmp_path: Path) -> None:
    rows = [kernel_row("TP8", n, 40.0, 60.0, asked=name, backend=name) for name in ("triton", "hopper") for n in (1, 64)]
    answer = run("bench", "report", kernel_written(tmp_path, rows=rows))
    names = [Path(line).name for line in answer.out.splitlines()]
    assert names == ["report.html", "1-kernel-TP8__triton.png", "1-kernel-TP8__hopper.png", "1-kernel-ratios.png"]


def test_results_of_the_same_vllm_and_card_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    answer = run("bench", "report", written(tmp_path / "a"), written(tmp_path / "b"), "--json", "--out", tmp_path)
    assert set(answer.json()["rows"]) == {"a: vLLM 0.26.0 on NVIDIA H100", "b: vLLM 0.26.0 on NVIDIA H100"}


def test_rows_of_several_runs_are_put_into_one_file(tmp_path: Path) -> None:
    old = {**make_result()["machine"], "vllm": "0.10.1.1"}
    folders = [written(tmp_path / "new"), written(tmp_path / "old", machine=old)]
    assert run("bench", "report", *folders, "--out", tmp_path, "--rows", tmp_path / "rows.json").code == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {row["vllm"] for row in content["rows"]} == {"0.26.0", "0.10.1.1"}
    assert {"vllm", "case", "concurrency", "metric", "upstream", "patched", "ratio"} <= set(content["rows"][0])
    assert [one["machine"]["vllm"] for one in content["measured"]] == ["0.26.0", "0.10.1.1"]
    assert content["measured"][0]["plan"]["serve_flags"] == ["-tp", "8"]


def test_a_kernel_result_that_departs_from_its_schema_is_refused(tmp_path: Path) -> None:
    kernel_written(tmp_path)
    file = tmp_path / "kernel.json"
    result = json.loads(file.read_text())
    result["rows"][2]["ours_us"] = "fast"
    file.write_text(json.dumps(result))
    answer = run("bench", "report", tmp_path)
    assert answer.code == 2
    assert "at rows/2/ours_us: 'fast'" in answer.err


def test_one_schema_covers_both_kinds() -> None:
    import jsonschema

    for result in (make_kernel_result(), make_result()):
        if result["kind"] == schema.SERVE:
            result["rows"] = results.make_rows(result)
        jsonschema.validate(result, schema.SCHEMA)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**result, "kind": "something else"}, schema.SCHEMA)
