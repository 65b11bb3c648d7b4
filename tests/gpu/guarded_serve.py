#!/usr/bin/env python3
"""The report's step under `vllm serve`: scales before an unmapped page, with and without the patch; answers compared.

    guarded_serve.py MODEL OUT.json [--flags "..."]      an affected vLLM and vllm_glm_patch on the Python path

Five servers, started one after the other on one card:
  unpatched-guarded   dies on a step of 8192 tokens
  patched-guarded     answers all
  unpatched           nothing placed: the greedy answers to compare with, until it dies by itself
  uncured-captured    the cure alone switched off, shape policy `captured`: refuses to start and names the kernel
  uncured-kept        the same with shape policy `guarded`: answers all, no step has 8192 tokens
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import random
import shlex
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import children

from vllm_glm_patch.tools.processes import Session, interruptible

FLAGS = "--enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000 --gpu-memory-utilization 0.17"
LENGTHS = (1001, 5003, 8190, 8191, 12000, 8193, 8192, 16384)
TELLING = (
    "vllm-glm-patch", "  full-step", "  routing-ids", "  scale-over", "Warmed up", "illegal memory", "EngineDead",
    "GPU KV cache size", "guard_scales_plugin", "failed", "The scheduler emits",
)  # fmt: skip
ENTRY = "[vllm.general_plugins]\nguard_scales = guard_scales_plugin:register\n"


class Server:
    """One `vllm serve`, ended with everything it starts."""

    def __init__(self, name: str, model: str, flags: str, environment: dict[str, str], logs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = logs / f"{name}.log"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--no-enable-prefix-caching", *shlex.split(flags)]
        self.command = " ".join(command[1:])
        base = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        base["CPATH"] = "/usr/local/cuda/include"
        self.log.unlink(missing_ok=True)
        self.session = Session(command, self.log, {**os.environ, **base, **environment}, logs)

    def wait_until_ready(self, seconds: float) -> float:
        started = time.time()
        while time.time() - started < seconds:
            if (code := self.session.exit_code()) is not None:
                raise RuntimeError(f"the server ended with {code}; see {self.log}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return time.time() - started
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {seconds} s; see {self.log}")

    def ask(self, prompt: list[int], model: str, answer: int = 8) -> dict[str, Any]:
        """The greedy answer to a prompt of token ids, or what went wrong."""
        body = {"model": model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "logprobs": 1}
        body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        started = time.time()
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answered = json.load(response)
        except (OSError, urllib.error.HTTPError) as error:
            return {"outcome": "died", "text": str(error)}
        if "choices" not in answered:  # 0.14.1 says with status 200 that its engine has died
            return {"outcome": "died", "text": json.dumps(answered)[:300]}
        logprobs = answered["choices"][0]["logprobs"]
        return {
            "outcome": "answered", "seconds": round(time.time() - started, 3), "tokens": logprobs["tokens"],
            "logprobs": logprobs["token_logprobs"],
        }  # fmt: skip

    def lines(self, *needles: str) -> list[str]:
        return [line.strip() for line in self.log.read_text().splitlines() if any(n in line for n in needles)][:12]

    def stop(self) -> None:
        self.session.stop()
        time.sleep(2)  # the driver takes back the memory


def prompt_of(length: int, variant: int = 0) -> list[int]:
    """Varied tokens: a prompt of one token repeated would route all of them alike."""
    return random.Random(length + 1_000_000 * variant).choices(range(1000, 150000), k=length)


def serve(name: str, arguments: argparse.Namespace, guarded: bool, environment: dict[str, str], logs: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if guarded:
            info = Path(folder, "guard_scales-1.0.dist-info")
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guard-scales\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(ENTRY)
            here = str(Path(__file__).parent)
            path = os.pathsep.join([folder, here, os.environ.get("PYTHONPATH", "")])
            environment = {**environment, "PYTHONPATH": path}
        server = Server(name, arguments.model, arguments.flags, environment, logs)
        row: dict[str, Any] = {"server": name, "guarded": guarded, "environment": environment, "command": server.command}
        row["environment"].pop("PYTHONPATH", None)
        try:
            row["start_seconds"] = round(server.wait_until_ready(300), 1)
            row["answers"] = {}
            for length in LENGTHS:
                row["answers"][length] = server.ask(prompt_of(length), arguments.model)
                print(name, length, row["answers"][length], flush=True)
                if row["answers"][length]["outcome"] == "died":
                    break
        except RuntimeError as error:
            row["error"] = str(error)
        finally:
            time.sleep(1)
            server.stop()
        row["log"] = server.lines(*TELLING)
        print(*row["log"], sep="\n", flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--only", default="", help="names of servers to run, separated by commas")
    parser.add_argument("--stagger", type=float, default=45, help="seconds between two starts: profiling must not overlap")
    arguments = parser.parse_args()
    logs = arguments.out.parent.resolve()
    uncured = {"VLLM_GLM_PATCH_DISABLE": "scale-overread"}
    wanted = [
        ("unpatched-guarded", True, {"VLLM_GLM_PATCH": "0"}),
        ("patched-guarded", True, {}),
        ("unpatched", False, {"VLLM_GLM_PATCH": "0"}),
        ("uncured-captured", True, {**uncured, "VLLM_GLM_PATCH_SHAPE_POLICY": "captured"}),
        ("uncured-kept", True, {**uncured, "VLLM_GLM_PATCH_SHAPE_POLICY": "guarded"}),
    ]
    wanted = [server for server in wanted if not arguments.only or server[0] in arguments.only.split(",")]
    result = {"vllm": importlib.metadata.version("vllm"), "flags": arguments.flags, **children.run(children.machine)}
    # In this order: an interruption ends the servers, and the pool waits for threads that then have nothing to wait for.
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool, interruptible():
        running = []
        for name, guarded, environment in wanted:
            running.append(pool.submit(serve, name, arguments, guarded, environment, logs))
            time.sleep(arguments.stagger)
        result["servers"] = [server.result() for server in running]
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    report(result)


def report(result: dict[str, Any]) -> None:
    """Print whether each server did what it should; the exit code is 1 if one did not."""
    servers = {server["server"]: server for server in result["servers"]}

    def outcomes(name: str) -> dict[int, str]:
        return {length: answer["outcome"] for length, answer in servers[name].get("answers", {}).items()}

    def tokens(name: str) -> dict[int, list[str]]:
        return {length: answer.get("tokens", []) for length, answer in servers[name].get("answers", {}).items()}

    all_answered = dict.fromkeys(LENGTHS, "answered")
    checks: dict[str, bool] = {}
    if "unpatched-guarded" in servers:
        before = dict.fromkeys((1001, 5003, 8190, 8191), "answered")
        checks["unpatched dies, and not before a step of 8192"] = outcomes("unpatched-guarded") == {**before, 12000: "died"}
    if "patched-guarded" in servers:
        checks["patched answers all"] = outcomes("patched-guarded") == all_answered
    if {"patched-guarded", "unpatched"} <= servers.keys():
        both = [length for length, outcome in outcomes("unpatched").items() if outcome == "answered"]
        checks[f"greedy answers with and without the patch are equal at {both}"] = len(both) >= 4 and all(
            tokens("patched-guarded").get(length) == tokens("unpatched")[length] for length in both
        )
    if "uncured-captured" in servers:
        log = " ".join(servers["uncured-captured"]["log"])
        checks["captured without the cure refuses to start and names the kernel"] = (
            "answers" not in servers["uncured-captured"] and "in cutlass_moe_mm" in log
        )
    if "uncured-kept" in servers:
        checks["guarded without the cure answers all"] = outcomes("uncured-kept") == all_answered
    for check, held in checks.items():
        print(f"{'held' if held else 'NOT HELD'}: {check}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
