"""The wheel: what it holds, where it can be used, and that setup.py drives CMake and ninja for a native part."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PART = """
add_library(example SHARED example.cpp)
install(TARGETS example LIBRARY DESTINATION example)
"""

# A new compiler and a new glibc give each of these a version of its own: dlopen, shared_ptr, and a vector that grows.
NEEDS_NEW_SYMBOLS = """
#include <dlfcn.h>

#include <memory>
#include <vector>

extern "C" int answer() {
    std::vector<std::shared_ptr<void>> handles;
    for (int i = 0; i < 3; ++i) {
        handles.emplace_back(dlopen(nullptr, RTLD_NOW), [](void* handle) { dlclose(handle); });
    }
    return dlsym(handles.back().get(), "malloc") != nullptr && dlerror() == nullptr ? 42 : 0;
}
"""


def build(tree: Path, kind: str) -> Path:
    """Build a wheel or an sdist without leaving the machine; returns the file."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(tree / "out"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (tree / "out").iterdir()
    return file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the wheel is built from, with no native part but one of the test's own."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("vllm_glm_patch", "patches"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (copy / "csrc" / "example").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "portable.h", copy / "csrc")
    (copy / "csrc" / "example" / "CMakeLists.txt").write_text(PART)
    (copy / "csrc" / "example" / "example.cpp").write_text(NEEDS_NEW_SYMBOLS)
    return copy


def test_the_wheel_holds_the_catalog_the_native_part_and_the_entry_points(tree: Path) -> None:
    wheel = build(tree, "wheel")
    assert wheel.name.startswith("vllm_glm_patch-")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
        (metadata,) = [archive.read(n).decode() for n in names if n.endswith("/METADATA")]
    assert {f"vllm_glm_patch/patches/{f.name}" for f in (ROOT / "patches").glob("*.toml")} <= names
    assert {"vllm_glm_patch/py.typed", "vllm_glm_patch/example/libexample.so"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools", "benchmarks", "csrc")]
    assert "[vllm.general_plugins]\nglm_patch = vllm_glm_patch.plugin:register" in entry_points
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in needs if line.split()[1].startswith(("vllm", "torch", "triton"))], needs
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.9" in metadata.splitlines()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump of binutils")
def test_a_native_part_asks_for_no_newer_system_than_torch_does_and_works(tree: Path) -> None:
    wheel = build(tree, "wheel")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("vllm_glm_patch/example/libexample.so", tree)
    symbols = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    asked = re.findall(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI)_([0-9.]+)\)", symbols)
    newest = {name: max(tuple(map(int, v.split("."))) for n, v in asked if n == name) for name, _ in asked}
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}  # manylinux_2_28: glibc 2.28, GCC 8
    assert asked
    assert not {name: version for name, version in newest.items() if version > limits[name]}
    code = f"import ctypes; print(ctypes.CDLL({library!r}).answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "42\n"


@pytest.mark.parametrize("file", sorted((ROOT / "vllm_glm_patch").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_every_module_is_written_in_the_grammar_of_python_3_9(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 9))


def vermin(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from vermin import main; main()",
        "--target=3.9-",
        "--violations",
        "--no-tips",
        "--eval-annotations",
    ]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("vermin") is None, reason="needs vermin, of the extra dev")
def test_no_module_uses_what_the_library_of_python_3_9_lacks(tmp_path: Path) -> None:
    found = vermin(ROOT / "vllm_glm_patch", ROOT / "setup.py")
    assert found.returncode == 0, found.stdout
    newer = tmp_path / "newer.py"
    newer.write_text("print(list(zip([1], [2], strict=True)))\n")
    assert vermin(newer).returncode != 0, "the check itself finds nothing"


def test_the_sdist_holds_all_that_the_wheel_is_built_from(tree: Path) -> None:
    sdist = build(tree, "sdist")
    unpacked = tree / "unpacked"
    shutil.unpack_archive(sdist, unpacked)
    (inside,) = unpacked.iterdir()
    for name in ("patches/scale-overread.toml", "csrc/example/example.cpp", "CMakeLists.txt", "setup.py", "LICENSE"):
        assert (inside / name).is_file(), name
    assert build(inside, "wheel").suffix == ".whl"
