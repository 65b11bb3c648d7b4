"""The reproduction for upstream's tracker: short, of torch and vLLM alone, and it says what happened, as far as a CPU goes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "reproduce_8192.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# A grouped GEMM that faults as the card does: the last block of a segment, a multiple of 16 tokens, an affected release.
STAND_IN = """
import types, sys, torch

vllm = types.ModuleType("vllm")
vllm.__version__ = {version!r}
ops = types.ModuleType("vllm._custom_ops")
def cutlass_moe_mm(out_tensors, a_tensors, b_tensors, a_scales, b_scales, expert_offsets, problem_sizes, a_strides,
                   b_strides, c_strides, per_act_token, per_out_ch):
    rows = len(a_tensors)
    assert expert_offsets.dtype == (torch.int32 if vllm.__version__ < "0.10.2" else torch.int64)
    counts = problem_sizes[:, 0].tolist()
    assert sum(counts) == rows and expert_offsets.tolist() == [sum(counts[:i]) for i in range(len(counts))]
    assert all(row[1:] == [384, 5120] for row in problem_sizes.tolist())
    assert (tuple(out_tensors.shape), tuple(b_tensors.shape)) == ((rows, 384), (160, 384, 5120))
    assert tuple(b_scales.shape) == (160, 384, 1) and tuple(a_scales.shape) == (rows, 1)
    assert {{int(s[0]) for s in (a_strides, b_strides)}} == {{5120}} and int(c_strides[0]) == 384
    if vllm.__version__ < "0.20" and rows * 4 % 512 == 0 and counts[-1] % 16:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be")
ops.cutlass_moe_mm = cutlass_moe_mm
vllm._custom_ops = ops
sys.modules.update({{"vllm": vllm, "vllm._custom_ops": ops}})

# On the CPU, and without its big operands' contents.
def on_cpu(function):
    def call(*arguments, **keywords):
        if "device" in keywords:
            keywords["device"] = "cpu"
        return function(*arguments, **keywords)
    return call
for name in ("rand", "full", "empty", "randint"):
    setattr(torch, name, on_cpu(getattr(torch, name)))
torch.randint = lambda high, size, generator=None, device=None, dtype=None: torch.empty(size, dtype=dtype)
generator = torch.Generator
torch.Generator = lambda device: generator()
torch.cuda.synchronize = lambda: None
SEGMENT = 2 << 20
torch.Tensor.data_ptr = lambda self: 7 * SEGMENT - -(-self.numel() * 4 // 512) * 512
"""


def test_it_is_short() -> None:
    assert len(SOURCE.splitlines()) <= 70


def test_it_imports_torch_vllm_and_the_standard_library_alone() -> None:
    imported = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imported}
    assert roots - set(sys.stdlib_module_names) == {"torch", "vllm"}


def test_it_calls_the_grouped_gemm_with_the_twelve_arguments_of_every_affected_release() -> None:
    (call,) = [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and ast.unparse(n.func) == "ops.cutlass_moe_mm"]
    given = [ast.unparse(argument) for argument in call.args]
    assert given == ["out", "a", "b", "scales", "b_scales", "first", "sizes", "k", "k", "n", "True", "True"]


@pytest.mark.parametrize(
    ("version", "faults"), [("0.10.0", True), ("0.10.1.1", True), ("0.10.2", True), ("0.19.1", True), ("0.20.0", False)]
)
def test_it_faults_at_8192_on_an_affected_release_and_says_why(version: str, faults: bool) -> None:
    pytest.importorskip("torch")
    stand_in = STAND_IN.format(version=version)
    program = (
        f"{stand_in}\nimport runpy\nsys.argv = ['x', '8191', '8192']\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == int(faults), done.stderr
    assert f"vLLM {version}" in done.stdout
    assert "8191 tokens: 262112 bytes of scales, 32 bytes of rounding behind them: ok, 64 calls" in done.stdout
    if faults:
        assert "8192 tokens: 262144 bytes of scales, 0 bytes of rounding behind them: FAULT" in done.stdout
        assert "an illegal memory access was encountered\n" in done.stdout
        assert re.search(r"the scales end at (0x\w+), their segment at \1; up to 32 bytes behind them are loaded", done.stdout)


def test_the_report_has_what_a_tracker_asks_for() -> None:
    text = (DOCS / "upstream-report.md").read_text(encoding="utf-8")
    wanted = ("Cause", "Affected releases", "Reproduction", "Why the traceback points at Inductor", "What was not tried")
    assert [title for title in wanted if f"### {title}" not in text] == []
    assert f"{len(SOURCE.splitlines())} lines" in text
    assert {"#28776", "#26720", "#32467", "#43396", "#19631", "#27514", "#38571"} <= set(re.findall(r"#\d{4,}", text))
