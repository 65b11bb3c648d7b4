"""`bench serve` with a fake `vllm` on PATH: what is started when, what is kept, and what a death looks like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, run

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.bench import schema, server
from vllm_glm_patch.tools.bench.cases import make_points

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_vllm_command.py")
UPSTREAM_DIES = {"died": "upstream", "at": 4}  # the client tries one request first, so this is the third that counts
QUICK = ("--warmups", 0, "--order", "AB")
FEW = ("--", "--num-prompts", 4)


class Bench:
    """Calls `bench serve` with the fake command; `calls` are those of the fake one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = folder / "out"
        self._calls = folder / "calls.jsonl"
        self._patch = monkeypatch
        command = folder / "bin" / "vllm"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_VLLM_CALLS", str(self._calls))
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: object, trouble: dict[str, Any] | None = None) -> Result:
        self._patch.setenv("FAKE_VLLM", json.dumps(trouble or {}))
        return run("bench", "serve", "model", "--out", self.out, *arguments)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    def result(self) -> dict[str, Any]:
        return schema.read(self.out / "serve.json")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def row_of(result: dict[str, Any], metric: str, **load: object) -> dict[str, Any]:
    (row,) = [r for r in result["rows"] if r["metric"] == metric and all(r[k] == v for k, v in load.items())]
    return row


def value_in(call: list[str], flag: str) -> str:
    """The last value of a flag."""
    return call[len(call) - call[::-1].index(flag)]


def living_with(text: str) -> list[str]:
    """The command lines of living processes that name `text`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never came about"
        time.sleep(0.05)


def test_servers_are_started_upstream_patched_patched_upstream(bench: Bench) -> None:
    assert bench("--warmups", 0, *FEW).code == 0
    sides = [call[0] for call in bench.calls() if call[0] != "client"]
    assert sides == ["upstream", "patched", "patched", "upstream"]
    assert [server["side"] for server in bench.result()["servers"]] == sides


def test_flags_before_the_dashes_go_to_the_server_and_those_behind_to_the_client(bench: Bench) -> None:
    assert bench("-tp", 8, "--max-model-len", 2048, *QUICK, *FEW, "--ignore-eos").code == 0
    server, client, *_ = bench.calls()
    assert server[-4:] == ["-tp", "8", "--max-model-len", "2048"]
    assert "--ignore-eos" in client
    assert "--ignore-eos" not in server


def test_every_load_is_measured_as_often_as_asked_after_its_warm_up(bench: Bench) -> None:
    assert bench("--concurrency", "1,4", "--repeats", 2, "--order", "AB", *FEW).code == 0
    clients = [call for call in bench.calls() if call[0] == "client"]
    asked = [(value_in(call, "--max-concurrency"), value_in(call, "--num-prompts")) for call in clients[: len(clients) // 2]]
    assert asked == [("1", "2"), ("1", "4"), ("1", "4"), ("4", "4"), ("4", "4"), ("4", "4")]
    assert row_of(bench.result(), "median_ttft_ms", concurrency=4)["patched_runs"] == 2


def test_a_case_can_be_warmed_up_once_with_its_highest_load(bench: Bench) -> None:
    assert bench("--concurrency", "1,4", "--warm-each", "case", "--order", "AB", *FEW).code == 0
    clients = [call for call in bench.calls() if call[0] == "client"]
    asked = [(value_in(call, "--max-concurrency"), Path(value_in(call, "--result-filename")).stem) for call in clients]
    assert [one for one in asked if "warmup" in one[1]] == 2 * [("4", "random__concurrency_1-warmup-1")]
    assert len(asked) == 2 * 3
    assert len({value_in(call, "--seed") for call in clients[:3]}) == 3


def test_no_prompts_are_sent_twice_to_a_server_and_both_sides_get_the_same(bench: Bench) -> None:
    """Else the prefix cache answers."""
    assert bench("--concurrency", "1,2", "--repeats", 2, "--order", "AB", *FEW, "--seed", 7).code == 0
    seeds = [int(value_in(call, "--seed")) for call in bench.calls() if call[0] == "client"]
    assert len(set(seeds)) == 6
    assert seeds[:6] == seeds[6:]


def test_rows_have_both_sides_their_ratio_and_the_servers(bench: Bench) -> None:
    assert bench(*QUICK, *FEW).code == 0
    result = bench.result()
    assert result["complete"]
    row = row_of(result, "median_ttft_ms")
    assert (row["vllm"], row["case"], row["concurrency"]) == ("0.17.1", "random", 1)
    assert (row["upstream"], row["patched"], row["ratio"], row["ratio_low"]) == (11.0, 11.0, 1.0, 1.0)
    assert row_of(result, "input_throughput")["upstream"] == 200
    assert row_of(result, "kv_cache_tokens", case="server")["patched"] == 524288
    assert row_of(result, "startup_s", case="server")["ratio"] > 0


def test_warm_ups_do_not_wait_between_requests_and_give_short_answers(bench: Bench) -> None:
    assert bench("--order", "AB", "--request-rate", 50, *FEW, "--random-output-len", 512).code == 0
    warming, measuring, *_ = (call for call in bench.calls() if call[0] == "client")
    assert ("--request-rate" in warming, "--request-rate" in measuring) == (False, True)
    assert (value_in(warming, "--random-output-len"), value_in(measuring, "--random-output-len")) == ("32", "512")


def test_what_there_is_no_time_for_is_left_out_on_both_sides_and_told(bench: Bench) -> None:
    loads = range(1, 101)
    for minutes in (0.1, 0.4, 1.6):  # a busy machine needs seconds to start the second server
        shutil.rmtree(bench.out, ignore_errors=True)
        wanted = ",".join(map(str, loads))
        assert bench(*QUICK, "--minutes", minutes, "--concurrency", wanted, *FEW, trouble={"seconds": 0.7}).code == 0
        result = bench.result()
        measured = {side: [r["concurrency"] for r in result["runs"] if r["side"] == side] for side in ("upstream", "patched")}
        if measured["patched"]:
            break
    assert 1 <= len(measured["patched"]) <= len(measured["upstream"]) < len(loads)
    assert set(measured["patched"]) <= set(measured["upstream"])
    assert not result["complete"]
    assert result["findings"][0].startswith("upstream, server 1: no time was left for random, concurrency ")


def test_two_groups_of_cards_serve_both_sides_at_once_and_each_side_once(bench: Bench) -> None:
    assert bench("--warmups", 0, "--groups", "0-1,2+4", *FEW).code == 0
    result = bench.result()
    assert result["complete"]
    served = sorted((one["leg"], one["side"], one["cards"]) for one in result["servers"])
    assert served == [(1, "upstream", "0,1"), (2, "patched", "2,4"), (3, "patched", "0,1"), (4, "upstream", "2,4")]
    for one in result["servers"]:
        assert f"cards {one['cards']}\n" in (bench.out / one["log"]).read_text()
    kinds = ["client" if call[0] == "client" else "server" for call in bench.calls()]
    assert kinds == 2 * ["server", "server", "client", "client"]
    assert row_of(result, "median_ttft_ms")["patched_runs"] == 2


def test_flags_that_one_of_two_servers_does_not_take_end_both(bench: Bench) -> None:
    answer = bench("--no-such-flag", *QUICK, "--groups", "0,1", *FEW)
    assert answer.code == 2
    assert "unrecognized arguments: --no-such-flag" in answer.err
    assert living_with("--no-such-flag") == []


def test_json_prints_the_result_and_nothing_else(bench: Bench) -> None:
    assert bench(*QUICK, "--json", *FEW).json() == bench.result()


def test_a_death_is_a_result_and_names_the_request_and_the_defect(bench: Bench) -> None:
    answer = bench(*QUICK, *FEW, trouble=UPSTREAM_DIES)
    assert answer.code == 0
    (finding,) = bench.result()["findings"]
    assert finding.startswith("upstream died at request 3 of random, concurrency 1: an illegal memory access was encountered")
    assert "(possible: scale-overread)" in finding  # an address alone does not tell it from other over-reads
    assert finding in answer.out
    row = row_of(bench.result(), "median_ttft_ms")
    assert (row["upstream"], row["patched"], row["ratio"]) == (None, 11.0, None)


def test_a_death_at_the_request_that_the_client_tries_first_is_one_at_request_1(bench: Bench) -> None:
    bench(*QUICK, *FEW, trouble={"died": "upstream", "at": 1})
    (finding,) = bench.result()["findings"]
    assert finding.startswith("upstream died at request 1 of random, concurrency 1: ")
    bench.out = bench.out.with_name("warmed")
    bench("--order", "AB", *FEW, trouble={"died": "upstream", "at": 1})
    (finding,) = bench.result()["findings"]
    assert " at request 1 of random, concurrency 1 while it was warmed up: " in finding


def test_after_a_death_a_new_server_measures_the_other_cases(bench: Bench) -> None:
    assert bench(*QUICK, "--concurrency", "1,2", *FEW, trouble={"died": "upstream", "at": 6}).code == 0
    upstream = [(run["concurrency"], run["status"]) for run in bench.result()["runs"] if run["side"] == "upstream"]
    assert upstream == [(1, schema.OK), (2, schema.DIED)]
    bench.out = bench.out.with_name("second")
    assert bench(*QUICK, "--concurrency", "1,2", "--", "--num-prompts", 2, trouble={"died": "upstream", "at": 1}).code == 0
    assert [server["status"] for server in bench.result()["servers"]] == ["died", "died", "ended"]


def test_a_case_that_kills_servers_is_left_and_the_other_side_measures_all_of_it(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "cases.toml").write_text(
        '[[case]]\nname = "deadly"\nconcurrency = [1, 2, 3]\n[[case]]\nname = "other"\nconcurrency = 1\n'
    )
    options = ("--cases", "cases.toml", "--deaths", 1, "--", "--num-prompts", 2)
    assert bench(*QUICK, *options, trouble={"died": "upstream", "at": 4}).code == 0
    result = bench.result()
    upstream = [(run["case"], run["concurrency"], run["status"]) for run in result["runs"] if run["side"] == "upstream"]
    assert upstream == [("deadly", 1, schema.OK), ("deadly", 2, schema.DIED), ("other", 1, schema.OK)]
    assert [run["concurrency"] for run in result["runs"] if run["side"] == "patched"] == [1, 2, 3, 1]
    assert "upstream: left out, since deadly has killed 1 of its servers: deadly, concurrency 3." in result["findings"]


def test_a_server_that_does_not_start_is_a_result(bench: Bench) -> None:
    assert bench(*QUICK, *FEW, trouble={"unstartable": "upstream"}).code == 0
    (finding,) = bench.result()["findings"]
    assert finding.startswith("upstream did not start: ValueError: No available memory")
    assert row_of(bench.result(), "median_ttft_ms")["patched"] == 11.0


def test_a_flag_that_the_server_does_not_take_is_told(bench: Bench) -> None:
    answer = bench("--no-such-flag", *QUICK, *FEW)
    assert answer.code == 2
    assert "unrecognized arguments: --no-such-flag" in answer.err


def test_a_package_that_the_client_lacks_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_DYING", 0.5)
    answer = bench(*QUICK, *FEW, trouble={"missing": "pandas"})
    assert answer.code == 2
    assert "needs pandas, which is not installed" in answer.err


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGINT, ("--groups", "0,1"))],
    ids=["SIGINT", "SIGTERM", "groups"],
)
def test_an_interruption_keeps_what_is_measured_and_ends_the_servers(
    bench: Bench, number: signal.Signals, options: tuple[str, ...]
) -> None:
    environment = {**os.environ, "FAKE_VLLM": json.dumps({"seconds": 1}), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vllm_glm_patch", "bench", "serve", "model", "--out", str(bench.out), *options]
    command += ["--warmups", "0", "--repeats", "50", "--", "--num-prompts", "2"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: (bench.out / "serve.json").exists() and bench.result()["runs"])
        assert not bench.result()["complete"]  # nor would it be if nobody could write any more
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "what was measured is kept" in errors
    result = bench.result()
    assert not result["complete"]
    assert row_of(result, "median_ttft_ms")["upstream"] == 11.0
    for call in bench.calls():
        assert living_with(f"--port {value_in(call, '--port')} ") == []
    assert not any(run["status"] == schema.DIED for run in result["runs"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--concurrency", "1,x"), "--concurrency is 'x'"),
        (("--request-rate", "0"), "--request-rate is '0'"),
        (("--concurrency", "0"), "--concurrency is '0'"),
        (("--", "--seed", "x"), "--seed is 'x'; give a whole number from 0 on"),
        (("--order", "BA"), "--order is 'BA'; give one of ABBA, AB"),
        (("--warm-each", "run"), "--warm-each is 'run'; give one of load, case"),
        (("--port", "8000"), "--port is chosen by this command"),
        (("--", "--max-concurrency", "4"), "--max-concurrency of `vllm bench serve` is set by this command"),
        (("--", "--dataset-name", "sharegpt"), "needs --dataset-path FILE"),
        (("--", "--dataset-name", "sharegpt", "--dataset-path", "none.json"), "--dataset-path none.json is no file"),
        (("--concurrency", "1,1"), "'random, concurrency 1' is there 2 times"),
        (("--cases", "none.toml"), "--cases none.toml cannot be read"),
        (("--cases", "prefill,decod"), "or some of prefill,decode,mixed"),
        (("--groups", "0-3"), "--groups is '0-3'; give two groups of different cards"),
        (("--groups", "0-3,3-6"), "two groups of different cards"),
        (("--groups", "0-3,4-5"), "has 4 and 2 cards"),
        (("--groups", "0,x"), "--groups has 'x'; give two groups of card numbers, such as 0-3,4-7"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(bench: Bench, arguments: tuple[str, ...], expected: str) -> None:
    answer = bench(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert expected in answer.err
    assert not bench.out.exists()


def test_results_are_not_written_over(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "something").touch()
    assert "is there already" in bench(*QUICK, *FEW).err


def test_a_folder_named_vllm_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert "holds a folder 'vllm'" in bench(*QUICK, *FEW).err


def test_cases_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cases.toml"
    file.write_text(
        '[[case]]\nname = "prefill"\nflags = "--random-input-len 8192"\nconcurrency = [1, 4]\n'
        '[[case]]\nname = "mixed"\nflags = ["--random-input-len", 4096]\nrequest_rate = 0.5\n'
    )
    points = make_points(["--seed", "1"], None, None, str(file))
    assert [point.label for point in points] == ["prefill, concurrency 1", "prefill, concurrency 4", "mixed, 0.5 requests/s"]
    assert points[2].flags == ("--random-input-len", "4096", "--seed", "1")
    assert [point.prompts for point in points] == [16, 16, 30]


def test_known_cases_come_by_name_with_bounded_prompts() -> None:
    points = make_points(["--seed", "1"], None, None, "prefill,decode,mixed")
    assert [(p.case, p.concurrency or p.request_rate, p.prompts) for p in points] == [
        *(("prefill", 1, 8), ("prefill", 4, 16), ("prefill", 16, 32)),
        *(("decode", 1, 2), ("decode", 16, 16), ("decode", 64, 64), ("decode", 256, 256)),
        *(("mixed", 0.5, 8), ("mixed", 1, 16), ("mixed", 2, 24), ("mixed", 4, 32)),
    ]
    assert points[0].flags == ("--random-input-len", "8192", "--random-output-len", "1", "--seed", "1")
    assert make_points(["--num-prompts", "3"], None, None, "prefill")[2].prompts == 3


def test_prompts_of_a_case_are_one_for_all_loads_or_one_a_load(tmp_path: Path) -> None:
    file = tmp_path / "cases.toml"
    file.write_text('[[case]]\nname = "a"\nconcurrency = [1, 2, 3]\nprompts = 5\n')
    assert [point.prompts for point in make_points([], None, None, str(file))] == [5, 5, 5]
    file.write_text('[[case]]\nname = "a"\nconcurrency = [1, 2, 3]\nprompts = [5, 6]\n')
    with pytest.raises(UserError, match="The case 'a' has 3 loads and 2 prompts; give one number, or one a load"):
        make_points([], None, None, str(file))


def test_an_unknown_key_of_a_case_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cases.toml"
    file.write_text('[[case]]\nname = "a"\nconcurency = 1\n')
    with pytest.raises(UserError, match="the key 'concurency'; known keys are concurrency"):
        make_points([], None, None, str(file))


def test_the_session_for_a_card_runs_in_the_background_and_hands_over_what_there_is(bench: Bench, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "session_serve.sh"
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    cases = tmp_path / "cases.toml"
    cases.write_text('[[case]]\nname = "a"\nflags = "--random-output-len 1"\nprompts = 2\n')
    places = {"KEEP": str(tmp_path / "keep"), "OURS": str(ROOT), "OUT": str(tmp_path / "brought"), "CASES": str(cases)}

    def session(*arguments: str) -> str:
        command = ["bash", script, *arguments]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    session("start", "old", "5")
    assert session("wait", "old", "0").endswith("old still runs\n")
    assert session("wait", "old", "200").endswith("old has ended, exit code 0\n")
    result = schema.read(tmp_path / "brought" / "old" / "serve.json")
    assert result["complete"], (tmp_path / "brought" / "old" / "old.txt").read_text()
    server = bench.calls()[0]
    assert value_in(server, "--load-format") == "glm_patch_synthetic"
    assert json.loads((Path(server[2]) / "config.json").read_text())["num_hidden_layers"] == 92
    assert (tmp_path / "brought" / "old" / "logs.tgz").stat().st_size > 0
