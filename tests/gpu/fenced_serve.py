#!/usr/bin/env python3
"""`vllm serve` under the fence with PyTorch's own rounding (--align 512), nothing else changed.

    fenced_serve.py MODEL OUT.json SERVER [SERVER ...] [--lengths 8191,8190,8192,8192] [--flags "..."] [--launches]

A length given more than once is asked with another prompt each time: 8192 tokens over-read only where the last expert's
rows are no multiple of 16, which one prompt in 16 spares in a model with one MoE layer.
SERVER is a name and its environment: `upstream:VLLM_GLM_PATCH=0`, `patched`. A server named plain-... has no fence.
--launches waits for every launch, so that the one that faults is named also where the driver writes no core dump.
Writes answers, start-up time, tokens a second of a short decode, the fence's report; after each answer what there is so far.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib.metadata
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import children
from guarded_serve import FLAGS, TELLING, Server, prompt_of

from vllm_glm_patch.fence import Options, command, dumping, xid
from vllm_glm_patch.fence.report import FaultReport, reports


class Result:
    """The file of all servers, written again whenever one has something new: a session on a card may end at any time."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self._file, self._facts, self._lock = file, facts, threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}

    def put(self, row: dict[str, Any]) -> None:
        """What is known of a server by now. Copied, since its thread goes on with it."""
        copied = copy.deepcopy(row)
        with self._lock:
            self._rows[row["server"]] = copied
            content = json.dumps({**self._facts, "servers": list(self._rows.values())}, indent=1, default=str)
            self._file.write_text(content + "\n")


def serve(text: str, arguments: argparse.Namespace, logs: Path, result: Result) -> None:
    name, _, settings = text.partition(":")
    environment = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
    folder = logs / f"fence-{name}"
    if not name.startswith("plain"):
        folder.mkdir(exist_ok=True)
        options = Options(align=512, stacks=True, launches=arguments.launches, directory=str(folder))
        fenced = command.environment(options, os.environ)
        environment = {**{k: v for k, v in fenced.items() if os.environ.get(k) != v}, **environment}
    log = xid.KernelLog()
    server = Server(name, arguments.model, arguments.flags, environment, logs)
    row: dict[str, Any] = {"server": name, "fence": not name.startswith("plain"), "command": server.command, "answers": {}}
    row["environment"] = settings
    try:
        row["start_seconds"] = round(server.wait_until_ready(400), 1)
        lengths = [int(length) for length in arguments.lengths.split(",")]
        for index, length in enumerate(lengths):
            before = lengths[:index].count(length)
            asked = f"{length} #{before + 1}" if lengths.count(length) > 1 else str(length)
            row["answers"][asked] = server.ask(prompt_of(length, before), arguments.model)
            print(name, asked, row["answers"][asked], flush=True)
            row["log"] = server.lines(*TELLING)
            result.put(row)
            if row["answers"][asked]["outcome"] == "died":
                break
        else:
            started = time.time()
            server.ask(prompt_of(1001), arguments.model, 200)
            row["decode_tokens_per_second"] = round(200 / (time.time() - started), 1)
    except RuntimeError as error:
        row["error"] = str(error)
    finally:
        if row["answers"] and list(row["answers"].values())[-1]["outcome"] == "died":
            row["seconds_of_dump"] = _wait_for_dumps(folder)
        server.stop()
    row["log"] = server.lines(*TELLING)
    row["reports"] = [_report(found) for found in reports(folder, log)] if row["fence"] else []
    row["kernel_log"] = log.problem or [fault.line for fault in log.faults()]
    log.close()
    print(*row["log"], *[r["text"] for r in row["reports"]], sep="\n", flush=True)
    result.put(row)


def _wait_for_dumps(folder: Path) -> float:
    """Seconds until the driver has written its core dumps, or no longer does."""
    began = time.monotonic()
    while time.monotonic() - began < 10 and not list(folder.glob("core-*")):
        time.sleep(0.5)
    for core in folder.glob("core-*"):
        dumping.wait(core)
    return round(time.monotonic() - began, 1)


def _report(found: FaultReport) -> dict[str, Any]:
    return {"text": found.text(), **found.as_dict(), "transcript": found.dump.transcript[:6000]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("servers", nargs="+")
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--lengths", default="8191,8190,8191,8190,8191,8190,8192,8192,8192,8193,12000,16384")
    parser.add_argument("--launches", action="store_true", help="wait for every launch and name the one that faults")
    parser.add_argument("--stagger", type=float, default=60)
    arguments = parser.parse_args()
    logs = arguments.out.parent.resolve()
    facts = {"vllm": importlib.metadata.version("vllm"), "flags": arguments.flags, **children.run(children.machine)}
    result = Result(arguments.out, facts)
    with concurrent.futures.ThreadPoolExecutor(len(arguments.servers)) as pool:
        running = []
        for text in arguments.servers:
            running.append(pool.submit(serve, text, arguments, logs, result))
            time.sleep(arguments.stagger)
        for one in running:
            one.result()


if __name__ == "__main__":
    sys.exit(main())
