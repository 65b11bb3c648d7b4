"""For the tests of the launcher: libglm_hopper.so and the mock driver, built once, and what abi.h says in words."""

from __future__ import annotations

import ctypes as C
import functools
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc/hopper"
HOST_SOURCES = sorted((CSRC / "host").glob("*.cpp"))
NATIVE = Path(__file__).parent / "native"
# As CMakeLists.txt builds it; names and warnings are checked there.
LIBRARY_FLAGS = ("-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-include", str(ROOT / "csrc/portable.h"))


def compile_cpp(out: Path, sources: list[Path], *flags: str) -> Path:
    """Builds a library or a program; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the launcher with")
    subprocess.run(["g++", "-std=c++17", *flags, *map(str, sources), "-o", str(out), "-ldl", "-lpthread"], check=True)
    return out


@functools.cache
def abi_text() -> str:
    return (CSRC / "abi.h").read_text()


@functools.cache
def argument_sizes() -> dict[str, list[int]]:
    """Bytes of each argument by family, read off the comment «arguments» of abi.h."""
    comment = abi_text().split("- arguments\n")[1].split("enum class Family")[0]
    sizes: dict[str, list[int]] = {}
    for block in re.split(r"// Family::", comment)[1:]:
        family = re.match(r"\w+", block)
        lines = block.splitlines()[1:]
        # The list is what is indented; notes behind it begin with a word and a colon.
        text = " ".join(line[2:].strip() for line in lines if line.startswith("//     ") and not re.match(r"//     \w+:", line))
        text = re.sub(r"\[[^\]]*\]|\([^)]*\)", "", text)
        sizes[family[0]] = [_size_of(part) for part in text.split(",")]  # type: ignore[index]
    return sizes


def _size_of(declaration: str) -> int:
    if "TensorMap" in declaration:
        return 128
    if "*" in declaration:
        return 8
    assert declaration.split()[0] == "int", declaration
    return 4


@dataclass(frozen=True)
class TableRow:
    """One kernel of abi.h's table, read as text."""

    name: str
    source: str
    family: str
    grid: str
    block: int
    cluster: int
    tile_rows: int
    tile_columns: int
    stages: int
    stage_bytes: int
    programmatic: bool
    maps: tuple[str, ...]


@functools.cache
def table() -> tuple[TableRow, ...]:
    rows = []
    for line in re.findall(r"^    \{\"glm_.*\},$", abi_text(), re.MULTILINE):
        parts = [part.strip(' {}"') for part in line.strip(" ,").split(",")]
        numbers = [int(part) for part in parts[4:10]]
        maps = tuple(part.split("::")[1] for part in parts[11:] if "::" in part and not part.endswith("::none"))
        words = parts[0], parts[1], parts[2].split("::")[1], parts[3].split("::")[1]
        rows.append(TableRow(*words, *numbers, parts[10] == "true", maps))
    return tuple(rows)


def mock_image(source: str, **changes: str) -> bytes:
    """An image for the mock driver with every kernel of a source as abi.h has it; `changes` replaces a kernel's line."""
    lines = []
    for row in table():
        if row.source == source:
            sizes = " ".join(map(str, argument_sizes()[row.family]))
            lines.append(changes.get(row.name, f"{row.name} 1024 {sizes}"))
    return "\n".join(lines).encode() + b"\n"


class _Launch(C.Structure):
    _fields_ = [
        ("kernel", C.c_char_p),
        *((name, C.c_uint32) for name in ("grid", "block", "shared", "cluster", "programmatic", "arguments")),
        ("device", C.c_int32),
        ("stream", C.c_uint64),
    ]


@dataclass(frozen=True)
class Launch:
    """What one launch asked for; `arguments` as raw bytes."""

    kernel: str
    grid: int
    block: int
    shared: int
    cluster: int
    programmatic: int
    device: int
    stream: int
    arguments: tuple[bytes, ...]

    def pointer(self, index: int) -> int:
        return int.from_bytes(self.arguments[index], "little")

    number = pointer

    def promotion(self, index: int) -> int:
        """Bytes that L2 fetches at once for a map."""
        return {2: 128, 3: 256}[self.arguments[index][9]]

    def tensor_map(self, index: int) -> dict[str, Any]:
        """What the mock driver made the map of."""
        words = [int.from_bytes(self.arguments[index][8 * i : 8 * i + 8], "little") for i in range(16)]
        rank = words[1] & 0xFF
        return {
            "base": words[0],
            "dims": words[2 : 2 + rank],
            "strides": words[7 : 7 + rank - 1],
            "box": words[11 : 11 + rank],
            "element_bytes": words[1] >> 16 & 0xFF,
        }


class Mock:
    """The steering wheel of the mock driver."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.native = C.CDLL(self.path)
        self.native.mock_launch.argtypes = [C.c_int, C.POINTER(_Launch)]
        self.native.mock_argument.argtypes = [C.c_int, C.c_int, C.c_char_p, C.c_int]
        self.native.mock_calls.restype = C.c_long
        self.native.mock_leaks.restype = C.c_long

    def fail(self, function: str, code: int) -> None:
        self.native.mock_fail(function.encode(), code)

    def calls(self, function: str) -> int:
        return self.native.mock_calls(function.encode())

    def launches(self) -> list[Launch]:
        """Those of this thread since the last call."""
        found, row = [], _Launch()
        while self.native.mock_launch(len(found), C.byref(row)):
            arguments = []
            for index in range(row.arguments):
                room = C.create_string_buffer(256)
                size = self.native.mock_argument(len(found), index, room, len(room))
                arguments.append(room.raw[:size])
            names = ("grid", "block", "shared", "cluster", "programmatic", "device", "stream")
            found.append(Launch(row.kernel.decode(), *(getattr(row, name) for name in names), tuple(arguments)))
        self.native.mock_clear_launches()
        return found

    def violations(self) -> str:
        text = C.create_string_buffer(4096)
        self.native.mock_violations(text, len(text))
        return text.value.decode()


def nvcc() -> str:
    """The nvcc of this machine; skips the test where there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("no nvcc")
    return found


def cubin_arguments(cubin: bytes) -> dict[str, list[int]]:
    """Bytes of each argument of every kernel in a cubin, from its .nv.info.* sections (EIATTR_KPARAM_INFO)."""
    table_at, (count, names_at) = int.from_bytes(cubin[40:48], "little"), struct.unpack_from("<HH", cubin, 60)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table_at + 64 * index) for index in range(count)]
    found = {}
    for head in heads:
        begin = heads[names_at][4] + head[0]
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name.startswith(".nv.info."):
            found[name.removeprefix(".nv.info.")] = _argument_sizes(cubin[head[4] : head[4] + head[5]])
    return found


def _argument_sizes(info: bytes) -> list[int]:
    sizes, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # the others have their value in `size`
            if attribute == 0x17:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at)
                sizes[ordinal] = packed >> 18
            at += size
    return [sizes[ordinal] for ordinal in sorted(sizes)]
