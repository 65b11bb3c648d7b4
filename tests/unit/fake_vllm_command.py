"""Stands in for the command `vllm`: `serve` answers like a server, `bench serve` like its client. No vLLM is needed.

FAKE_VLLM in the environment holds JSON: {"died": SIDE, "at": N} kills the server of that side at its Nth request,
{"unstartable": SIDE} lets it fail at start, {"missing": PACKAGE} lets the client lack a package.
Every call is added to the file FAKE_VLLM_CALLS names.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SIDE = "upstream" if os.environ.get("VLLM_GLM_PATCH") == "0" else "patched"
TROUBLE = json.loads(os.environ.get("FAKE_VLLM", "{}"))
FAULT = "RuntimeError: CUDA error: an illegal memory access was encountered"


def main() -> None:
    with Path(os.environ["FAKE_VLLM_CALLS"]).open("a") as calls:
        calls.write(json.dumps([SIDE if sys.argv[1] == "serve" else "client", *sys.argv[1:]]) + "\n")
    if sys.argv[1] == "serve":
        serve()
    else:
        bench()


def option(name: str, otherwise: str = "") -> str:
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(name)] if name in sys.argv else otherwise


def serve() -> None:
    print("INFO vLLM API server version 0.17.1", flush=True)
    if "--no-such-flag" in sys.argv:
        print("vllm: error: unrecognized arguments: --no-such-flag")
        sys.exit(2)
    if TROUBLE.get("unstartable") == SIDE:
        print("ValueError: No available memory for the cache blocks.")
        sys.exit(1)
    print("GPU KV cache size: 524,288 tokens", flush=True)
    print(f"cards {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    if SIDE == "patched":
        print("vllm-glm-patch 0.1.0 on vLLM 0.17.1", flush=True)
    served = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            nonlocal served
            with lock:
                served += 1
                if TROUBLE.get("died") == SIDE and served == TROUBLE["at"]:
                    print(f"SchedulerOutput(total_num_scheduled_tokens=8192)\n{FAULT}", flush=True)
                    os._exit(1)
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()


def is_answered() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", int(option("--port")), timeout=5)
    try:
        connection.request("POST", "/v1/completions", "{}")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def bench() -> None:
    if "missing" in TROUBLE:
        print(f"ModuleNotFoundError: No module named '{TROUBLE['missing']}'")
        sys.exit(1)
    time.sleep(float(TROUBLE.get("seconds", 0)))
    if not is_answered():
        print("ValueError: Initial test run failed")
        sys.exit(1)
    print("Starting main benchmark run...")
    done = sum(is_answered() for _ in range(int(option("--num-prompts"))))
    slow = 1.0 + float(option("--max-concurrency", "1")) / 10
    result = {"completed": done, "duration": 2.0, "total_input_tokens": 100 * done, "output_throughput": 50.0 / slow}
    result |= {
        f"{s}_{name}_ms": 10.0 * slow for s in ("mean", "median", "p90", "p99") for name in ("ttft", "tpot", "itl", "e2el")
    }
    (Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
