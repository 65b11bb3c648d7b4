"""NVRTC, the compiler that torch brings: finds it and compiles a source to a cubin. It needs no card."""

from __future__ import annotations

import contextlib
import ctypes as C
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import HopperError

# What torch's distributions call NVRTC's folder, under site-packages/nvidia: CUDA 12's packages, then CUDA 13's and later.
_PACKAGES = ("cuda_nvrtc", "cu[0-9]*")


class Nvrtc:
    """A loaded NVRTC. `version` is (major, minor); `identity` also tells builds of one version apart.

    Raises:
        HopperError: the library cannot be loaded or does not answer.
    """

    def __init__(self, path: str) -> None:
        # NVRTC opens its builtins by name when it compiles, and finds them in its own folder only if they are loaded already.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")) if Path(path).is_file() else ():
            with contextlib.suppress(OSError):
                C.CDLL(str(builtins), mode=C.RTLD_GLOBAL)
        try:
            self._library = C.CDLL(path)
        except OSError as error:
            raise HopperError(f"NVRTC {path} cannot be loaded: {error}. Reinstall torch, whose packages bring it.") from None
        self._library.nvrtcGetErrorString.restype = C.c_char_p
        major, minor = C.c_int(), C.c_int()
        self._check(self._library.nvrtcVersion(C.byref(major), C.byref(minor)), "nvrtcVersion")
        self.path = path
        self.version = (major.value, minor.value)
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        self.identity = f"nvrtc {major.value}.{minor.value} {size}"

    def compile(self, name: str, text: str, headers: dict[str, str], options: Sequence[str]) -> bytes:
        """Compiles one source; `headers` are what it may include, by the name it says.

        Returns:
            The cubin.

        Raises:
            HopperError: with the compiler's log.
        """
        program = C.c_void_p()
        bodies = (C.c_char_p * len(headers))(*(body.encode() for body in headers.values()))
        names = (C.c_char_p * len(headers))(*(header.encode() for header in headers))
        created = self._library.nvrtcCreateProgram(C.byref(program), text.encode(), name.encode(), len(headers), bodies, names)
        self._check(created, name)
        try:
            given = (C.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), given)
            self._check(result, name, lambda: self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
            return self._read(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(C.byref(program))

    def _read(self, program: C.c_void_p, what: str) -> bytes:
        size = C.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, C.byref(size)), what)
        buffer = C.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    def _check(self, result: int, what: str, log: object = None) -> None:
        if not result:
            return
        words = self._library.nvrtcGetErrorString(result).decode()
        more = f"\n{log()}" if callable(log) else ""
        raise HopperError(f"NVRTC ({self.path}) cannot compile {what}: {words} ({result}).{more}")


def candidates(torch_root: Path, cuda: str) -> Iterator[Path]:
    """Files that may be the NVRTC of a torch, the likeliest first.

    Args:
        torch_root: the folder of the installed torch package.
        cuda: torch.version.cuda, like "12.6".
    """
    major = cuda.split(".")[0]
    site_packages = torch_root.parent
    folders = [torch_root / "lib"]
    for package in _PACKAGES:
        folders += sorted(site_packages.glob(f"nvidia/{package}/lib"))
    for folder in folders:
        found = sorted(folder.glob("libnvrtc*.so*"))
        yield from (file for file in found if re.fullmatch(rf"libnvrtc(-[0-9a-f]+)?\.so\.{major}(\.[0-9.]+)?", file.name))


def find() -> Nvrtc:
    """The NVRTC of the torch that is installed, else the one the dynamic loader finds, which torch would use too.

    Raises:
        HopperError: there is none; the text lists where was looked.
    """
    import torch

    if torch.version.cuda is None:
        raise HopperError(
            f"torch {torch.__version__} is a build without CUDA and brings no NVRTC to compile the kernels with. Install a "
            "build of torch for CUDA."
        )
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    looked = []
    for path in candidates(Path(spec.origin).parent, torch.version.cuda):
        try:
            return Nvrtc(str(path))
        except HopperError as error:
            looked.append(str(error))
    by_name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    try:
        return Nvrtc(by_name)
    except HopperError as error:
        looked.append(str(error))
    raise HopperError(
        f"No NVRTC for CUDA {torch.version.cuda} is beside torch {torch.__version__}: {' '.join(looked)} "
        f"Install the package of it that this torch asks for (pip show torch lists it)."
    )
