"""Builds the allocator and the mock driver once, and hands out a fresh fence to each test."""

from __future__ import annotations

import ctypes as C
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_glm_patch.fence.library import Library
from vllm_glm_patch.fence.options import Options

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/fence").glob("*.cpp"))
NATIVE = Path(__file__).parent / "native"
PAGE = 2 << 20  # the mock's granularity, and that of real cards


def compile_cpp(out: Path, sources: list[Path], *flags: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the allocator with")
    as_shipped = ["-std=c++17", "-include", str(ROOT / "csrc/portable.h"), f"-I{ROOT / 'csrc/fence'}"]
    command = ["g++", *as_shipped, *flags, *map(str, sources), "-o", str(out), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(libglm_fence.so, the mock of libcuda.so.1)."""
    where = tmp_path_factory.mktemp("fence-build")
    fence = compile_cpp(where / "libglm_fence.so", SOURCES, "-O1", "-fPIC", "-shared", "-fvisibility=hidden")
    mock = compile_cpp(where / "libcuda_mock.so", [NATIVE / "mock_cuda.cpp"], "-O1", "-fPIC", "-shared")
    return fence, mock


@pytest.fixture(scope="session")
def mock_cupti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("cupti-build")
    return compile_cpp(where / "libcupti_mock.so", [NATIVE / "mock_cupti.cpp"], "-O1", "-fPIC", "-shared")


class Mock:
    """The steering wheel of the mock driver."""

    def __init__(self, path: Path):
        self.native = C.CDLL(str(path))
        self.native.mock_stream.restype = C.c_void_p
        for name in ("finish", "destroy_stream", "begin_capture", "end_capture"):
            function = getattr(self.native, f"mock_{name}")
            function.argtypes = [C.c_void_p]
            setattr(self, name, function)
        self.native.mock_use.argtypes = [C.c_void_p, C.c_uint64]
        self.native.mock_set_capacity.argtypes = [C.c_int, C.c_uint64]
        self.native.mock_in_use.restype = C.c_uint64
        self.native.mock_is_mapped.argtypes = [C.c_uint64]
        self.native.mock_calls.restype = C.c_long
        self.native.mock_last_waited.restype = C.c_void_p
        self.native.mock_leaks.restype = C.c_long

    def stream(self, device: int = 0, automatic: bool = False) -> int:
        return self.native.mock_stream(device, int(automatic))

    def use(self, stream: int, address: int) -> None:
        self.native.mock_use(stream, address)

    def is_mapped(self, address: int) -> bool:
        return bool(self.native.mock_is_mapped(address))

    def fault(self, result: int = 700, silent: bool = False) -> None:
        """From now on every wait ends with an error; `silent`: the driver then tells nothing of kernels either."""
        self.native.mock_fault(result, int(silent))

    def calls(self, name: str) -> int:
        return self.native.mock_calls(name.encode())

    def violations(self) -> str:
        text = C.create_string_buffer(4096)
        self.native.mock_violations(text, len(text))
        return text.value.decode()


class Fence(Library):
    """The library under test and its driver."""

    def __init__(self, libraries: tuple[Path, Path], mock: Mock, directory: Path):
        super().__init__(libraries[0])
        self.mock = mock
        self.directory = directory
        self._libcuda = str(libraries[1])

    def set(self, streams_recorded: bool = True, **options: object) -> Fence:
        values = {"libcuda": self._libcuda, "directory": str(self.directory), **options}
        self.configure(Options(**values), streams_recorded)  # type: ignore[arg-type]
        return self


@pytest.fixture
def fence(libraries: tuple[Path, Path], tmp_path: Path) -> Iterator[Fence]:
    """A fence of its own for each test; afterwards nothing may have leaked and no rule of CUDA been broken."""
    mock = Mock(libraries[1])
    mock.native.mock_reset()
    library = Fence(libraries, mock, tmp_path)
    library.set()
    yield library
    mock.native.mock_forget_graphs()
    for_graphs = mock.violations()
    library.shutdown()
    assert for_graphs == ""
    assert mock.native.mock_capture_mode() == 0, "the thread's capture mode was not given back"
    assert mock.violations() == ""
    assert mock.native.mock_leaks() == 0
