"""csrc/hopper built by CMake and ninja as setup.py does: with nvcc the cubins and their manifest, without it a note."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hopper_host import CSRC, ROOT, argument_sizes, cubin_arguments, nvcc, table

from vllm_glm_patch.moe.hopper import library
from vllm_glm_patch.moe.hopper.errors import HopperError
from vllm_glm_patch.moe.hopper.native import Native


def build(where: Path, compiler: str) -> tuple[Path, str]:
    """(the package's folder as installed, what CMake said)."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    out, installed = str(where / "build"), where / "installed"
    configure = [
        "cmake",
        "-S",
        str(CSRC),
        "-B",
        out,
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DGLM_HOPPER_NVCC={compiler}",
    ]
    said = ""
    for command in (configure, ["cmake", "--build", out], ["cmake", "--install", out, "--prefix", str(installed)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said += done.stdout + done.stderr
        assert done.returncode == 0, said
    return installed / "moe/hopper", said


def test_with_nvcc_the_package_has_cubins_of_every_kernel(tmp_path: Path) -> None:
    package, said = build(tmp_path, nvcc())
    assert "glm_hopper: cubins by nvcc " in said
    native = Native(package / "libglm_hopper.so")
    images = library.packaged(package / "cubin")
    assert images is not None
    assert images.compiler.startswith("nvcc 1")
    assert images.abi == native.abi_version
    assert set(images.files) == set(native.sources)
    arguments = {}
    for cubin in images.files.values():
        arguments |= cubin_arguments(cubin)
    assert arguments == {row.name: argument_sizes()[row.family] for row in table()}
    assert library.read_sources(package / "source") == library.read_sources(CSRC)
    (package / "cubin/topk_sum.cubin").write_bytes(b"damaged")
    with pytest.raises(HopperError, match="are not as their manifest"):
        library.packaged(package / "cubin")


def test_without_nvcc_there_is_a_note_and_the_sources_for_nvrtc(tmp_path: Path) -> None:
    package, said = build(tmp_path, "none")
    assert "the wheel carries no cubins" in " ".join(said.split())
    assert library.packaged(package / "cubin") is None
    assert {row.source for row in table()} <= set(library.read_sources(package / "source"))
    assert len(Native(package / "libglm_hopper.so").kernels) == len(table())


def find_nvcc(tmp_path: Path, **environment: str) -> str:
    """What setup.py's find_nvcc answers in this environment, in a Python whose packages are those under tmp_path."""
    code = "import runpy, setuptools; setuptools.setup = lambda **k: None; print(runpy.run_path('setup.py')['find_nvcc']())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path / "bin"), **environment}
    env = {name: value for name, value in env.items() if name not in ("CUDA_HOME", "CUDA_PATH")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.strip()


def test_the_package_of_nvcc_is_found_and_the_systems_goes_first(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    packaged, system = tmp_path / "nvidia/cu13/bin/nvcc", tmp_path / "toolkit/bin/nvcc"
    for file in (packaged, system):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    assert find_nvcc(tmp_path, GLM_HOPPER_NVCC="package") == str(packaged)
    assert find_nvcc(tmp_path, CUDA_HOME=str(tmp_path / "toolkit")) == str(system)
    assert find_nvcc(tmp_path, CUDA_HOME=str(tmp_path / "toolkit"), GLM_HOPPER_NVCC="none") == "none"


@pytest.mark.parametrize(("chosen", "wanted"), [("package", True), ("none", False), ("", False)])
def test_the_build_asks_for_nvccs_package_only_where_that_is_chosen(chosen: str, wanted: bool, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "patches").mkdir()
    (tmp_path / "vllm_glm_patch").mkdir()
    (tmp_path / "vllm_glm_patch/__init__.py").touch()
    shutil.copy(ROOT / "vllm_glm_patch/version.py", tmp_path / "vllm_glm_patch")
    code = "import setuptools.build_meta as backend; print('asked', *backend.get_requires_for_build_wheel())"
    env = {**os.environ, "GLM_HOPPER_NVCC": chosen}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, text=True, capture_output=True, check=True)
    asked = [line for line in done.stdout.splitlines() if line.startswith("asked")][-1]
    assert [name in asked for name in ("nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*")] == [wanted, wanted]
