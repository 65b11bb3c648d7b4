"""The native Hopper kernels on a card: each step against float64 from poisoned buffers, repeatable, captured in graphs.

Needs libglm_hopper.so and the cubins in the package (`python benchmarks/hopper.py --build …`, or the wheel). For a picture
of a fault, and for kernels that hang, run `benchmarks/hopper.py --check` first: a hang here stops the whole run.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

SEED = random.SystemRandom().randrange(1 << 31)

_CASES = [
    # tokens, intermediate size, experts here and in all, GEMM1, GEMM2, slice, slots, routing; tokens of a band
    (1, 192, 160, 160, "decode_t8", "decode_t8", 0, 0, "spread"),
    (64, 192, 160, 160, "decode_t8", "decode_t8", 0, 0, "bad"),
    (200, 384, 40, 40, "decode_t16", "decode_t16", 0, 0, "skewed"),
    (300, 768, 16, 16, "decode_t32", "decode_t32", 0, 0, "none"),
    (500, 1536, 20, 160, "decode_t64", "decode_t64", 0, 0, "spread"),
    (1024, 192, 160, 160, "row_c1", "sum_n128", 128, 2, "spread"),
    (8191, 192, 160, 160, "row_c1", "sum_n256", 256, 2, "spread"),
    (8192, 192, 160, 160, "row_c1", "sum_n128", 256, 3, "bad"),
    (3000, 192, 160, 160, "row_c1", "sum_n256", 512, 2, "collapsed"),
    (4096, 384, 40, 40, "columns_c1", "sum_n256", 256, 2, "skewed"),
    (2048, 1536, 20, 160, "columns_c1", "sum_n128", 256, 2, "spread"),
    (8191, 192, 160, 160, "row_split", "sum_n256", 256, 2, "spread"),
    (8191, 192, 160, 160, "row_split_l2", "sum_n256", 256, 2, "bad"),
    (3000, 192, 160, 160, "row_split", "sum_n128", 256, 2, "skewed"),
    (300, 192, 160, 160, "row_quarter", "sum_n128", 128, 3, "bad"),
    (1024, 192, 160, 160, "row_quarter", "ring_n128", 256, 3, "spread"),
    (3000, 192, 160, 160, "row_quarter", "sum_n256", 256, 2, "skewed"),
    (2048, 1536, 20, 160, "columns_split", "sum_n256", 256, 2, "bad"),
    (513, 768, 16, 16, "exact_c1", "sum_n256", 512, 2, "spread"),
    (100, 192, 16, 16, "row_c1", "sum_n128", 128, 2, "none"),
    (8192, 192, 160, 160, "row_c1", "sum_n256", 256, 3, "spread", 2048),
    (8191, 192, 160, 160, "row_c1", "sum_n128", 256, 2, "skewed", 1024),
    (5000, 384, 40, 40, "columns_c1", "sum_n256", 512, 2, "bad", 1152),
    (8192, 192, 160, 160, "row_c1", "ring_n256", 256, 2, "spread"),
    (8191, 192, 160, 160, "row_c1", "ring_n128", 256, 3, "bad"),
    (8192, 192, 160, 160, "row_c1", "ring_n256", 512, 2, "skewed"),
    (3000, 192, 160, 160, "row_c1", "ring_n128", 512, 2, "collapsed"),
    (4096, 384, 40, 40, "columns_c1", "ring_n256", 256, 3, "skewed"),
    (2048, 1536, 20, 160, "columns_c1", "ring_n256", 256, 2, "spread"),
    (100, 192, 16, 16, "row_c1", "ring_n128", 256, 2, "none"),
    (8191, 192, 160, 160, "row_c1", "ring_n256", 256, 3, "skewed", 1024),
    (8192, 192, 160, 160, "row_c1", "turns_lanes_n256", 256, 2, "spread"),
    (8191, 192, 160, 160, "row_c1", "turns_lanes_n256", 256, 3, "bad"),
    (1024, 192, 160, 160, "row_c1", "turns_lanes_n256", 512, 2, "skewed"),
    (3000, 192, 160, 160, "row_c1", "turns_lanes_n256", 256, 3, "collapsed"),
    (4096, 384, 40, 40, "columns_c1", "turns_lanes_n256", 256, 3, "skewed"),
    (2048, 1536, 20, 160, "columns_c1", "turns_lanes_n256", 256, 2, "spread"),
    (100, 192, 16, 16, "row_c1", "turns_lanes_n256", 256, 2, "none"),
    (8191, 192, 160, 160, "row_c1", "turns_lanes_n256", 256, 3, "skewed", 1024),
]


_PROLOGUES = [
    # tokens, experts here and in all, kernels, routing, ids; tokens of a band
    (1, 160, 160, "decode_t8", "decode_t8", "spread", "int32"),
    (64, 160, 160, "decode_t8", "decode_t16", "bad", "int64"),
    (128, 20, 160, "decode_t16", "decode_t16", "skewed", "int32"),
    (129, 160, 160, "decode_t16", "decode_t8", "none", "int32"),
    (1000, 160, 160, "row_c1", "sum_n128", "bad", "int64"),
    (8192, 160, 160, "row_c1", "sum_n256", "spread", "int32"),
    (8191, 20, 160, "row_c1", "sum_n128", "skewed", "int64", 1024),
    (8192, 160, 160, "row_c1", "sum_n128", "collapsed", "int32", 128),
    (16384, 160, 160, "row_c1", "sum_n256", "bad", "int32", 2048),
]


def _ids(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-N{case[1]}-{case[4]}-{case[5]}-{'-'.join(map(str, case[8:]))}"


@pytest.fixture(scope="module")
def native() -> Any:
    """The launcher with all kernels loaded on device 0."""
    from vllm_glm_patch.moe.hopper.errors import HopperError
    from vllm_glm_patch.moe.hopper.library import loader

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the native kernels are for compute capability 9.0")
    try:
        return loader().on(0)
    except HopperError as error:
        pytest.fail(f"the native kernels do not load: {error}")


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _layer(native: Any, case: tuple[Any, ...]) -> tuple[Any, Any, int]:
    """(inputs, configuration, multiprocessors)."""
    from vllm_glm_patch.moe.generators import make_inputs
    from vllm_glm_patch.moe.hopper.backend import HopperConfig
    from vllm_glm_patch.moe.problem import Problem

    print(f"SEED={SEED}")
    tokens, width, experts, global_experts, gemm1, gemm2, slice_width, slots, routing, *band = case
    inputs = make_inputs(Problem(tokens, 5120, width, experts, global_experts), SEED, routing, "cuda")
    config = HopperConfig(f"glm_gemm1_{gemm1}", f"glm_gemm2_{gemm2}", slice_width or 256, slots or 2, band=sum(band))
    return inputs, config, torch.cuda.get_device_properties(0).multi_processor_count


@pytest.mark.parametrize("case", _CASES, ids=_ids)
def test_every_step_agrees_with_float64(native: Any, case: tuple[Any, ...]) -> None:
    from hopper_stages import check_layer

    report = check_layer(native, *_layer(native, case), _stream)
    assert report.wrong == 0, "\n".join(report.lines)


@pytest.mark.parametrize("case", [case for case in _CASES if case[0] >= 64], ids=_ids)
def test_repeats_to_the_bit_in_a_graph_and_with_fewer_blocks(native: Any, case: tuple[Any, ...]) -> None:
    """However few blocks there are, whoever does an item, launched or replayed: the same bits."""
    from vllm_glm_patch.moe.hopper.backend import HopperPass, workspace_bytes
    from vllm_glm_patch.moe.pipeline import Tensors

    inputs, config, multiprocessors = _layer(native, case)
    outputs = []
    for count in (multiprocessors, multiprocessors, 37):
        out = torch.full_like(inputs.hidden_states, float("nan"))
        tensors = Tensors(*inputs.positional(), inputs.expert_map, out)
        room = torch.full((workspace_bytes(inputs.problem, config, native),), 0xFF, dtype=torch.uint8, device="cuda")
        layer = HopperPass(native, inputs.problem, config, tensors, room, count, _stream)
        if len(outputs) == 1:
            layer.run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layer.run()
            out.fill_(float("nan"))
            for _ in range(3):
                graph.replay()
        else:
            layer.run()
        torch.cuda.synchronize()
        outputs.append(out)
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0].view(torch.int16), outputs[1].view(torch.int16))
    assert torch.equal(outputs[0].view(torch.int16), outputs[2].view(torch.int16))


@pytest.mark.parametrize("case", _PROLOGUES, ids=lambda case: "-".join(map(str, case)))
def test_native_prologue_makes_tritons_bits_launched_and_replayed(native: Any, case: tuple[Any, ...]) -> None:
    """Rows of zeros, of NaN, with infinities, huge and tiny ones among them; twice at once on two streams, too."""
    from hopper_stages import Report, compare_prologues

    from vllm_glm_patch.moe.generators import make_expert_map, make_routing, make_tokens
    from vllm_glm_patch.moe.hopper.backend import HopperConfig, HopperPass, band_of, triton_config, workspace_bytes
    from vllm_glm_patch.moe.pipeline import Pass, Tensors
    from vllm_glm_patch.moe.problem import Problem

    print(f"SEED={SEED}")
    tokens, experts, global_experts, first, second, routing, kind, *band = case
    problem = Problem(tokens, 5120, 192, experts, global_experts)
    config = HopperConfig(f"glm_gemm1_{first}", f"glm_gemm2_{second}", 256, 2, band=sum(band), prologue="native")
    shared = triton_config(problem, config, native)
    generator = torch.Generator("cuda").manual_seed(SEED)
    weights, ids = make_routing(problem, generator, routing)
    expert_map = make_expert_map(problem, rank=1)
    hidden = make_tokens(problem, generator)
    for place, value in enumerate((0.0, -0.0, float("nan"), 3e38, 1e-40)):
        hidden[place + 2 :: 16] = value
    hidden[8::16, 17::64] = float("inf")
    hidden[9::16, 5::8] = float("nan")
    # GEMMs are not run: of their tensors only addresses are needed.
    nothing = torch.zeros(16, dtype=torch.uint8, device="cuda")
    weight = nothing.as_strided((1, 1, 16), (2 * 192 * 5120, 16, 1))
    there = None if expert_map is None else expert_map.cuda()
    ids = ids.to(getattr(torch, kind))
    tensors = Tensors(hidden, weight, weight, nothing, nothing, weights, ids, there, torch.empty_like(hidden))
    size = workspace_bytes(problem, config, native)
    rooms = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(3)]
    layers = [HopperPass(native, problem, config, tensors, room, 132, _stream) for room in rooms[:2]]
    passes = [Pass(problem, shared, tensors, room, 132, band=band_of(config, shared)) for room in rooms]

    def compare() -> None:
        torch.cuda.synchronize()
        report = Report()
        for ours in passes[:2]:
            compare_prologues(report, ours, passes[2])
        assert report.wrong == 0, "\n".join(report.lines)

    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(20):
        for stream, layer in zip(streams, layers):
            with torch.cuda.stream(stream):
                layer.prologue()
    compare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer.prologue()
    for room in rooms:
        room.fill_(0x5A)
    for _ in range(3):
        graph.replay()
    compare()
