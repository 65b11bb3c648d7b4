"""A small stand-in for vLLM, with functions of our own where the patches expect vLLM's, and a catalog that fits it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from vllm_glm_patch import catalog
from vllm_glm_patch.upstream import fingerprint

FILES = {
    "__init__.py": '__version__ = "{version}"\n',
    "envs.py": "environment_variables = {{}}\n",
    "_custom_ops.py": """
import torch

seen = []


def cutlass_moe_mm(out_tensors, a_tensors, b_tensors, a_scales, b_scales, expert_offsets, problem_sizes,
                   a_strides, b_strides, c_strides, per_act_token, per_out_ch):
    "The grouped GEMM."
    seen.append(a_scales)
    return out_tensors


def scaled_fp8_quant(input, scale=None, num_token_padding=None, scale_ub=None, use_per_token_if_dynamic=False,
                     output=None):
    rows = max(num_token_padding or 0, input.shape[0])
    if output is None:
        output = torch.zeros(rows, input.shape[1])
    scales = torch.ones(rows, 1) if use_per_token_if_dynamic else torch.ones(1)
    return output, scales
""",
    "v1/core/sched/scheduler.py": """
class Scheduler:
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
        self.scheduler_config = vllm_config.scheduler_config
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_num_scheduled_tokens = self.scheduler_config.max_num_batched_tokens
""",
    "v1/worker/gpu_worker.py": """
class Worker:
    def compile_or_warm_up_model(self):
        return "warm"

    def determine_available_memory(self):
        return 4096
""",
    "v1/worker/cpu_worker.py": """
class CPUWorker:
    def compile_or_warm_up_model(self):
        return "warm"
""",
    "model_executor/layers/fused_moe/cutlass_moe.py": """
calls = []


def run_cutlass_moe_fp8(output, hidden_states, topk_ids, global_num_experts, expert_map, a1q_scale, use_batched_format,
                        topk_weights):
    calls.append((topk_ids, topk_weights, a1q_scale))


class CutlassExpertsFp8Base:
    def apply(self, output, hidden_states, topk_weights, topk_ids, global_num_experts, expert_map, a1q_scale,
              apply_router_weight_on_input):
        calls.append((topk_ids, topk_weights, a1q_scale))
        output.fill_(1)
""",
    "model_executor/layers/fused_moe/modular_kernel.py": """
class FusedMoEModularKernel:
    def forward(self, hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu",
                global_num_experts=-1, expert_map=None, apply_router_weight_on_input=False):
        return "vLLM's"


class FusedMoEKernel:
    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              apply_router_weight_on_input, shared_experts_input=None):
        return "vLLM's"
""",
    "engine/arg_utils.py": """
class EngineArgs:
    def __init__(self, additional_config=None):
        self.additional_config = additional_config or {{}}

    def create_engine_config(self):
        return "config"
""",
}


def write(folder: Path, version: str) -> Path:
    """Write the package `vllm` into `folder` and return it."""
    for name, text in FILES.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.parent.relative_to(folder).parents:
            (folder / parent / "__init__.py").touch() if str(parent) != "." else None
        (file.parent / "__init__.py").touch()
        file.write_text(text.format(version=version))
    return folder / "vllm"


def write_catalog(folder: Path, package: Path, releases: tuple[str, ...]) -> Path:
    """The real catalog, with the fingerprints of the fake package in the place of vLLM's."""
    folder.mkdir()
    (folder / "releases.toml").write_text(f"releases = {list(releases)!r}\n")
    for file in sorted(catalog.folder().glob("*.toml")):
        if file.stem == "releases":
            continue
        text = file.read_text().split("# Made by")[0]
        lines = [text]
        patch = next(p for p in catalog.patches() if p.id == file.stem)
        for key in {(site.module, site.name) for site in patch.sites}:
            source = package.joinpath(*key[0].split(".")[1:]).with_suffix(".py")
            found = fingerprint(source.read_text(), key[1]) if source.exists() else None
            if found:
                lines.append(f'[fingerprints."{key[0]}:{key[1]}"]\n{found} = ["{releases[0]}"]\n')
        (folder / file.name).write_text("".join(lines))
    return folder


def load(name: str) -> ModuleType:
    """Import a module of the fake package."""
    return importlib.import_module(name)


def forget() -> None:
    """Take every module of vLLM out of this process."""
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        del sys.modules[name]


@contextmanager
def installed(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake vLLM on the import path with a fitting catalog; yields the folder of the catalog."""
    package = write(folder, version)
    files = write_catalog(folder / "catalog", package, ("0.10.0", "0.10.1.1", "0.11.0", "0.19.1", "0.33.0"))
    monkeypatch.setattr(catalog, "folder", lambda: files)
    monkeypatch.syspath_prepend(str(folder))
    catalog.releases.cache_clear()
    forget()
    load("vllm")
    try:
        yield files
    finally:
        forget()
        catalog.releases.cache_clear()
