#!/usr/bin/env python3
"""The fence on a real card: a planted over-read is pinned and named, and ordinary work goes on as usual.

fence_checks.py OUT.json          any torch with Triton; vllm_glm_patch installed from its wheel
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children

from vllm_glm_patch.fence.coredump import read_core_dump

OVER_READ = """
import torch, triton, triton.language as tl
@triton.jit
def reads_past_the_end(p, out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(p + n + tl.arange(0, BLOCK)))
x = torch.zeros(8192, device="cuda")
out = torch.zeros(8, device="cuda")
reads_past_the_end[(1,)](x, out, 8192, BLOCK=8)
torch.cuda.synchronize()
"""

# As a faulted server: no core dump. What names the kernel is the launch.
NO_DUMP = 'import os\nos.environ["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] = "0"' + OVER_READ

OUT_OF_MEMORY = """
import torch
try:
    torch.empty(1 << 40, device="cuda")
except torch.OutOfMemoryError as error:
    print("caught", str(error)[:160])
torch.ones(1 << 20, device="cuda").sum().item()
free, total = torch.cuda.mem_get_info()
blocks = []
try:
    while True:
        blocks.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    print("filled", len(blocks), "GiB of", round(free / 2**30, 1))
del blocks
torch.ones(1 << 28, device="cuda").sum().item()
"""

GRAPHS = """
import torch
torch.manual_seed(0)
a, b = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
def work(i):
    return torch.softmax((a + i) @ b, -1)
expected = [work(i) for i in range(3)]
pool = torch.cuda.graph_pool_handle()
graphs, results = [], []
for i in range(3):
    work(i); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results.append(work(i))
    graphs.append(graph)
torch.cuda.empty_cache()
for _ in range(100):
    for i, graph in enumerate(graphs):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(results[i], expected[i])
held = torch.cuda.memory_stats()["fence.graph_bytes"]
del graph, graphs, results
import gc; gc.collect()
torch.cuda.empty_cache()
left = torch.cuda.memory_stats()["fence.graph_bytes"]
print("graph bytes", held, "then", left)
assert held > 0 and left == 0
"""

STREAMS = """
import torch
side = torch.cuda.Stream()
for i in range(500):
    x = torch.full((1 << 18,), float(i), device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    x.record_stream(side)
    del x
    z = torch.full((1 << 18,), -1.0, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert y.eq(2.0 * i).all(), i
    del y, z
print("500 rounds")
"""

SPEED = """
import time, torch
torch.empty(1000, device="cuda")
start = time.perf_counter()
for _ in range(10000):
    torch.empty(1000, device="cuda")
torch.cuda.synchronize()
print("us an allocation", round((time.perf_counter() - start) * 100, 2))
"""


def run(name: str, code: str, fails: bool = False, **options: Any) -> dict[str, Any]:
    """Run `code` in a Python of its own under the fence."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, f"{name}.py")
        script.write_text(code)
        given = {"align": 512, "directory": str(Path(folder, "fence")), **options}
        launch = (
            "import sys; from vllm_glm_patch.fence import command, Options;"
            f"sys.exit(command.run([sys.executable, {str(script)!r}], Options(**{given!r})))"
        )
        started = time.time()
        done = subprocess.run([sys.executable, "-c", launch], capture_output=True, text=True, check=False, timeout=200)
        text = (done.stdout + done.stderr)[-3000:]
        report = Path(folder, "fence", "report.json")
        row = {"check": name, "options": options, "exit": done.returncode, "seconds": round(time.time() - started, 1)}
        row |= {"output": text, "held": (done.returncode != 0) == fails}
        if report.is_file():
            row["report"] = json.loads(report.read_text())
            for core in Path(folder, "fence").glob("core-*"):
                with contextlib.suppress(OSError, RuntimeError):  # the report says why
                    row["transcript"] = read_core_dump(core).transcript[:6000]
    print(name, options, "held" if row["held"] else "NOT HELD", text, flush=True)
    return row


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = [run("over-read", OVER_READ, fails=True, stacks=True)]
    told = rows[0]["output"]
    rows[0]["held"] = rows[0]["held"] and "reads_past_the_end" in told and "32768" in told and "over-read.py" in told
    rows.append(run("launches", NO_DUMP, fails=True, stacks=True, launches=True))
    told = rows[1]["output"]
    named = ("kernel       reads_past_the_end", "32768 bytes", "launches.py:9", "launch       number")
    rows[1]["held"] = rows[1]["held"] and all(part in told for part in named)
    rows.append(run("graphs", GRAPHS, launches=True))
    rows += [run("graphs", GRAPHS), run("graphs", GRAPHS, poison="both"), run("streams", STREAMS, cache_mb=0, poison="both")]
    rows += [run("out-of-memory", OUT_OF_MEMORY), run("speed", SPEED), run("speed", SPEED, cache_mb=0)]
    plain = subprocess.run([sys.executable, "-c", SPEED], capture_output=True, text=True, check=False)
    rows.append({"check": "speed", "options": "no fence", "output": plain.stdout, "held": plain.returncode == 0})
    print(plain.stdout)
    result = {**children.run(children.machine), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if all(row["held"] for row in rows) else 1)


if __name__ == "__main__":
    main()
