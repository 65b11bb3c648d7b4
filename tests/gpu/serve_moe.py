#!/usr/bin/env python3
"""`vllm serve` with vLLM's own MoE kernel and with the fused one: who serves what, memory, and greedy answers compared.

    serve_moe.py OUT.json [--model FOLDER] [--flags "..."] [--tables FOLDER] [--serial | --unprofiled]

Four servers of a 4-layer model of one TP8 rank's shapes, its weights made on the device:
  upstream, patched                two at a time on one card, KV cache of a fixed size: 20 prompts each, greedy; with --serial
                                   one by one: vLLM does not start where another program frees memory while it profiles;
                                   with --unprofiled at once, beside whatever else the card does: vLLM 0.11 and later can be
                                   told the size of its KV cache, and then profiles no memory
  upstream-memory, patched-memory  one after the other, without --num-gpu-blocks-override: stopped once the size of the
                                   KV cache is in the log

OUT.json has, of each: the log's lines on the kernel and its self-test, the size of the KV cache, and the answers; and of each
prompt: how many tokens are equal, and at the first that is not, how near the two best tokens were, in nats, on both sides.
Equal answers are not to be expected for ever: both kernels round, and at a near tie either token may win. Exit code 1 if a
check does not hold; the logs are beside OUT.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
from guarded_serve import Server, prompt_of

ROOT = Path(__file__).parents[2]
FLAGS = "--enforce-eager --enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000"
SHARED = "--gpu-memory-utilization 0.45 --num-gpu-blocks-override 2000"
UNPROFILED = "--gpu-memory-utilization 0.1 --kv-cache-memory-bytes 4000000000"
ALONE = "--gpu-memory-utilization 0.6"
LENGTHS = (1, 2, 3, 7, 16, 31, 32, 33, 64, 65, 127, 128, 500, 1024, 2047, 4096, 8190, 8191, 8192, 8193)
ANSWER = 24
NEAR = 0.25
"""Nats between the two best tokens that count as a near tie: the kernels differ by some 3 % in each of the layers."""
TELLING = (
    "vllm-glm-patch",
    "  fused-moe",
    "Fused MoE",
    "fused MoE",
    "Fp8 MoE backend",
    "FP8 MoE",
    "Warmed up",
    "illegal memory",
)
MEMORY = {
    "tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "GiB": r"Available KV cache memory: ([\d.]+) GiB",
}


def top_two(server: Server, prompt: list[int], model: str) -> dict[str, Any]:
    """The greedy answer, and at each token the distance to the second best, in nats."""
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "logprobs": 2}
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            told = json.load(response)["choices"][0]["logprobs"]
    except OSError as error:
        return {"outcome": "died", "text": str(error)}
    gaps = []
    for top in told["top_logprobs"]:
        values = sorted((top or {}).values(), reverse=True)
        gaps.append(round(values[0] - values[1], 5) if len(values) > 1 else None)
    return {"outcome": "answered", "tokens": told["tokens"], "logprobs": told["token_logprobs"], "gaps": gaps}


def compared(upstream: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """Two answers to one prompt: tokens that are equal, what lies between at the first that is not, and before it."""
    if "tokens" not in upstream or "tokens" not in patched:
        return {"outcome": "no answer"}
    equal = 0
    for one, other in zip(upstream["tokens"], patched["tokens"]):
        if one != other:
            break
        equal += 1
    apart = [abs(a - b) for a, b in zip(upstream["logprobs"][:equal], patched["logprobs"][:equal])]
    row: dict[str, Any] = {"equal": equal, "of": len(upstream["tokens"])}
    row["largest logprob difference before"] = round(max(apart), 5) if apart else None
    if equal < len(upstream["tokens"]):
        row["gap upstream"], row["gap patched"] = upstream["gaps"][equal], patched["gaps"][equal]
        row["near tie"] = row["gap upstream"] is not None and row["gap upstream"] <= NEAR
    return row


def serve(name: str, arguments: argparse.Namespace, flags: str, environment: dict[str, str], logs: Path) -> dict[str, Any]:
    """One server, from its start to its end."""
    server = Server(name, arguments.model, f"{arguments.flags} {flags}", environment, logs)
    row: dict[str, Any] = {"server": name, "command": server.command}
    try:
        if name.endswith("-memory"):
            row["start_seconds"] = wait_for_memory(server)
        else:
            row["start_seconds"] = round(server.wait_until_ready(360), 1)
            row["answers"] = {}
            for length in LENGTHS:
                row["answers"][length] = top_two(server, prompt_of(length), arguments.model)
                if row["answers"][length]["outcome"] == "died":
                    break
    except RuntimeError as error:
        row["error"] = str(error)
    finally:
        server.stop()
    text = server.log.read_text(errors="replace")
    row["log"] = server.lines(*TELLING)
    row["KV cache"] = {unit: found.group(1) for unit, pattern in MEMORY.items() if (found := re.search(pattern, text))}
    tested = re.search(r"passed its self-test.*?; ([\d.]+) s, and ([\d.]+) s for compiling", text)
    if tested:
        row["self_test_seconds"], row["compiling_seconds"] = float(tested.group(1)), float(tested.group(2))
    print(name, row.get("start_seconds"), row["KV cache"], *row["log"], sep="\n  ", flush=True)
    return row


def wait_for_memory(server: Server) -> float:
    """Wait until the log says how large the KV cache is."""
    started = time.time()
    while not re.search(MEMORY["tokens"], server.log.read_text(errors="replace")):
        if server.session.exit_code() is not None or time.time() - started > 360:
            raise RuntimeError(f"no size of the KV cache was told; see {server.log}")
        time.sleep(0.5)
    return round(time.time() - started, 1)


@contextlib.contextmanager
def package() -> Iterator[str]:
    """A Python path on which vLLM finds the plugin: as installed, or from this source tree."""
    path = os.environ.get("PYTHONPATH", "")
    try:
        importlib.metadata.version("vllm-glm-patch")
        yield path
    except importlib.metadata.PackageNotFoundError:
        with tempfile.TemporaryDirectory() as folder:
            info = Path(folder, "vllm_glm_patch-0.dist-info")
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-glm-patch\nVersion: 0\n")
            (info / "entry_points.txt").write_text("[vllm.general_plugins]\nglm_patch = vllm_glm_patch.plugin:register\n")
            yield os.pathsep.join([folder, str(ROOT), path])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="", help="folder of the model; made without weights unless given")
    parser.add_argument("--layers", default="4")
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--tables", default="", help="VLLM_GLM_PATCH_TUNED_DIR of the patched servers")
    parser.add_argument("--backend", default="auto", help="VLLM_GLM_PATCH_MOE of the patched servers")
    parser.add_argument("--only", default="", help="names of servers to run, separated by commas")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--serial", action="store_true", help="upstream and patched one after the other")
    order.add_argument("--unprofiled", action="store_true", help="both at once, with a KV cache whose size they are told")
    parser.add_argument("--stagger", type=float, default=40, help="seconds between two starts: profiling must not overlap")
    arguments = parser.parse_args()
    logs = arguments.out.parent.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    with package() as path:
        if not arguments.model:
            arguments.model = str(logs / "model")
            make = [sys.executable, "-m", "vllm_glm_patch", "model", arguments.model, "--preset", "tp8-rank", "--config-only"]
            variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), path])}
            if not Path(arguments.model).exists():
                subprocess.run([*make, "--layers", arguments.layers, "--format", "fp8"], check=True, env=variables)
            arguments.flags += " --load-format glm_patch_synthetic"
        patched = {"PYTHONPATH": path, "VLLM_GLM_PATCH_MOE": arguments.backend}
        if arguments.tables:
            patched["VLLM_GLM_PATCH_TUNED_DIR"] = arguments.tables
        sides = {"upstream": {"PYTHONPATH": path, "VLLM_GLM_PATCH": "0"}, "patched": patched}
        result = {"vllm": importlib.metadata.version("vllm"), "flags": arguments.flags, **children.run(children.machine)}
        wanted = [
            n for n in (*sides, "upstream-memory", "patched-memory") if not arguments.only or n in arguments.only.split(",")
        ]
        rows = []
        cache = UNPROFILED if arguments.unprofiled else SHARED
        with ThreadPoolExecutor(2) as pool:
            running = []
            for name in [n for n in wanted if n in sides]:
                running.append(pool.submit(serve, name, arguments, cache, sides[name], logs))
                if arguments.serial:
                    running[-1].result()
                elif len(running) == 1:
                    time.sleep(1 if arguments.unprofiled else arguments.stagger)
            rows = [one.result() for one in running]
        for name in [n for n in wanted if n.endswith("-memory")]:
            rows.append(serve(name, arguments, ALONE, sides[name.split("-")[0]], logs))
    result["servers"] = rows
    both = {row["server"]: row for row in rows}
    if set(sides) <= set(both):
        answers = [both[name].get("answers", {}) for name in sides]
        result["compared"] = {n: compared(answers[0].get(n, {}), answers[1].get(n, {})) for n in LENGTHS}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(report(result))


def report(result: dict[str, Any]) -> int:
    """Print whether each thing is as it should be; 1 if one is not."""
    servers = {server["server"]: server for server in result["servers"]}
    checks: dict[str, bool] = {}

    def said(name: str, text: str) -> bool:
        return any(re.search(text, line) for line in servers[name]["log"])

    for name, server in servers.items():
        if not name.endswith("-memory"):
            told = server.get("answers", {})
            checks[f"{name} answers all prompts"] = sum(a["outcome"] == "answered" for a in told.values()) == len(LENGTHS)
    if "upstream" in servers:
        checks["the fused kernel is not in the unpatched server"] = not said("upstream", "Fused MoE")
    if "patched" in servers:
        checks["the patched server says which counts the kernel serves"] = said(
            "patched", r"Fused MoE: \d+ of \d+ MoE layers served"
        )
        checks["the self-test took less than a second"] = servers["patched"].get("self_test_seconds", 9.0) < 1.0
    if "compared" in result:
        for length, row in result["compared"].items():
            print(f"prompt of {length}: {row}")
        rows = result["compared"].values()
        checks["every first difference of two answers is at a near tie"] = all(
            "equal" in row and row.get("near tie", True) for row in rows
        )
    if {"upstream-memory", "patched-memory"} <= set(servers):
        sizes = [int(servers[n]["KV cache"].get("tokens", "0").replace(",", "")) for n in ("upstream-memory", "patched-memory")]
        print(f"KV cache: {sizes[0]} tokens with vLLM's kernel, {sizes[1]} with the fused one")
        checks["the KV cache is larger with the fused kernel"] = 0 < sizes[0] < sizes[1]
    for check, held in checks.items():
        print(f"{'held' if held else 'NOT HELD'}: {check}")
    return 0 if checks and all(checks.values()) else 1


if __name__ == "__main__":
    main()
