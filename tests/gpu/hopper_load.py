#!/usr/bin/env python3
"""The Hopper launcher on a real card: cubins load, a kernel runs and is captured, NVRTC compiles once for 8 processes.

hopper_load.py OUT.json [NVRTC ...]     vllm_glm_patch from its wheel, built with nvcc; the torch that is there brings NVRTC,
                                        and others may be named, such as the libnvrtc.so.12 of another torch

Each case runs in a child. `topk_sum`, whose result torch knows bit for bit, stands for all kernels; the whole layer is then
compared with float64 for each default configuration. COMMIT names the commit in what is written.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children

HIDDEN, TOP_K, EXPERTS = 5120, 8, 160


def sum_case(native: Any, tokens: int, seed: int = 1) -> tuple[Callable[[], None], Any, Any, Any]:
    """(launch of topk_sum on the current stream, its partial sums, its output, a function for what torch makes of them)."""
    import torch

    from vllm_glm_patch.moe.hopper.native import Layer, numbers

    torch.manual_seed(seed)
    partial = torch.randn(tokens * TOP_K, HIDDEN, device="cuda").bfloat16()
    ids = torch.randint(0, EXPERTS + 1, (tokens * TOP_K,), dtype=torch.int32, device="cuda")  # EXPERTS: none here
    out = torch.full((tokens, HIDDEN), float("nan"), dtype=torch.bfloat16, device="cuda")
    layer = Layer(partial=partial.data_ptr(), local_ids=ids.data_ptr(), out=out.data_ptr(), tokens_count=tokens)
    layer.hidden_size, layer.intermediate_size, layer.experts, layer.top_k, layer.programmatic = HIDDEN, 192, EXPERTS, TOP_K, 1
    kernel = numbers(native.by_name["glm_topk_sum"])

    def launch() -> None:
        native.run(0, torch.cuda.current_stream().cuda_stream, layer, kernel)

    def expected() -> Any:
        total = torch.zeros(tokens, HIDDEN, device="cuda")
        for choice in range(TOP_K):
            real = (ids.view(tokens, TOP_K)[:, choice] < EXPERTS).unsqueeze(1)
            total = torch.where(real, total + partial.view(tokens, TOP_K, HIDDEN)[:, choice].float(), total)
        return total.bfloat16()

    return launch, partial, out, expected


def check_sums(native: Any) -> None:
    import torch

    for tokens in (1, 3, 1000):
        launch, _, out, expected = sum_case(native, tokens)
        launch()
        if not torch.equal(out, expected()):
            raise AssertionError(f"topk_sum of {tokens} tokens is not what torch makes of it")


def load_packaged() -> dict[str, Any]:
    """The wheel's cubins: loaded, right, and what they take."""
    from vllm_glm_patch.moe.hopper import library

    images = library.packaged()
    if images is None:
        raise AssertionError("this wheel carries no cubins; build it where there is an nvcc")
    loader = library.loader()
    begin = time.perf_counter()
    native = loader.on(0)
    taken = time.perf_counter() - begin
    check_sums(native)
    resources = {kernel.name: native.resources(0, kernel).__dict__ for kernel in native.kernels}
    return {
        "compiler": loader.compiler(0),
        "used_the_wheels": loader.compiler(0) == images.compiler,
        "load_ms": round(1e3 * taken, 1),
        "resources": resources,
        "machine": children.machine(),
    }


def refused_image() -> dict[str, Any]:
    """What this driver says of an image that is none: its code has to be one of library.REFUSALS."""
    import torch

    from vllm_glm_patch.moe.hopper import library
    from vllm_glm_patch.moe.hopper.native import Native

    torch.cuda.init()
    native = Native()
    native.open()
    images = library.packaged()
    assert images is not None
    said = {}
    cubin = images.files["topk_sum.cu"]
    # An ELF of another CUDA ABI is what a driver older than the toolkit sees.
    for name, image in {
        "text": b"no cubin at all" * 9,
        "other ABI": cubin[:8] + b"\xff" + cubin[9:],
        "cut": cubin[:64],
    }.items():
        try:
            native.load(0, "topk_sum.cu", image)
            said[name] = {"code": 0, "refused": False}
        except library.HopperError as error:
            said[name] = {"code": error.code, "refused": error.code in library.REFUSALS, "text": str(error)}
    native.load(0, "topk_sum.cu", cubin)
    check_sums(native)
    return {"said": said}


def overhead() -> dict[str, Any]:
    """Host µs of a call, and device µs of a launch in a graph."""
    import torch

    from vllm_glm_patch.moe.hopper.library import loader
    from vllm_glm_patch.moe.timing import median_us

    native = loader().on(0)
    small, large = sum_case(native, 1), sum_case(native, 8192)  # with their tensors, of which the launches have addresses
    launch = small[0]

    def host_us(calls: int = 200) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                launch()
            times.append(1e6 * (time.perf_counter() - begin) / calls)
        return round(statistics.median(times), 2)

    return {
        "host_us_one_launch": host_us(),
        "graph_us_one_launch_1_token": round(median_us([launch] * 100), 2),
        "graph_us_one_launch_8192_tokens": round(median_us([large[0]] * 5), 2),
        "cache": native.cache_stats().__dict__,
    }


def graph() -> dict[str, Any]:
    """Captured and replayed on other data; and the kernels loaded while a graph is being captured."""
    import torch

    from vllm_glm_patch.moe.hopper.library import loader

    torch.zeros(1, device="cuda")
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        native = loader().on(0)  # nothing was loaded before
    launch, partial, out, expected = sum_case(native, 64)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        launch()
    if not out.isnan().all():
        raise AssertionError("the captured kernel ran while it was captured")
    for seed in range(3):
        torch.manual_seed(seed)
        partial.copy_(torch.randn_like(partial.float()).bfloat16())
        captured.replay()
        if not torch.equal(out, expected()):
            raise AssertionError(f"replay {seed} gives other sums")
    return {"loaded_in_a_capture": True, "replays": 3}


def nvrtc_child(go: str, path: str) -> dict[str, Any]:
    """One of 8: the kernels compiled by torch's NVRTC or the one named, out of the shared cache, loaded and right."""
    import torch

    from vllm_glm_patch.moe.hopper import cache, library
    from vllm_glm_patch.moe.hopper.native import Native
    from vllm_glm_patch.moe.hopper.nvrtc import Nvrtc, find

    torch.zeros(1, device="cuda")
    nvrtc, native, made = Nvrtc(path) if path else find(), Native(), []
    compile_one = nvrtc.compile

    def counted(name: str, *rest: Any) -> bytes:
        made.append(name)
        return compile_one(name, *rest)

    nvrtc.compile = counted  # type: ignore[method-assign]
    print("ready", flush=True)
    while not Path(go).exists():
        time.sleep(0.001)
    begin = time.perf_counter()
    loader = library.Loader(native, None, lambda: library.compiled(nvrtc, library.read_sources(), cache.root()))
    loader.on(0)
    seconds = time.perf_counter() - begin
    check_sums(native)
    return {"nvrtc": nvrtc.path, "compiler": loader.compiler(0), "seconds": round(seconds, 2), "compiled": len(made)}


def nvrtc_for_eight(path: str = "") -> dict[str, Any]:
    """Eight processes at once, then one more, over an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "VLLM_GLM_PATCH_CACHE": f"{folder}/cache"}

        def start(go: str) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, "--nvrtc-child", go, path]
            return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

        def answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
            said = worker.communicate()[0]
            if worker.returncode:
                raise AssertionError(f"a worker ended with {worker.returncode}; its error is above")
            return json.loads(said.splitlines()[-1])

        workers = [start(f"{folder}/go") for _ in range(8)]
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()  # «ready»: torch is imported, the card is taken
        Path(folder, "go").touch()
        answers = [answer(worker) for worker in workers]
        again = answer(start(f"{folder}/go"))
    compiled = [answer["compiled"] for answer in answers]
    if sorted(compiled)[:-1] != [0] * 7 or max(compiled) == 0 or again["compiled"]:
        raise AssertionError(f"sources compiled by each of 8 processes: {compiled}, by a later one: {again['compiled']}")
    return {"eight": answers, "later": again}


def layers() -> dict[str, Any]:
    """Whole layers of one TP8 rank in their default configuration against float64, twice for the same bits, and captured.

    Times are of one input again and again, which flatters 1 and 2 tokens: their weights stay in L2.
    """
    import torch

    from vllm_glm_patch.moe.dispatch import read_card
    from vllm_glm_patch.moe.generators import make_inputs, make_weights
    from vllm_glm_patch.moe.hopper import backend
    from vllm_glm_patch.moe.pipeline import Tensors
    from vllm_glm_patch.moe.problem import Problem
    from vllm_glm_patch.moe.reference import fused_moe, relative_error
    from vllm_glm_patch.moe.timing import median_us

    weights = make_weights(Problem(1), torch.Generator("cuda").manual_seed(1))
    rows: dict[str, Any] = {}
    for tokens in (1, 2, 17, 64, 129, 1024, 4096, 8191, 8192):
        problem = Problem(tokens)
        reason = backend.why_not(problem, "cuda:0")
        if reason:
            raise AssertionError(reason)
        config = backend.default_config(problem)
        inputs = make_inputs(problem, 2, "spread", "cuda", weights)
        hidden, w13, w2, s13, s2, topk_weights, ids = inputs.positional()
        out = torch.full_like(hidden, float("nan"))
        tensors = Tensors(hidden, w13, w2, s13, s2, topk_weights, ids, None, out)
        workspace = torch.full((backend.workspace_bytes(problem, config),), 0xFF, dtype=torch.uint8, device="cuda")
        call = functools.partial(backend.run, problem, config, read_card(0), tensors, workspace)
        call()
        first = out.clone()
        error = relative_error(first, fused_moe(*inputs.positional()))
        microseconds = median_us([call])
        rows[str(tokens)] = {
            "config": config.__dict__,
            "relative_error": round(error, 5),
            "good": error < 0.025,
            "same_bits": bool(torch.equal(out, first)),
            "graph_us": round(microseconds, 1),
            "workspace": workspace.numel(),
        }
    wrong = {tokens: row for tokens, row in rows.items() if not (row["good"] and row["same_bits"])}
    if wrong:
        raise AssertionError(f"wrong at {', '.join(wrong)} tokens: {json.dumps(rows)}")
    return {"layers": rows, "cache": backend.loader().native.cache_stats().__dict__}


def within(seconds: int, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The case, in a process that ends where a kernel hangs: SIGALRM's own way, since Python may be waiting for the card."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    return case()


def main() -> int:
    if sys.argv[1] == "--nvrtc-child":
        print(json.dumps(nvrtc_child(*sys.argv[2:])))
        return 0
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "packaged": load_packaged,
        "refused_image": refused_image,
        "overhead": overhead,
        "graph": graph,
        "nvrtc": nvrtc_for_eight,
        **{f"nvrtc {path}": functools.partial(nvrtc_for_eight, path) for path in sys.argv[2:]},
        "layers": layers,
    }
    report: dict[str, Any] = {}
    for name, case in cases.items():
        report[name] = children.run(functools.partial(within, 120, case))
        print(name, json.dumps(report[name]), flush=True)
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(case["outcome"] != "ok" for case in report.values()))


if __name__ == "__main__":
    sys.exit(main())
