"""Gets the kernels onto a device: the wheel's cubins, or where the driver refuses those, ones compiled here once by NVRTC."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .errors import HopperError
from .native import DRIVER, Native
from .nvrtc import Nvrtc, find

HERE = Path(__file__).parent
CUBINS = HERE / "cubin"
SOURCES = HERE / "source"
FLAGS = "flags.txt"

# CUresult of an image that this driver cannot take: invalid image, no binary for this GPU, invalid PTX, no JIT compiler,
# PTX of a later version, JIT switched off, invalid source, unsupported. Every other is no fault of the cubin.
REFUSALS = frozenset({200, 209, 218, 221, 222, 223, 300, 801})

# abi.h has functions for the host too, which NVRTC does not know unless all are the device's.
NVRTC_FLAGS = ("--device-as-default-execution-space",)

_log = logging.getLogger("vllm_glm_patch")


@dataclass(frozen=True)
class Images:
    """Cubins by the name of their source (`gemm2_decode.cu`), what compiled them, and from which abi.h."""

    files: Mapping[str, bytes]
    compiler: str
    abi: int


def packaged(folder: Path = CUBINS) -> Images | None:
    """The cubins of this wheel; None where it was built without nvcc.

    Raises:
        HopperError: they are damaged.
    """
    if not (folder / cache.MANIFEST).is_file():
        return None
    known = cache.read(folder)
    if known is None:
        raise HopperError(f"The cubins in {folder} are not as their {cache.MANIFEST} says. Reinstall vllm-glm-patch.")
    manifest, files = known
    by_source = {f"{Path(name).stem}.cu": data for name, data in files.items()}
    return Images(by_source, str(manifest.get("compiler", "unknown")), int(str(manifest.get("abi", -1))))


def read_sources(folder: Path = SOURCES) -> dict[str, str]:
    """Name and text of the kernels' sources, their headers and their compiler flags.

    Raises:
        HopperError: they are not there.
    """
    files = (file for file in sorted(folder.glob("*.*")) if file.name == FLAGS or file.suffix in (".cu", ".cuh", ".h"))
    found = {file.name: file.read_text(encoding="utf-8") for file in files}
    missing = [name for name in ("abi.h", FLAGS) if name not in found]
    if missing:
        raise HopperError(f"{folder} has no {' and no '.join(missing)}. Reinstall vllm-glm-patch from its wheel.")
    return found


def flags_of(sources: Mapping[str, str]) -> tuple[str, ...]:
    """The options that nvcc and NVRTC are both given."""
    lines = (line.split("#")[0].strip() for line in sources[FLAGS].splitlines())
    return tuple(line for line in lines if line)


def compiled(nvrtc: Nvrtc, sources: Mapping[str, str], root: Path) -> Images:
    """The cubins of these sources by this NVRTC: out of the cache, else compiled into it by one process for all.

    Raises:
        HopperError: the cache is not safe or not writable, or the compiler refuses a source.
    """
    options = (*flags_of(sources), *NVRTC_FLAGS)
    key = cache.key_of(sources, options, nvrtc.identity)
    folder = cache.owned_folder(root / "hopper")
    abi = abi_of(sources)
    cubins = {f"{Path(name).stem}.cubin": name for name in sources if name.endswith(".cu")}

    def make() -> dict[str, bytes]:
        headers = {name: text for name, text in sources.items() if name.endswith((".h", ".cuh"))}
        _log.info("Compiling %d Hopper kernel sources with %s into %s, once", len(cubins), nvrtc.path, folder)

        def compile_one(name: str) -> bytes:
            return nvrtc.compile(name, sources[name], headers, options)

        with ThreadPoolExecutor(max(len(cubins), 1)) as pool:
            return dict(zip(cubins, pool.map(compile_one, cubins.values())))

    about = {"abi": abi, "compiler": nvrtc.identity, "options": options}
    files = cache.get(folder, key, about, cubins, make)
    return Images({source: files[cubin] for cubin, source in cubins.items()}, nvrtc.identity, abi)


def abi_of(sources: Mapping[str, str]) -> int:
    """abi_version of abi.h.

    Raises:
        HopperError: it has none.
    """
    found = re.search(r"\babi_version = (\d+);", sources["abi.h"])
    if found is None:
        raise HopperError("abi.h has no abi_version. Reinstall vllm-glm-patch from its wheel.")
    return int(found[1])


def load(native: Native, device: int, images: Images) -> None:
    """Loads every source's cubin on a device.

    Raises:
        HopperError: with the driver's code where it refuses one.
    """
    if images.abi != native.abi_version:
        raise HopperError(
            f"The cubins made by {images.compiler} are of ABI {images.abi}, and libglm_hopper.so is of {native.abi_version}. "
            "Reinstall vllm-glm-patch."
        )
    missing = [source for source in native.sources if source not in images.files]
    if missing:
        raise HopperError(f"The cubins made by {images.compiler} lack {', '.join(missing)}. Reinstall vllm-glm-patch.")
    for source in native.sources:
        native.load(device, source, images.files[source])


def load_or_compile(native: Native, device: int, images: Images | None, compile_here: Callable[[], Images]) -> str:
    """Loads `images`, or what `compile_here` gives where there are none or the driver refuses them.

    Returns:
        What compiled the kernels that are loaded now.

    Raises:
        HopperError: neither can be loaded; the text has both reasons.
    """
    refused = "this wheel was built without them"
    if images is not None:
        try:
            load(native, device, images)
            return images.compiler
        except HopperError as error:
            if error.code not in REFUSALS:
                raise
            refused = str(error)
            _log.warning("The Hopper kernels in the wheel are not used on cuda:%d: %s", device, refused)
    try:
        made = compile_here()
        load(native, device, made)
    except HopperError as error:
        raise HopperError(f"{error} (The wheel's own cubins: {refused}.)", error.code) from error
    return made.compiler


class Loader:
    """Loads the kernels once a device. A failure is kept too, so that nothing is compiled at each call."""

    def __init__(self, native: Native, images: Images | None, compile_here: Callable[[], Images], driver: str = DRIVER) -> None:
        self.native = native
        self._images, self._compile, self._driver = images, compile_here, driver
        self._lock = threading.Lock()
        self._done: dict[int, str | HopperError] = {}

    def on(self, device: int) -> Native:
        """The library, with every kernel loaded on that device.

        Raises:
            HopperError: they cannot be loaded there.
        """
        done = self._done.get(device)
        if done is None:
            with self._lock:
                done = self._done.get(device)
                if done is None:
                    done = self._done[device] = self._load(device)
        if isinstance(done, HopperError):
            raise done
        return self.native

    def compiler(self, device: int) -> str:
        """What compiled the kernels that are loaded on that device."""
        self.on(device)
        return str(self._done[device])

    def _load(self, device: int) -> str | HopperError:
        try:
            self.native.open(self._driver)
            return load_or_compile(self.native, device, self._images, self._compile)
        except HopperError as error:
            return error


@functools.cache
def loader() -> Loader:
    """The one of this process, for this installation.

    Raises:
        HopperError: the installation is damaged.
    """
    return Loader(Native(), packaged(), lambda: compiled(find(), read_sources(), cache.root()))
