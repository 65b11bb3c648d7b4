"""Logs as vLLM 0.10.0 to 0.33.0 write them: prefixes, colours, dumps, whatever the error surfaces through."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from vllm_glm_patch.fence.coredump import read_core_dump
from vllm_glm_patch.fence.diagnose import Signature, diagnose, read_log

FAULT = Signature("scale-overread", "illegal memory access", tokens_multiple_of=16)

# What an operator of the reported release posts. The requests' ids have colons and commas of their own.
V0_10 = """\
(APIServer pid=1) INFO 11-20 09:59:01 [api_server.py:1805] vLLM API server version 0.10.1.1
(EngineCore_0 pid=207) INFO 11-20 09:59:20 [core.py:74] Initializing a V1 LLM engine (v0.10.1.1) with config: model='/m', x
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [dump_input.py:69] Dumping input data for V1 LLM engine (v0.10.1.1) with config: \
model='/m', speculative_config=None, max_seq_len=131072, compilation_config={"level":3,"cudagraph_capture_sizes":[512,16,1]},
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [dump_input.py:76] Dumping scheduler output for model execution: \
SchedulerOutput(scheduled_new_reqs=[NewRequestData(req_id=chatcmpl-7e1,prompt_token_ids_len=20110,mm_kwargs=[],block_ids=\
([1, 2],),num_computed_tokens=0,lora_request=None)], scheduled_cached_reqs=CachedRequestData(req_ids=['cmpl-3'], \
num_computed_tokens=[4096]), num_scheduled_tokens={chatcmpl-7e1: 8191, cmpl-3: 1}, total_num_scheduled_tokens=8192, \
scheduled_spec_decode_tokens={}, scheduled_encoder_inputs={}, num_common_prefix_blocks=[0], finished_req_ids=[])
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [core.py:700] EngineCore encountered a fatal error.
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [core.py:700] Traceback (most recent call last):
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [core.py:700]   File "/root/.cache/vllm/torch_compile_cache/ab/inductor_cache/xy/\
cxy.py", line 812, in call
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [core.py:700]     triton_poi_fused_3.run(arg0, stream=stream0)
(EngineCore_0 pid=207) ERROR 11-20 10:01:12 [core.py:700] RuntimeError: Triton Error [CUDA]: an illegal memory access was \
encountered
(APIServer pid=1) ERROR 11-20 10:01:13 [async_llm.py:430] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered
"""

# A recent one: colours, the logo, AcceleratorError, the table of this package.
V0_26 = """\
\x1b[36m(APIServer pid=1)\x1b[0;0m INFO 03-02 08:00:00 [api_utils.py:345] \n       \x1b[97;1m█     █     █▄   ▄█\x1b[0m
 \x1b[93m▄▄\x1b[0m \x1b[94m▄█\x1b[0m \x1b[97;1m█     █     █ ▀▄▀ █\x1b[0m  version \x1b[97;1m0.26.0\x1b[0m
\x1b[36m(EngineCore_DP0 pid=9)\x1b[0;0m INFO 03-02 08:00:05 [x.py:9] vllm-glm-patch 0.1.0 on vLLM 0.26.0
\x1b[36m(EngineCore_DP0 pid=9)\x1b[0;0m INFO 03-02 08:00:05 [x.py:9]   routing-ids     applied              expert ids
\x1b[36m(EngineCore_DP0 pid=9)\x1b[0;0m INFO 03-02 08:00:05 [x.py:9]   scale-overread  not needed           vLLM 0.26.0
\x1b[36m(EngineCore_DP0 pid=9)\x1b[0;0m ERROR 03-02 08:09:00 [dump_input.py:76] Dumping scheduler output for model execution: \
SchedulerOutput(scheduled_new_reqs=[], num_scheduled_tokens={cmpl-a-0: 4096, cmpl-b-0: 77}, total_num_scheduled_tokens=4173, \
scheduled_spec_decode_tokens={}, num_invalid_spec_tokens=null, new_block_ids_to_zero=null)
\x1b[36m(EngineCore_DP0 pid=9)\x1b[0;0m ERROR 03-02 08:09:00 [core.py:1] torch.AcceleratorError: CUDA error: an illegal memory \
access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
"""


def test_the_reported_release() -> None:
    seen = read_log(V0_10)
    assert (seen.version, seen.tokens, seen.kernels) == ("0.10.1.1", (8192,), ())
    assert seen.errors == ("Triton Error [CUDA]: an illegal memory access was encountered",)
    assert seen.surfaced.endswith("cxy.py:812 in call")


def test_a_recent_release_with_colours_and_our_table() -> None:
    seen = read_log(V0_26)
    assert (seen.version, seen.tokens) == ("0.26.0", (4173,))
    assert seen.errors == ("CUDA error: an illegal memory access was encountered",)
    assert seen.patches == (("routing-ids", "applied"), ("scale-overread", "not needed"))


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("INFO [api_server.py:1] vLLM API server version 0.10.0", "0.10.0"),
        ("INFO vLLM server version 0.26.0, serving model glm", "0.26.0"),
        ("Initializing a V1 LLM engine (v0.14.1) with config: x", "0.14.1"),
        (
            "Initializing a V1 LLM engine (v0.11.1rc2.dev12+g0123abc.d20251101) with config",
            "0.11.1rc2.dev12+g0123abc.d20251101",
        ),
        ("vLLM Version                 : 0.17.1", "0.17.1"),
        ("vllm==0.13.0", "0.13.0"),
        ("vllm                              0.11.0", "0.11.0"),
        ("transformers==4.57.1", ""),
    ],
)
def test_a_version_is_found_wherever_it_stands(line: str, version: str) -> None:
    assert read_log(line).version == version


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("RuntimeError: CUDA error: an illegal memory access was encountered", True),
        ("[rank3]:[E1120 ProcessGroupNCCL.cpp:1899] [PG ID 2] Process group watchdog thread terminated with exception: "
         "CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: CUDA driver error: an illegal memory access was encountered", True),
        ("Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:455 'an illegal memory access was encountered'", True),
        ('{"level":"ERROR","message":"x: CUDA error: an illegal memory access was encountered\\nCUDA kernel", "y":1}', True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("INFO: CUDA graphs captured in 20 s", None),
    ],
)  # fmt: skip
def test_an_error_is_seen_through_whatever_it_surfaces(line: str, error: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"total_num_scheduled_tokens=8192\n{line}\n")
    answer = diagnose(path, [FAULT])
    assert bool(answer.evidence.errors) == (error is not None)
    assert bool(answer.matches) == bool(error)
    assert all("kernel" not in one for one in answer.evidence.errors)


def test_a_dump_that_is_cut_short_is_counted_from_its_requests() -> None:
    text = "SchedulerOutput(scheduled_new_reqs=[...], num_scheduled_tokens={chatcmpl-a:b: 8000, cmpl-1: 192}, total_num_sch"
    assert read_log(text).tokens == (8192,)


def test_a_dump_in_json_is_read() -> None:
    text = (
        r'{"message":"Dumping scheduler output: {\"num_scheduled_tokens\": {\"a\": 16}, \"total_num_scheduled_tokens\": 16}"}'
    )
    assert read_log(text).tokens == (16,)


def test_a_packed_log_and_one_with_broken_bytes_are_read(tmp_path: Path) -> None:
    packed, broken = tmp_path / "log.gz", tmp_path / "log"
    packed.write_bytes(gzip.compress(V0_10.encode()))
    broken.write_bytes(b"\xff\xfe\x00" + V0_10.encode() + b"\xc3")
    for path in (packed, broken):
        assert [match.signature.patch for match in diagnose(path, [FAULT]).matches] == ["scale-overread"]


def test_one_answer_a_defect(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(V0_10)
    by_kernel = Signature("scale-overread", "illegal memory access", kernel="Gemm")
    (match,) = diagnose(path, [by_kernel, FAULT]).matches
    assert (match.signature, match.certain) == (FAULT, True)


def test_the_frame_where_it_surfaced_is_told_not_to_be_to_blame(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(V0_10)
    text = diagnose(path, [FAULT]).text()
    assert (
        "It surfaced in /root/.cache/vllm/torch_compile_cache/ab/inductor_cache/xy/cxy.py:812 in call, which need not" in text
    )


# Core dumps that tell nothing: a stand-in for cuda-gdb says what was seen.

SAID = {
    "no device": "/build/cuda-gdb/13.0/gdb/cuda/cuda-coredump.c:512: internal-error: Assertion `m_num_devices > 0' failed.",
    "cut short": "cuda-gdb/gdb/target.c:99: internal-error: unexpected end of section\nAborted (core dumped)",
    "no fault": "Opening GPU coredump: core\nThe target has no exception.",
}


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no device", r"\(69 KiB\) holds no device.*nothing else on the card.*CUDA_LAUNCH_BLOCKING=1.*fence --rerun"),
        ("cut short", r"found no fault in .*It broke off itself, as on a dump that is cut short\. It said: .*unexpected end"),
        ("no fault", r"found no fault in .*KiB\)\. It said: .*The target has no exception"),
    ],
)
def test_a_dump_that_tells_nothing_says_why_and_what_to_do(
    what: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debugger = tmp_path / "cuda-gdb"
    debugger.write_text(f"#!/bin/sh\ncat <<'END'\n{SAID[what]}\nEND\nexit 134\n")
    debugger.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    dump = tmp_path / "core-9.nvcudmp"
    dump.write_bytes(b"\x7fELF" + bytes(69 * 1024))
    with pytest.raises(RuntimeError) as error:
        read_core_dump(dump)
    assert re.search(told, str(error.value), re.S), error.value
