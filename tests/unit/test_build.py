"""The wheel: what it holds, and that setup.py drives CMake and ninja for a native part."""

from __future__ import annotations

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
    (copy / "csrc" / "example" / "example.cpp").write_text('extern "C" int answer() { return 42; }\n')
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


def test_the_sdist_holds_all_that_the_wheel_is_built_from(tree: Path) -> None:
    sdist = build(tree, "sdist")
    unpacked = tree / "unpacked"
    shutil.unpack_archive(sdist, unpacked)
    (inside,) = unpacked.iterdir()
    for name in ("patches/scale-overread.toml", "csrc/example/example.cpp", "CMakeLists.txt", "setup.py", "LICENSE"):
        assert (inside / name).is_file(), name
    assert build(inside, "wheel").suffix == ".whl"
