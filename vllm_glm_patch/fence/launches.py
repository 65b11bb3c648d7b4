"""Names the launch that faulted without a core dump: finds CUPTI for csrc/fence/launches.cpp, and reads what that wrote.

The driver's dump of a faulted server broke off at 68 KiB each time that it was tried (H100, driver 580.159.04).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .journal import Row
from .options import launch_path, watch_path

TOOLKIT = Path("/usr/local/cuda/extras/CUPTI/lib64")
_LIBRARIES = {"12": "nvidia/cuda_cupti/lib/libcupti.so.12", "13": "nvidia/cu13/lib/libcupti.so.13"}  # of NVIDIA's wheels
_WHEELS = {"12": "nvidia-cuda-cupti-cu12", "13": "nvidia-cuda-cupti"}


@dataclass(frozen=True)
class Launch:
    """The launch after which a process's stream had failed.

    Attributes:
        pid: the process.
        thread: id of the thread that launched, as the system counts threads.
        function: of the driver, as "cuLaunchKernelExC" or "cuGraphLaunch".
        symbol: the kernel's name as compiled; "" for a graph.
        kernel: the same, readable.
        shape: "<<<(grid),(block)>>>"; "" where it is not known.
        graph: a CUDA graph was launched, one of whose kernels it was.
        index: number of the launch, from 1, as the process counts them.
        error: as "CUDA_ERROR_ILLEGAL_ADDRESS".
        found: "synchronize": the launch succeeded and its stream then failed. "launch": the launch itself was refused, so it
            was this one under CUDA_LAUNCH_BLOCKING=1, else perhaps a copy before it.
        concurrent: launches of other threads at that moment; if there are any, it may have been one of those.
        stack: number of its Python stack in the stacks file; 0 where there is none.
        parameters_read: the kernel's parameters could be read.
        candidates: blocks that its parameters point into, in the order of the parameters.
    """

    pid: int
    thread: int
    function: str
    symbol: str
    kernel: str
    shape: str
    graph: bool
    index: int
    error: str
    found: str
    concurrent: int
    stack: int
    parameters_read: bool
    candidates: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The kernel, or that it was a graph."""
        return self.kernel or (f"one in a CUDA graph ({self.function})" if self.graph else "")

    def doubts(self) -> str:
        """Why it may have been something else, "" where it may not."""
        if self.concurrent:
            return f"{self.concurrent} other threads launched kernels at the same moment; it may have been one of those."
        if self.found == "launch":
            return (
                "The launch itself was refused: blame it under CUDA_LAUNCH_BLOCKING=1, else perhaps a copy or fill before it."
            )
        return ""


@dataclass(frozen=True)
class Watch:
    """Whether the launches of a process were watched.

    Attributes:
        pid: the process.
        cupti: path or name of CUPTI's library.
        looked: where it was looked for; "" where the user named it.
        loaded: the library could be loaded.
        problem: why launches were not watched; "" where they were.
    """

    pid: int
    cupti: str
    looked: str
    loaded: bool
    problem: str

    def missing(self) -> str:
        """What was missing, and where it was looked for; "" where launches were watched."""
        if not self.problem:
            return ""
        looked = f" (looked for: {self.looked})" if self.looked and not self.loaded else ""
        return f"launches were not watched: {self.problem}{looked}"

    def advice(self) -> str:
        """The next step where no launch of this process is to blame by name."""
        if not self.problem:
            return (
                f"launches were watched through {self.cupti}, and none was seen to fault: it was a copy or fill, or a kernel "
                "launched while its stream was captured, or the process was killed first. Run it with "
                "CUDA_LAUNCH_BLOCKING=1 and the same requests, so that the traceback in its log names the call; or without "
                "--launches, where the driver writes a core dump instead."
            )
        if not self.loaded:
            major = found.group(1) if (found := re.search(r"libcupti\.so\.(\d+)", self.cupti)) else "12"
            wheel = _WHEELS.get(major, _WHEELS["13"])
            return (
                f"{self.missing()}. Install CUPTI beside torch (`pip install {wheel}`, for CUDA {major}), or "
                "give the library's path in VLLM_GLM_PATCH_FENCE_CUPTI, and run the same command again; or run it without "
                "--launches, where the driver writes a core dump instead."
            )
        return (
            f"{self.missing()}. CUPTI ({self.cupti}) serves one tool at a time: leave out other profilers "
            "(PyTorch's, Nsight) and check that the library is CUPTI and fits the driver; or run it without --launches, where "
            "the driver writes a core dump instead."
        )


def cupti_places(torch_file: str, cuda: str) -> list[str]:
    """Where `find_cupti` looks, for people: paths, and at last the name that the loader looks for."""
    major = cuda.split(".")[0]
    beside = [str(Path(torch_file).parents[1] / _LIBRARIES[major])] if major in _LIBRARIES else []
    return [*beside, f"{TOOLKIT}/libcupti.so.{major}*", f"libcupti.so.{major} where the loader looks (LD_LIBRARY_PATH)"]


def find_cupti(torch_file: str, cuda: str) -> str:
    """Path of CUPTI's library, the one that torch uses before others; a plain name where none is found.

    Args:
        torch_file: torch.__file__; NVIDIA's wheels lie beside torch.
        cuda: torch.version.cuda, as "12.8".
    """
    major = cuda.split(".")[0]
    beside = Path(torch_file).parents[1]
    found = [beside / _LIBRARIES[major]] if major in _LIBRARIES else []
    found += sorted(TOOLKIT.glob(f"libcupti.so.{major}*"))
    return next((str(path) for path in found if path.exists()), f"libcupti.so.{major}")


def watches(directory: Path) -> dict[int, Watch]:
    """Process → whether its launches were watched, for each that was to be. A file that cannot be read is left out."""
    found: dict[int, Watch] = {}
    for path in sorted(directory.glob(watch_path("", "*").name)):
        try:
            told = Watch(**json.loads(path.read_text(errors="replace")))
        except (OSError, TypeError, ValueError):
            continue
        found[told.pid] = told
    return found


def launch_records(directory: Path) -> dict[int, Path]:
    """Process → its record, for each process in which a launch faulted."""
    return {
        int(number): path
        for path in sorted(directory.glob(launch_path("", "*").name))
        if (number := path.stem.partition("-")[2]).isdigit()
    }


def read_launch(path: Path) -> Launch | None:
    """The record in a file; None where there is none.

    Raises:
        ValueError: it is no such record.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    try:
        told: dict[str, Any] = json.loads(text)
        rows = tuple(Row(**one["block"]) for one in told.pop("candidates"))
        told.pop("result")
        return Launch(**told, candidates=rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a launch: {error!r}.") from None
