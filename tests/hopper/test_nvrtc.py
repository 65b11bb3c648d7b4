"""NVRTC: found where torch's distributions put it, and the kernels' sources compile with it to what abi.h says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hopper_host import CSRC, ROOT, argument_sizes, cubin_arguments, table

from vllm_glm_patch.moe.hopper import library
from vllm_glm_patch.moe.hopper.errors import HopperError
from vllm_glm_patch.moe.hopper.nvrtc import Nvrtc, candidates


def found_here() -> list[Path]:
    """NVRTCs on this machine: those VGP_TEST_NVRTC names, separated by colons, and those beside an installed torch."""
    named = [Path(path) for path in os.environ.get("VGP_TEST_NVRTC", "").split(os.pathsep) if path]
    torch = importlib.util.find_spec("torch")
    beside = list(Path(torch.origin).parent.parent.glob("nvidia/*/lib/libnvrtc.so.*")) if torch and torch.origin else []
    return named + [path for path in beside if path.suffix in (".12", ".13")]


def needs_nvrtc(path: Path | None) -> Nvrtc:
    if path is None:
        pytest.skip("no NVRTC: name some in VGP_TEST_NVRTC, or install nvidia-cuda-nvrtc")
    return Nvrtc(str(path))


any_nvrtc = pytest.mark.parametrize("path", found_here() or [None], ids=str)


def place(root: Path, *names: str) -> Path:
    """Files of these names under site-packages; returns torch's folder there."""
    for name in ("torch/__init__.py", *names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root / "torch"


@pytest.mark.parametrize(
    ("cuda", "there", "wanted"),
    [
        # torch 2.7.1+cu126, torch 2.11+cu130, and the builds of download.pytorch.org that carry it themselves
        ("12.6", ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"], ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]),
        ("13.0", ["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cu13/lib/libnvrtc.alt.so.13"], ["nvidia/cu13/lib/libnvrtc.so.13"]),
        ("12.1", ["torch/lib/libnvrtc-b51b459d.so.12"], ["torch/lib/libnvrtc-b51b459d.so.12"]),
        # both majors installed: the one that torch was built for
        (
            "13.0",
            ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13"],
            ["nvidia/cu13/lib/libnvrtc.so.13"],
        ),
        ("12.6", ["nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.6"], []),
        ("13.0", [], []),
    ],
)
def test_it_is_looked_for_where_torchs_distributions_put_it(cuda: str, there: list[str], wanted: list[str], tmp_path) -> None:
    torch = place(tmp_path, *there)
    assert list(candidates(torch, cuda)) == [tmp_path / name for name in wanted]


def test_a_file_that_is_no_nvrtc_is_named(tmp_path: Path) -> None:
    (tmp_path / "libnvrtc.so.12").write_text("no library")
    with pytest.raises(HopperError, match=r"NVRTC .*libnvrtc\.so\.12 cannot be loaded.*Reinstall torch"):
        Nvrtc(str(tmp_path / "libnvrtc.so.12"))


def test_the_sources_and_their_flags_are_read() -> None:
    sources = library.read_sources(CSRC)
    assert {row.source for row in table()} <= set(sources)
    assert library.flags_of(sources) == ("--gpu-architecture=sm_90a", "--std=c++17")
    assert library.abi_of(sources) == int(sources["abi.h"].partition("abi_version = ")[2].partition(";")[0]) > 0


def test_an_installation_without_sources_says_so(tmp_path: Path) -> None:
    (tmp_path / "abi.h").touch()
    with pytest.raises(HopperError, match=r"has no flags\.txt\. Reinstall"):
        library.read_sources(tmp_path)


@any_nvrtc
def test_all_sources_compile_to_the_kernels_of_abi_h(path: Path | None, tmp_path: Path) -> None:
    nvrtc = needs_nvrtc(path)
    images = library.compiled(nvrtc, library.read_sources(CSRC), tmp_path)
    assert images.abi == library.abi_of(library.read_sources(CSRC))
    assert images.compiler == nvrtc.identity
    arguments = {}
    for source in {row.source for row in table()}:
        arguments |= cubin_arguments(images.files[source])
    assert arguments == {row.name: argument_sizes()[row.family] for row in table()}


@any_nvrtc
def test_what_it_refuses_comes_with_the_compilers_log(path: Path | None) -> None:
    nvrtc = needs_nvrtc(path)
    with pytest.raises(
        HopperError, match=r"cannot compile broken\.cu: NVRTC_ERROR_COMPILATION.*\n.*undefined_thing"
    ) as refused:
        nvrtc.compile("broken.cu", "__global__ void f() { undefined_thing(); }", {}, ["--gpu-architecture=sm_90a"])
    assert nvrtc.path in str(refused.value)


@any_nvrtc
def test_the_same_source_gives_the_same_cubin(path: Path | None) -> None:
    nvrtc = needs_nvrtc(path)
    sources = library.read_sources(CSRC)
    headers = {name: text for name, text in sources.items() if name.endswith((".h", ".cuh"))}
    options = (*library.flags_of(sources), *library.NVRTC_FLAGS)
    one, two = (nvrtc.compile("topk_sum.cu", sources["topk_sum.cu"], headers, options) for _ in range(2))
    assert one == two


@any_nvrtc
def test_it_is_found_beside_a_torch_and_compiles(path: Path | None, tmp_path: Path) -> None:
    """In a process whose torch is a stand-in with this NVRTC where torch's distribution of its CUDA version has it."""
    nvrtc = needs_nvrtc(path)
    folder = "nvidia/cuda_nvrtc/lib" if nvrtc.version[0] < 13 else f"nvidia/cu{nvrtc.version[0]}/lib"
    version = ".".join(map(str, nvrtc.version))
    torch = place(tmp_path)
    (torch / "__init__.py").write_text(f"__version__ = '2'\nclass version:\n    cuda = {version!r}\n")
    (tmp_path / folder).parent.mkdir(parents=True)
    (tmp_path / folder).symlink_to(Path(nvrtc.path).parent)
    code = (
        "import pathlib; from vllm_glm_patch.moe.hopper import library; from vllm_glm_patch.moe.hopper.nvrtc import find;"
        f"nvrtc = find(); images = library.compiled(nvrtc, library.read_sources(pathlib.Path({str(CSRC)!r})),"
        f" pathlib.Path({str(tmp_path / 'cache')!r})); print(nvrtc.path, *images.files)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, *sources = done.stdout.split()
    assert found.startswith(str(tmp_path / folder))
    assert set(sources) == {row.source for row in table()}
