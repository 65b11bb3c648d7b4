"""Builds the wheel; native parts are built by CMake with ninja (CMakeLists.txt) where there are any."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


# Which nvcc makes the cubins: a path; "package": the Python package nvidia-cuda-nvcc, which pip then gets for the build;
# "none": no cubins. Unset: the system's, else the package where this Python has it, else none.
NVCC = os.environ.get("GLM_HOPPER_NVCC", "")
# Of one version: the package leaves its parts' versions open, and a newer one's output is refused by an older ptxas.
NVCC_PACKAGES = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")]


def find_nvcc() -> str:
    """The path of nvcc, or "none"."""
    if NVCC not in ("", "package"):
        return NVCC
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    system = [f"{home}/bin" for home in (*homes, "/usr/local/cuda")] + os.environ.get("PATH", "").split(os.pathsep)
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    packaged = [str(found) for root in roots or () for found in Path(root).glob("cu*/bin")]
    places = packaged if NVCC == "package" else system + packaged
    return shutil.which("nvcc", path=os.pathsep.join(places)) or "none"


class CMakeExtension(Extension):
    """All native parts together: CMake decides what they are and installs them into the package."""

    def __init__(self, source: Path) -> None:
        super().__init__("vllm_glm_patch._native", sources=[])
        self.source = source


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake and ninja into the folder of the package."""

    def build_extension(self, ext: Extension) -> None:
        assert isinstance(ext, CMakeExtension)
        package = ROOT if self.inplace else Path(self.build_lib).absolute()
        folder = Path(self.build_temp).absolute()
        configure = ["cmake", "-S", str(ext.source), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DGLM_HOPPER_NVCC={find_nvcc()}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)
        subprocess.run(["cmake", "--install", str(folder), "--prefix", str(package / "vllm_glm_patch")], check=True)

    def get_outputs(self) -> list[str]:
        return []


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python: our native parts have a C interface and use neither Python's nor torch's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class WithNativeParts(Distribution):
    """Makes the wheel one for this platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=[*find_packages(include=["vllm_glm_patch", "vllm_glm_patch.*"]), "vllm_glm_patch.patches"],
    package_dir={"vllm_glm_patch.patches": "patches"},
    package_data={"vllm_glm_patch": ["py.typed", "moe/tuned/*.json"], "vllm_glm_patch.patches": ["*.toml"]},
    ext_modules=[CMakeExtension(ROOT)],
    setup_requires=NVCC_PACKAGES if NVCC == "package" else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    distclass=WithNativeParts,
)
