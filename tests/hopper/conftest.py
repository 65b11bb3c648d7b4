"""Builds the emulator of tests/hopper/native with the kernels of csrc/hopper in it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from emulated import KERNELS, NATIVE, ROOT

if TYPE_CHECKING:
    from vllm_glm_patch.moe.hopper.native import Native

_FLAGS = ["-std=c++17", "-O1", "-g1", "-DGLM_HOPPER_EMULATE", f"-I{NATIVE}", "-Wno-psabi", "-Wno-unknown-pragmas"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def _compile(out: Path, *arguments: str | Path) -> Path:
    subprocess.run(["g++", *_FLAGS, *map(str, arguments), "-o", str(out)], check=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def emulator_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator alone, without sanitizers: planted faults are recompiled often."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    return _compile(tmp_path_factory.mktemp("emulator") / "emulate.o", f"-I{KERNELS}", "-c", NATIVE / "emulate.cpp")


@pytest.fixture(scope="session")
def emulated_libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(libglm_hopper.so, a driver whose launches run the kernels under the emulator)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    folder = tmp_path_factory.mktemp("emulated-layer")
    flags = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
    launcher, driver = folder / "libglm_hopper.so", folder / "libcuda_emulated.so"
    hosts = map(str, sorted((KERNELS / "host").glob("*.cpp")))
    subprocess.run([*flags, *hosts, "-o", str(launcher), "-lpthread"], check=True, timeout=300)
    sources = [str(NATIVE / "emulated_driver.cpp"), str(NATIVE / "emulate.cpp")]
    paths = [f"-I{KERNELS}", f"-I{NATIVE}", "-DGLM_HOPPER_EMULATE"]
    subprocess.run([*flags, *paths, *sources, "-o", str(driver)], check=True, timeout=300)
    return launcher, driver


@pytest.fixture(scope="session")
def check_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels, the emulator and their check under AddressSanitizer and UBSan."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    sources = (NATIVE / "emulate.cpp", NATIVE / "check.cpp")
    out = tmp_path_factory.mktemp("check") / "check"
    return _compile(out, "-Wall", "-Wextra", "-Werror", *_SANITIZERS, f"-I{KERNELS}", *sources)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/hopper.py."""
    spec = importlib.util.spec_from_file_location("hopper_benchmark", ROOT / "benchmarks/hopper.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(emulated_libraries: tuple[Path, Path]) -> Native:
    """A launcher with nothing loaded: the kernels of abi.h by name."""
    from vllm_glm_patch.moe.hopper.native import Native

    return Native(emulated_libraries[0])


@pytest.fixture(scope="session")
def changed_kernel(emulator_object: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str, str], Path]:
    """(file, text, other text, kernel file) → the check of that kernel with every such text replaced; it must be there."""

    def build(file: str, text: str, other: str, kernel_file: str) -> Path:
        place = tmp_path_factory.mktemp("changed")
        folder = place / "kernels"
        shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("host", "CMakeLists.txt"))
        source = (folder / file).read_text()
        assert text in source, f"{file} has changed: {text!r} is not in it"
        (folder / file).write_text(source.replace(text, other))
        only = f"-DCHECK_ONLY={Path(kernel_file).stem.upper()}"
        return _compile(place / "check", only, f"-I{folder}", NATIVE / "check.cpp", emulator_object)

    return build
