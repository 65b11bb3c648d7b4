"""Launches that are waited for: what is written down of the one that faults, through a mock of CUPTI."""

from __future__ import annotations

import ctypes as C
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_glm_patch.fence import launches as launches_module
from vllm_glm_patch.fence.journal import read_journal
from vllm_glm_patch.fence.launches import Launch, cupti_places, find_cupti, launch_records, read_launch, watches
from vllm_glm_patch.fence.library import STACK_FUNCTION
from vllm_glm_patch.fence.options import Options
from vllm_glm_patch.fence.stacks import StackRecorder, read_stacks

from .conftest import Fence
from .transcripts import RECORD

FUNCTION, KERNEL = 1, 2
LAUNCHES = [
    "cuLaunchKernel", "cuLaunchKernel_ptsz", "cuLaunchKernelEx", "cuLaunchKernelEx_ptsz",
    "cuLaunchCooperativeKernel", "cuLaunchCooperativeKernel_ptsz",
]  # fmt: skip


class MockKernel(C.Structure):
    _fields_ = [("kind", C.c_int), ("count", C.c_int), ("offsets", C.c_size_t * 8), ("sizes", C.c_size_t * 8)]


class Cupti:
    """Makes launches under a watched fence."""

    def __init__(self, path: Path, fence: Fence):
        self.path, self.fence, self.native = path, fence, C.CDLL(str(path))
        self.native.mock_cupti_refuse(0)
        self._kept: list[Any] = []

    def watch(self, stack: object = None, cupti: str = "", looked: str = "") -> None:
        options = Options(directory=str(self.fence.directory), libcuda=self.fence._libcuda)
        self.fence.watch_launches(options, cupti or str(self.path), stack, looked)
        self.fence.malloc(16)  # the first allocation subscribes

    def kernel(self, sizes: list[int], kind: int = FUNCTION) -> int:
        """A handle, which the driver is seen to hand out."""
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        made = MockKernel(kind, len(sizes), (C.c_size_t * 8)(*offsets), (C.c_size_t * 8)(*sizes))
        self._kept.append(made)
        return C.addressof(made)

    def hand_out(self, handle: int, how: str = "cuModuleGetFunction") -> int:
        self.native.mock_cupti_handle(how.encode(), C.c_void_p(handle))
        return handle

    def launch(
        self,
        function: str = "cuLaunchKernel",
        symbol: str = "_Z10reads_pastPf",
        handle: int | None = None,
        stream: int | None = None,
        values: list[bytes] = (),  # type: ignore[assignment]
        extra: bytes | None = None,
        result: int = 0,
    ) -> None:
        buffers = [C.create_string_buffer(value, len(value)) for value in values]
        pointers = (C.c_void_p * (len(buffers) or 1))(*[C.addressof(one) for one in buffers])
        packed = None
        if extra is not None:
            data, size = C.create_string_buffer(extra, len(extra)), C.c_size_t(len(extra))
            packed = (C.c_void_p * 5)(1, C.addressof(data), 2, C.addressof(size), 0)
        self.native.mock_cupti_kernel(
            function.encode(), symbol.encode() or None, C.c_void_p(handle), C.c_void_p(stream),
            pointers if values else None, packed, result,
        )  # fmt: skip

    def record(self) -> Launch | None:
        return read_launch(self.fence.directory / f"launch-{os.getpid()}.json")


@pytest.fixture
def cupti(fence: Fence, mock_cupti: Path) -> Iterator[Cupti]:
    made = Cupti(mock_cupti, fence)
    yield made
    fence.unwatch_launches()
    assert not made.native.mock_cupti_subscribed()
    fence.mock.fault(0)


def pointer(address: int | None) -> bytes:
    return (address or 0).to_bytes(8, "little")


@pytest.mark.parametrize("function", LAUNCHES)
def test_the_launch_that_faults_is_named(function: str, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    stream = fence.mock.stream()
    cupti.launch(function, "_Z4finev", stream=stream)
    assert cupti.record() is None
    fence.mock.fault()
    cupti.launch(function, stream=stream)
    told = cupti.record()
    assert told is not None
    assert (told.kernel, told.symbol, told.function) == ("reads_past(float*)", "_Z10reads_pastPf", function)
    assert (told.pid, told.index, told.graph, told.found) == (os.getpid(), 2, False, "synchronize")
    assert (told.shape, told.error) == ("<<<(132,2,1),(384,1,1)>>>", "CUDA_ERROR_MOCK")
    assert told.doubts() == ""


def test_a_kernel_of_triton_has_the_name_that_it_has(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    cupti.launch(symbol='fused_moe_kernel "x"\\\t')
    told = cupti.record()
    assert told is not None and told.kernel == 'fused_moe_kernel "x"\\\t'


@pytest.mark.parametrize("function", ["cuGraphLaunch", "cuGraphLaunch_ptsz"])
def test_a_graph_is_said_to_be_one(function: str, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    cupti.launch(function, symbol="", stream=fence.mock.stream())
    told = cupti.record()
    assert told is not None and told.graph
    assert told.name == f"one in a CUDA graph ({function})"


@pytest.mark.parametrize("function", ["cuLaunchHostFunc", "cuMemcpyAsync", "cuGraphInstantiate", "cuLaunch"])
def test_other_calls_are_not_waited_for(function: str, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    cupti.launch(function)
    assert fence.mock.calls("cuStreamSynchronize") == 0
    assert cupti.record() is None


@pytest.mark.parametrize(
    ("function", "stream"), [("cuLaunchKernel", None), ("cuLaunchKernel_ptsz", 2), ("cuLaunchKernelEx_ptsz", 2)]
)
def test_stream_0_is_the_one_that_the_function_means(function: str, stream: int | None, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    cupti.launch(function)
    assert fence.mock.calls("cuStreamSynchronize") == 1
    assert fence.mock.native.mock_last_waited() == stream


def test_a_launch_into_a_capture_is_not_waited_for(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    captured, other = fence.mock.stream(), fence.mock.stream()
    fence.mock.begin_capture(captured)
    cupti.launch(stream=captured)
    cupti.launch()  # the legacy stream cannot be waited for either while another is captured
    assert fence.mock.calls("cuStreamSynchronize") == 0
    cupti.launch(stream=other)  # but this one can, and must not break the capture
    assert fence.mock.calls("cuStreamSynchronize") == 1
    fence.mock.end_capture(captured)
    cupti.launch(stream=captured)
    assert fence.mock.calls("cuStreamSynchronize") == 2


def test_a_launch_whose_stream_is_unknown_waits_for_the_context_unless_one_is_captured(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    cupti.native.mock_cupti_call(b"cuStreamBeginCapture_v2", None, None, 0)
    cupti.launch("cuLaunchKernelOfTomorrow")
    assert fence.mock.calls("cuCtxSynchronize") == 0
    cupti.native.mock_cupti_call(b"cuStreamEndCapture", None, None, 0)
    context = C.c_void_p(1)
    fence.mock.native.cuCtxPushCurrent_v2(context)
    cupti.launch("cuLaunchKernelOfTomorrow")
    fence.mock.native.cuCtxPopCurrent_v2(C.byref(context))
    assert fence.mock.calls("cuCtxSynchronize") == 1


@pytest.mark.parametrize("result", [4, 201, 400, 709, 900, 906])
def test_errors_that_no_kernel_makes_are_blamed_on_none(result: int, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault(result)
    cupti.launch()
    assert fence.mock.calls("cuStreamSynchronize") == 1
    assert cupti.record() is None


def test_a_launch_that_was_refused_for_its_own_reasons_is_not_blamed(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    cupti.launch(result=1)
    assert cupti.record() is None


def test_a_launch_that_itself_tells_of_a_fault_is_blamed_with_a_doubt(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    cupti.launch(result=700)
    told = cupti.record()
    assert told is not None and told.found == "launch"
    assert "CUDA_LAUNCH_BLOCKING=1" in told.doubts()


def test_the_first_launch_is_written_down_and_no_other(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    cupti.launch(symbol="first")
    cupti.launch(symbol="second")
    told = cupti.record()
    assert told is not None and told.kernel == "first"
    assert list(launch_records(fence.directory)) == [os.getpid()]
    assert not list(fence.directory.glob("*.part"))


def test_launches_of_other_threads_at_that_moment_are_a_doubt(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    fence.mock.fault()
    other = threading.Thread(target=cupti.native.mock_cupti_enter, args=(b"cuLaunchKernel",))
    other.start()
    other.join()
    cupti.launch()
    told = cupti.record()
    assert told is not None and told.concurrent == 1
    assert "1 other threads" in told.doubts()


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("how", ["cuModuleGetFunction", "cuKernelGetFunction", "cuLibraryGetKernel"])
def test_the_blocks_that_the_kernel_was_given_are_listed(how: str, silent: bool, fence: Fence, cupti: Cupti) -> None:
    """`silent`: after a fault the driver answers no more; what parameters a kernel has is known before."""
    cupti.watch()
    scales, out, other = fence.malloc(4096), fence.malloc(512), fence.malloc(64)
    assert scales and out and other
    handle = cupti.hand_out(cupti.kernel([8, 4, 24], KERNEL if how == "cuLibraryGetKernel" else FUNCTION), how)
    if silent:
        cupti.launch(handle=handle, values=[pointer(other), b"\1\0\0\0", bytes(24)])
    fence.mock.fault(silent=silent)
    inside = pointer(0) + pointer(out + 100) + pointer(scales)
    cupti.launch(handle=handle, values=[pointer(scales), b"\1\0\0\0", inside])
    told = cupti.record()
    assert told is not None and told.parameters_read
    assert [(row.address, row.size) for row in told.candidates] == [(scales, 4096), (out, 512)]
    journal = read_journal(fence.directory / f"blocks-{os.getpid()}.bin")
    assert set(told.candidates) <= set(journal.rows)
    raw = json.loads((fence.directory / f"launch-{os.getpid()}.json").read_text())
    assert [(one["parameter"], one["offset"], one["value"]) for one in raw["candidates"]] == [(0, 0, scales), (2, 8, out + 100)]


def test_of_an_unknown_handle_the_driver_is_asked_after_the_fault_only(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    scales = fence.malloc(4096)
    handle = cupti.kernel([8])
    cupti.launch(handle=handle, values=[pointer(scales)])
    assert fence.mock.calls("cuFuncGetParamInfo") == 0
    fence.mock.fault()
    cupti.launch(handle=handle, values=[pointer(scales)])
    told = cupti.record()
    assert told is not None and [row.address for row in told.candidates] == [scales]


@pytest.mark.parametrize("unload", ["cuModuleUnload", "cuLibraryUnload"])
def test_a_handle_of_an_unloaded_module_is_forgotten(unload: str, fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    scales = fence.malloc(4096)
    handle = cupti.hand_out(cupti.kernel([8]))
    cupti.launch(handle=handle, values=[pointer(0)])
    cupti.native.mock_cupti_call(unload.encode(), None, None, 0)
    C.memmove(handle, cupti.kernel([8, 8]), C.sizeof(MockKernel))  # another kernel has the handle now
    fence.mock.fault()
    cupti.launch(handle=handle, values=[pointer(0), pointer(scales)])
    told = cupti.record()
    assert told is not None and [row.address for row in told.candidates] == [scales]


def test_parameters_that_cannot_be_read_leave_the_name(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    scales = fence.malloc(4096)
    handle = cupti.hand_out(cupti.kernel([8, 8]))
    fence.mock.fault()
    unmapped = (C.c_void_p * 2)(4096, C.addressof(kept := C.create_string_buffer(pointer(scales), 8)))
    cupti.native.mock_cupti_kernel(b"cuLaunchKernel", b"name", C.c_void_p(handle), None, unmapped, None, 0)
    told = cupti.record()
    assert told is not None and told.kernel == "name"
    assert [row.address for row in told.candidates] == [scales], kept


def test_parameters_in_one_buffer_are_read_too(fence: Fence, cupti: Cupti) -> None:
    cupti.watch()
    scales = fence.malloc(4096)
    fence.mock.fault()
    cupti.launch(handle=cupti.kernel([]), extra=bytes(16) + pointer(scales))
    told = cupti.record()
    assert told is not None and [row.address for row in told.candidates] == [scales]


def test_the_python_line_that_launched_is_kept(fence: Fence, cupti: Cupti) -> None:
    cupti.watch(STACK_FUNCTION(StackRecorder(str(fence.directory)).number))
    fence.mock.fault()
    cupti.launch()
    told = cupti.record()
    assert told is not None and told.stack
    frames = read_stacks(fence.directory / f"stacks-{os.getpid()}.jsonl")[told.stack]
    assert any("in test_the_python_line_that_launched_is_kept: cupti.launch()" in frame for frame in frames)


def test_nothing_is_watched_before_cuda_is_used(fence: Fence, cupti: Cupti) -> None:
    before = cupti.native.mock_cupti_subscriptions()
    fence.watch_launches(Options(directory=str(fence.directory), libcuda=fence._libcuda), str(cupti.path))
    assert cupti.native.mock_cupti_subscriptions() == before
    for _ in range(3):
        fence.malloc(16)
    assert cupti.native.mock_cupti_subscriptions() == before + 1


@pytest.mark.parametrize(
    ("cupti_path", "refusal", "told"),
    [("/no/libcupti.so.12", 0, "/no/libcupti.so.12"), ("", 39, "cuptiSubscribe answers 39 (CUPTI_ERROR_MOCK)")],
)
def test_without_cupti_the_run_goes_on_and_says_so_once(
    cupti_path: str, refusal: int, told: str, fence: Fence, cupti: Cupti, capfd: pytest.CaptureFixture[str]
) -> None:
    cupti.native.mock_cupti_refuse(refusal)
    cupti.watch(cupti=cupti_path)
    assert fence.malloc(16)
    said = capfd.readouterr().err
    assert said.count("launches are not watched") == 1
    assert told in said
    cupti.native.mock_cupti_refuse(0)
    watch = watches(fence.directory)[os.getpid()]
    assert (watch.cupti, watch.loaded) == (cupti_path or str(cupti.path), not cupti_path)
    assert told in watch.problem and told in watch.missing()


def test_where_cupti_was_looked_for_is_kept_for_the_report(fence: Fence, cupti: Cupti) -> None:
    cupti.watch(cupti="libcupti.so.99", looked='/a/"b", /c')
    watch = watches(fence.directory)[os.getpid()]
    assert (watch.pid, watch.cupti, watch.looked, watch.loaded) == (os.getpid(), "libcupti.so.99", '/a/"b", /c', False)
    assert '(looked for: /a/"b", /c)' in watch.missing()
    for name, wheel in (("/x/libcupti.so.12", "nvidia-cuda-cupti-cu12"), ("libcupti.so.13", "nvidia-cuda-cupti")):
        advice = replace(watch, cupti=name).advice()
        assert f"`pip install {wheel}`" in advice
        assert "VLLM_GLM_PATCH_FENCE_CUPTI" in advice


def test_a_process_whose_launches_are_watched_says_so(fence: Fence, cupti: Cupti) -> None:
    assert watches(fence.directory) == {}
    cupti.watch()
    watch = watches(fence.directory)[os.getpid()]
    assert (watch.cupti, watch.loaded, watch.problem, watch.missing()) == (str(cupti.path), True, "", "")
    (fence.directory / "watch-9.json").write_text("{")
    assert list(watches(fence.directory)) == [os.getpid()]


def test_a_library_that_is_no_cupti_is_refused_by_name(fence: Fence, cupti: Cupti, capfd: pytest.CaptureFixture[str]) -> None:
    cupti.watch(cupti=fence._libcuda)
    assert "there is no cupti" in capfd.readouterr().err


def test_cupti_is_looked_for_beside_torch_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = str(tmp_path / "site-packages/torch/__init__.py")
    toolkit = tmp_path / "toolkit"
    monkeypatch.setattr(launches_module, "TOOLKIT", toolkit)
    assert find_cupti(torch, "12.8") == "libcupti.so.12"
    places = ", ".join(cupti_places(torch, "12.8"))
    for place in (tmp_path / "site-packages/nvidia/cuda_cupti/lib/libcupti.so.12", toolkit, "LD_LIBRARY_PATH"):
        assert str(place) in places
    toolkit.mkdir()
    (toolkit / "libcupti.so.12").touch()
    (toolkit / "libcupti.so.13").touch()
    assert find_cupti(torch, "12.8") == str(toolkit / "libcupti.so.12")
    assert find_cupti(torch, "13.0") == str(toolkit / "libcupti.so.13")
    for name in ("nvidia/cuda_cupti/lib/libcupti.so.12", "nvidia/cu13/lib/libcupti.so.13"):
        beside = tmp_path / "site-packages" / name
        beside.parent.mkdir(parents=True)
        beside.touch()
        assert find_cupti(torch, "13.0" if "cu13" in name else "12.8") == str(beside)


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "launch-1.json"
    assert read_launch(path) is None
    for text in ("{", "[]", "{}", json.dumps({**RECORD, "candidates": [{}]}), json.dumps({**RECORD, "more": 1})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"launch-1\.json is no record"):
            read_launch(path)


INSTALL = """
import os, sys, types
from pathlib import Path
class Native:
    def __getattr__(self, name): return lambda *_: None
memory = types.SimpleNamespace(
    CUDAPluggableAllocator=lambda *_: types.SimpleNamespace(allocator=Native), change_current_allocator=lambda _: None
)
torch = types.ModuleType("torch")
torch.__version__, torch.__file__ = "2.8.0", "/nowhere/torch/__init__.py"
torch.version = types.SimpleNamespace(cuda="12.8")
torch.cuda = types.SimpleNamespace(is_initialized=lambda: False, memory=memory)
sys.modules["torch"] = torch
from vllm_glm_patch.fence import accounting, install_from_environment
accounting.install = lambda *_: None
assert install_from_environment()
import ctypes
from vllm_glm_patch.fence import installed
mock = ctypes.CDLL(os.environ["VLLM_GLM_PATCH_FENCE_LIBCUDA"])
cupti = ctypes.CDLL(os.environ["VLLM_GLM_PATCH_FENCE_CUPTI"])
assert installed().malloc(16)
mock.mock_fault(700, 0)
def the_line_that_launches():
    cupti.mock_cupti_kernel(b"cuLaunchKernel", b"planted", None, None, None, None, 0)
the_line_that_launches()
print(os.getpid(), flush=True)
os._exit(0)
"""


def test_the_option_watches_a_whole_process(libraries: tuple[Path, Path], mock_cupti: Path, tmp_path: Path) -> None:
    options = Options(
        library=str(libraries[0]), libcuda=str(libraries[1]), launches=True, cupti=str(mock_cupti), directory=str(tmp_path)
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, **options.to_environment(), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", INSTALL], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = read_launch(tmp_path / f"launch-{done.stdout.strip()}.json")
    assert told is not None and told.kernel == "planted"
    assert any("the_line_that_launches" in frame for frame in read_stacks(tmp_path / f"stacks-{told.pid}.jsonl")[told.stack])
