"""The launcher over a mock driver: what is launched is what abi.h says, maps are kept, and every refusal says why."""

from __future__ import annotations

import ctypes as C
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hopper_host import (
    CSRC,
    HOST_SOURCES,
    LIBRARY_FLAGS,
    NATIVE,
    Mock,
    argument_sizes,
    compile_cpp,
    mock_image,
    table,
)

from vllm_glm_patch.moe.hopper.errors import HopperError
from vllm_glm_patch.moe.hopper.native import Layer, Native, numbers

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 5120, 192, 160, 8, 300
INVALID = "CUDA_ERROR_INVALID_VALUE (1): invalid argument"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(libglm_hopper.so, the mock of libcuda.so.1)."""
    where = tmp_path_factory.mktemp("hopper-build")
    return (
        compile_cpp(where / "libglm_hopper.so", HOST_SOURCES, "-Wall", "-Wextra", "-Werror", *LIBRARY_FLAGS),
        compile_cpp(where / "libcuda_mock.so", [NATIVE / "mock_driver.cpp"], "-O1", "-fPIC", "-shared"),
    )


@pytest.fixture
def mock(built: tuple[Path, Path]) -> Mock:
    mock = Mock(built[1])
    mock.native.mock_reset()
    return mock


@pytest.fixture
def opened(built: tuple[Path, Path], mock: Mock) -> Iterator[Native]:
    """A launcher with nothing loaded; afterwards nothing may have leaked and no rule of CUDA been broken."""
    native = Native(built[0])
    native.open(mock.path)
    native.cache_resize(1024)
    yield native
    native.close()
    assert mock.violations() == ""
    assert mock.native.mock_leaks() == 0


@pytest.fixture
def native(opened: Native) -> Native:
    """A launcher with all kernels on devices 0 and 1."""
    for device in (0, 1):
        for source in opened.sources:
            opened.load(device, source, mock_image(source))
    return opened


def layer(**changes: int) -> Layer:
    """A layer of TP8's sizes whose addresses tell which member they are: number of the member × 1 MiB."""
    values = {name: (1 + i) << 20 for i, (name, kind) in enumerate(Layer._fields_) if kind is Layer._fields_[0][1]}
    values |= {"w13_stride": 2 * WIDTH * HIDDEN, "w2_stride": WIDTH * HIDDEN, "tokens_count": TOKENS, "hidden_size": HIDDEN}
    values |= {"intermediate_size": WIDTH, "experts": EXPERTS, "top_k": TOP_K, "max_tiles": 416, "slice": 512, "slots": 3}
    values |= {"band": 128, "global_experts": EXPERTS, "tile_rows_1": 8, "tile_rows_2": 16, "wide_ids": 1}
    values |= {"early_steps": 6, "early_items": 7}
    return Layer(**{**values, "programmatic": 1, **changes})


def run(native: Native, name: str, mock: Mock, device: int = 0, stream: int = 0x77, **changes: int):
    native.run(device, stream, layer(**changes), numbers(native.by_name[name]))
    (launch,) = mock.launches()
    return launch


def test_the_table_is_the_one_of_abi_h(opened: Native) -> None:
    ours = [(k.name, k.source, k.family.name.lower(), k.tile_rows, k.tile_columns, k.cluster) for k in opened.kernels]
    assert ours == [(r.name, r.source, r.family, r.tile_rows, r.tile_columns, r.cluster) for r in table()]
    assert len(ours) >= 15


def test_structures_are_as_the_header_declares_them() -> None:
    text = (CSRC / "host/glm_hopper.h").read_text()
    body = text.split("struct GlmHopperLayer {")[1].split("};")[0]
    members = re.findall(r"^  ((?:const )?\w+\*?) (\w+);", body, re.MULTILINE)
    kinds = {"int32_t": "c_int", "int64_t": "c_long"}
    declared = [(name, "c_void_p" if kind.endswith("*") else kinds[kind]) for kind, name in members]
    assert declared == [(name, kind.__name__) for name, kind in Layer._fields_]


@pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
def test_every_kernel_is_launched_as_abi_h_says(row, native: Native, mock: Mock) -> None:
    launch = run(native, row.name, mock, stream=0x1234)
    assert launch.kernel == row.name
    assert launch.stream == 0x1234
    assert launch.block == row.block
    assert launch.cluster == (0 if row.cluster == 1 else row.cluster)
    assert launch.programmatic == row.programmatic
    if row.grid == "persistent":
        # Of the mock's GPCs six have 16 multiprocessors and two have 18.
        assert launch.grid == (132 if row.cluster == 1 else row.cluster * (6 * (16 // row.cluster) + 2 * (18 // row.cluster)))
    elif row.grid == "prologue":
        assert launch.grid == {1: 1 + TOKENS // 2, 8: 160}[row.cluster]  # a cluster, two tokens a block, whole clusters
    else:
        assert launch.grid == -(-TOKENS * HIDDEN // 8 // row.block)
    if row.family == "sum":
        assert launch.shared == 0
    elif row.family == "gemm2_ring":
        assert launch.shared == row.stages * row.stage_bytes + 2048
    elif row.family == "prologue":
        assert launch.shared == row.stage_bytes
    else:
        room = -(-row.tile_rows * (-(-WIDTH // 128) * 128 + 280) // 1024) * 1024 if row.family == "gemm2_decode" else 0
        assert launch.shared == row.stages * row.stage_bytes + 4096 + 1024 + 2 * room  # both warpgroups fit at this width
    assert [len(argument) for argument in launch.arguments] == argument_sizes()[row.family]
    maps = {
        "w13_rows": ([HIDDEN, 2 * WIDTH, EXPERTS], [HIDDEN, 2 * WIDTH * HIDDEN], [128, 96, 1], "w13"),
        "w13_quarters": (
            [HIDDEN, WIDTH, 2, EXPERTS],
            [HIDDEN, WIDTH * HIDDEN, 2 * WIDTH * HIDDEN],
            [128, 48, 2, 1],
            "w13",
        ),
        "w13_interleaved": (
            [HIDDEN, 8, 2, WIDTH // 8, EXPERTS],
            [HIDDEN, WIDTH * HIDDEN, 8 * HIDDEN, 2 * WIDTH * HIDDEN],
            [128, 8, 2, 4, 1],
            "w13",
        ),
        "act_rows": ([WIDTH, TOKENS * TOP_K], [WIDTH], [128, 128], "act_quantised"),
        "w2_rows": ([WIDTH, HIDDEN, EXPERTS], [WIDTH, WIDTH * HIDDEN], [128, 128, 1], "w2"),
        "act_steps_64": ([64, TOKENS * TOP_K, WIDTH // 64], [WIDTH, 64], [64, 64, 3], "act_quantised"),
        "w2_steps_256": ([64, HIDDEN, WIDTH // 64, EXPERTS], [WIDTH, 64, WIDTH * HIDDEN], [64, 256, 3, 1], "w2"),
        # Two bytes an element: slices of 512 columns, three slots of 128 tokens' choices.
        "partial_rows": ([512, 3 * 128 * TOP_K], [1024], [256, 32], "partial"),
    }
    assert len(row.maps) == [len(argument) for argument in launch.arguments].count(128)
    for index, name in enumerate(row.maps):
        dims, strides, box, member = maps[name]
        found = launch.tensor_map(index)
        assert found.pop("element_bytes") == (2 if name == "partial_rows" else 1)
        assert found == {"base": getattr(layer(), member), "dims": dims, "strides": strides, "box": box}


# What each argument is, by family, in words of the layer; None: a tensor map.
EXPECTED = {
    "glm_gemm1_row_c1": (
        None, "tokens", "token_scales", "w13_scales", "act_quantised", "act_scales", "rows", "tiles", "counts", "max_tiles",
        "hidden_size", "intermediate_size", "top_k", "experts", "early_steps",
    ),
    "glm_gemm1_columns_c1": (
        None, "tokens", "token_scales", "w13_scales", "act", 0, "rows", "tiles", "counts", "max_tiles", "hidden_size",
        "intermediate_size", "top_k", "experts", "early_steps",
    ),
    "glm_gemm2_sum_n128": (
        None, None, "act_scales", "w2_scales", "topk_weights", "partial", "local_ids", "out", "rows", "tiles + 3 * max_tiles",
        "counts", "counts + 3", "band_tiles", "tokens_count", "max_tiles", "hidden_size", "intermediate_size", "experts",
        "top_k", "slice", "slots", "band", "early_items",
    ),
    "glm_gemm2_ring_n256": (
        None, None, None, "act_scales", "w2_scales", "topk_weights", "partial", "local_ids", "out", "rows",
        "tiles + 3 * max_tiles", "counts", "counts + 3", "band_tiles", "tokens_count", "max_tiles", "hidden_size",
        "intermediate_size", "experts", "top_k", "slice", "slots", "band", "early_items",
    ),
    "glm_gemm1_decode_t8": (
        None, "tokens", "token_scales", "w13_scales", "act", "rows", "tiles", "counts", "max_tiles", "hidden_size",
        "intermediate_size", "top_k",
    ),
    "glm_gemm2_decode_t64": (
        None, "act", "w2_scales", "topk_weights", "partial", "rows", "tiles + 3 * max_tiles", "counts", "max_tiles",
        "hidden_size", "intermediate_size",
    ),
    "glm_topk_sum": ("partial", "local_ids", "out", "tokens_count", "hidden_size", "experts", "top_k"),
    "glm_prologue_c8": (
        "hidden", "tokens", "token_scales", "topk_ids", "expert_map", "local_ids", "rows", "histogram", "tiles", "counts",
        "band_tiles", "tokens_count", "hidden_size", "experts", "global_experts", "top_k", "max_tiles", "tile_rows_1",
        "tile_rows_2", "band", "wide_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_every_argument_is_the_one_that_is_meant(name: str, native: Native, mock: Mock) -> None:
    launch, given = run(native, name, mock), layer()
    assert len(launch.arguments) == len(EXPECTED[name])
    special = {"tiles + 3 * max_tiles": given.tiles + 4 * 3 * given.max_tiles, "counts + 3": given.counts + 4 * 3, 0: 0}
    for index, member in enumerate(EXPECTED[name]):
        if member is not None:
            wanted = special[member] if member in special else getattr(given, member)
            assert launch.number(index) == wanted, member


def test_kernels_of_one_run_are_launched_in_order_on_one_stream(native: Native, mock: Mock) -> None:
    names = ("glm_gemm1_decode_t16", "glm_gemm2_decode_t16", "glm_topk_sum")
    native.run(1, 0x99, layer(), numbers(*(native.by_name[name] for name in names)))
    launches = mock.launches()
    assert tuple(launch.kernel for launch in launches) == names
    assert {(launch.device, launch.stream) for launch in launches} == {(1, 0x99)}


def test_programmatic_launches_can_be_switched_off(native: Native, mock: Mock) -> None:
    assert run(native, "glm_gemm2_decode_t8", mock, programmatic=0).programmatic == 0


def test_a_persistent_grid_takes_no_more_than_it_is_allowed(native: Native, mock: Mock) -> None:
    assert run(native, "glm_gemm1_row_c1", mock, multiprocessors=77).grid == 77
    assert run(native, "glm_gemm1_row_c1", mock, multiprocessors=500).grid == 132


def test_a_persistent_grid_is_the_clusters_that_run_at_once_where_the_driver_says(native: Native, mock: Mock) -> None:
    quarter = "glm_gemm1_row_quarter"
    assert run(native, quarter, mock).grid == 4 * 32
    assert run(native, quarter, mock, multiprocessors=77).grid == 76
    assert run(native, quarter, mock, multiprocessors=3).grid == 4
    before = mock.calls("cuOccupancyMaxActiveClusters")
    clustered = [row for row in table() if row.cluster > 1 and row.grid == "persistent"]
    assert before >= len(clustered) > 0
    run(native, quarter, mock)
    assert mock.calls("cuOccupancyMaxActiveClusters") == before, "asked for at the load and at no launch"


def test_a_persistent_grid_is_all_multiprocessors_where_the_driver_does_not_say(opened: Native, mock: Mock) -> None:
    mock.fail("cuOccupancyMaxActiveClusters", 1)
    opened.load(0, "gemm1_quarter.cu", mock_image("gemm1_quarter.cu"))
    assert run(opened, "glm_gemm1_row_quarter", mock).grid == 132


def test_no_tokens_launch_nothing(native: Native, mock: Mock) -> None:
    native.run(0, 0, layer(tokens_count=0), numbers(native.by_name["glm_topk_sum"]))
    assert mock.launches() == []


def test_a_map_is_made_once_for_a_pointer_and_shape(native: Native, mock: Mock) -> None:
    for _ in range(3):
        run(native, "glm_gemm2_sum_n128", mock)
    assert mock.calls("cuTensorMapEncodeTiled") == 2
    before = native.cache_stats()
    assert (before.hits, before.misses, before.evictions, before.entries) == (4, 2, 0, 2)
    other_rows = run(native, "glm_gemm2_sum_n128", mock, tokens_count=TOKENS + 1)  # the same address, another shape
    assert other_rows.tensor_map(0)["dims"] == [WIDTH, (TOKENS + 1) * TOP_K]
    other_place = run(native, "glm_gemm2_sum_n128", mock, w2=0x5000000)
    assert other_place.tensor_map(1)["base"] == 0x5000000
    other_stride = run(native, "glm_gemm2_sum_n128", mock, w2_stride=2 * WIDTH * HIDDEN)
    assert other_stride.tensor_map(1)["strides"] == [WIDTH, 2 * WIDTH * HIDDEN]
    assert native.cache_stats().misses == before.misses + 3


@pytest.mark.parametrize(
    ("changes", "columns", "rows"),
    [
        ({}, 512, 3 * 128 * TOP_K),
        ({"slice": 256, "slots": 2}, 256, 2 * 128 * TOP_K),
        ({"band": 0}, 512, 3 * TOKENS * TOP_K),
        ({"band": 4096}, 512, 3 * TOKENS * TOP_K),  # more than there are: one band of all
        ({"band": 0, "slots": 1, "slice": HIDDEN, "tokens_count": 1}, HIDDEN, TOP_K),
    ],
)
def test_a_map_of_partial_results_covers_their_slots_and_no_more(
    native: Native, mock: Mock, changes: dict[str, int], columns: int, rows: int
) -> None:
    made = run(native, "glm_gemm2_ring_n128", mock, **changes).tensor_map(2)
    assert (made["dims"], made["strides"]) == ([columns, rows], [2 * columns])


def test_one_weight_may_have_two_kinds_of_maps(native: Native, mock: Mock) -> None:
    rows = run(native, "glm_gemm1_row_c1", mock).tensor_map(0)
    interleaved = run(native, "glm_gemm1_decode_t8", mock).tensor_map(0)
    assert rows["base"] == interleaved["base"]
    assert rows["dims"] != interleaved["dims"]


def test_l2_may_fetch_more_of_the_weights_at_once_and_only_of_them(native: Native, mock: Mock) -> None:
    usual = run(native, "glm_gemm2_sum_n128", mock)
    assert [usual.promotion(0), usual.promotion(1)] == [128, 128]
    more = run(native, "glm_gemm2_sum_n128", mock, weight_promotion=256)
    assert [more.promotion(0), more.promotion(1)] == [128, 256]
    assert more.tensor_map(1) == usual.tensor_map(1)


def test_the_least_recently_used_map_goes_first(native: Native, mock: Mock) -> None:
    native.cache_resize(2)
    first, second, third = 0x10000000, 0x20000000, 0x30000000
    for address in (first, second, first, third):  # `second` is the oldest when `third` comes
        run(native, "glm_gemm2_decode_t8", mock, w2=address)
    before = native.cache_stats()
    assert (before.entries, before.evictions) == (2, 1)
    run(native, "glm_gemm2_decode_t8", mock, w2=first)
    assert native.cache_stats().misses == before.misses
    assert run(native, "glm_gemm2_decode_t8", mock, w2=second).tensor_map(0)["base"] == second
    assert native.cache_stats().misses == before.misses + 1


def test_a_map_that_the_driver_refuses_is_not_kept_and_is_described(native: Native, mock: Mock) -> None:
    mock.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(HopperError) as refused:
        run(native, "glm_gemm2_decode_t8", mock)
    text = str(refused.value)
    assert refused.value.code == 1
    for part in (
        "glm_gemm2_decode_t8",
        "cuda:0",
        "w2_rows",
        "dims {192, 5120, 160}",
        "CUDA_ERROR_INVALID_VALUE (1): invalid argument",
    ):
        assert part in text
    mock.fail("cuTensorMapEncodeTiled", 0)
    assert run(native, "glm_gemm2_decode_t8", mock).tensor_map(0)["dims"] == [WIDTH, HIDDEN, EXPERTS]


def test_a_refused_launch_says_the_drivers_words_the_kernel_the_shape_and_what_to_do(native: Native, mock: Mock) -> None:
    mock.fail("cuLaunchKernelEx", 1)
    with pytest.raises(HopperError) as refused:
        run(native, "glm_gemm1_row_c1", mock)
    text = str(refused.value)
    assert refused.value.code == 1
    for part in (
        "glm_gemm1_row_c1",
        "cuda:0",
        "CUDA_ERROR_INVALID_VALUE (1): invalid argument",
        "300 tokens",
        "hidden_size 5120",
    ):
        assert part in text
    for part in (
        "intermediate_size 192",
        "160 experts",
        "top_k 8",
        "132 × 384",
        "clusters of 1",
        "201728 bytes",
        "report this text",
    ):
        assert part in text


def test_an_earlier_kernels_fault_is_told_apart(native: Native, mock: Mock) -> None:
    mock.fail("cuLaunchKernelEx", 700)
    with pytest.raises(HopperError, match=r"CUDA error \(700\).*A kernel that ran before this one failed") as refused:
        run(native, "glm_topk_sum", mock)
    assert refused.value.code == 700


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("glm_gemm1_row_c1", {"hidden_size": 5000}, "hidden_size must be a multiple of 256; the Triton kernels"),
        ("glm_gemm1_columns_c1", {"intermediate_size": 200}, "intermediate_size must be a multiple of 192"),
        ("glm_gemm1_row_c1", {"intermediate_size": 384}, "choose glm_gemm1_columns_"),
        ("glm_gemm2_decode_t8", {"intermediate_size": 1728, "w2_stride": 1728 * HIDDEN}, "1536 or less"),
        ("glm_gemm2_sum_n256", {"slice": 384}, "slice 384 must be a multiple of 256 and divide hidden_size"),
        ("glm_gemm2_sum_n128", {"slots": 1}, "slots is 1; two or more"),
        (
            "glm_gemm2_sum_n128",
            {"slots": 1, "slice": HIDDEN},
            "slots is 1; two or more are needed where there are several slices or bands",
        ),
        (
            "glm_gemm2_sum_n128",
            {"hidden_size": 1 << 17, "slice": 128, "w2_stride": 192 << 17, "band": 0},
            "slice 128 with 1 band needs more counters",
        ),
        (
            "glm_gemm2_sum_n128",
            {"slice": 128, "band": 32, "tokens_count": 32 * 26},
            "slice 128 with 26 bands needs more counters",
        ),
        ("glm_gemm2_sum_n128", {"band": 48}, "band 48 must be a multiple of 32 tokens"),
        ("glm_gemm2_sum_n128", {"band": -32}, "band -32 must be a multiple of 32 tokens"),
        ("glm_gemm2_sum_n256", {"band_tiles": 0}, "band_tiles is null"),
        ("glm_gemm2_ring_n128", {"slice": 128}, "slice 128 must be a multiple of 256; choose glm_gemm2_sum_"),
        ("glm_gemm2_ring_n256", {"slice": 384}, "slice 384 must be a multiple of 256 and divide hidden_size"),
        ("glm_gemm2_ring_n256", {"top_k": 6}, "top_k is 6, and this kernel adds up 8 choices; choose glm_gemm2_sum_"),
        ("glm_gemm2_ring_n256", {"slots": 1}, "slots is 1; two or more"),
        ("glm_gemm2_ring_n256", {"band": 48}, "band 48 must be a multiple of 32 tokens"),
        ("glm_gemm2_ring_n128", {"band": 0, "tokens_count": 1 << 27}, "take fewer slots"),
        ("glm_gemm2_ring_n128", {"partial": 0x1008}, "partial must lie at a multiple of 16 bytes"),
        ("glm_gemm2_ring_n128", {"local_ids": 0}, "local_ids is null"),
        ("glm_gemm2_ring_n128", {"w2": 0}, "w2 is null"),
        ("glm_gemm2_ring_n128", {"act_scales": 0}, "act_scales is null"),
        ("glm_gemm2_ring_n128", {"out": 0}, "out is null"),
        ("glm_gemm2_turns_lanes_n256", {"slice": 128}, "slice 128 must be a multiple of 256 and divide hidden_size"),
        ("glm_gemm2_turns_lanes_n256", {"top_k": 6}, "top_k is 6, and this kernel adds up 8 choices; choose glm_gemm2_sum_"),
        ("glm_gemm2_turns_lanes_n256", {"w2_scales": 0x1008}, "w2_scales must lie at a multiple of 16 bytes"),
        ("glm_gemm2_turns_lanes_n256", {"partial": 0x1008}, "partial must lie at a multiple of 16 bytes"),
        ("glm_gemm2_sum_n128", {"max_tiles": 0}, "max_tiles must be positive"),
        ("glm_topk_sum", {"tokens_count": 1 << 29}, "31 bits"),
        ("glm_topk_sum", {"top_k": -1}, "every size must be positive"),
        ("glm_topk_sum", {"out": 0}, "out is null"),
        ("glm_gemm2_decode_t8", {"act": 0x1008}, "act must lie at a multiple of 16 bytes"),
        ("glm_gemm1_decode_t8", {"w13_stride": WIDTH * HIDDEN}, "w13 has 983040 bytes from expert to expert"),
        ("glm_prologue_c1", {"experts": 512, "global_experts": 512}, "511 experts or fewer; Triton's prologue serves more"),
        ("glm_prologue_c1", {"global_experts": 159}, "global_experts is 159; it must be experts, or"),
        ("glm_prologue_c8", {"global_experts": 161, "expert_map": 0}, "global_experts is 161; it must be experts, or"),
        ("glm_prologue_c8", {"expert_map": 0x1002}, "expert_map must lie at a multiple of 4 bytes"),
        ("glm_prologue_c1", {"topk_ids": 0x1004}, "topk_ids must lie at a multiple of 8 bytes"),
        ("glm_prologue_c1", {"hidden": 0x1008}, "hidden must lie at a multiple of 16 bytes"),
        ("glm_prologue_c8", {"tile_rows_2": 0}, "tile_rows_1 and tile_rows_2 must be positive"),
        ("glm_prologue_c8", {"band": 96}, "band 96 must be a whole number of chunks of 1024 pairs"),
        ("glm_prologue_c8", {"band_tiles": 0}, "band_tiles is null"),
    ],
)
def test_what_a_kernel_cannot_serve_is_refused_before_the_driver_is_asked(
    name: str, changes: dict[str, int], words: str, native: Native, mock: Mock
) -> None:
    with pytest.raises(HopperError, match=re.escape(words)) as refused:
        run(native, name, mock, **changes)
    assert refused.value.code == -1
    assert name in str(refused.value)
    assert mock.calls("cuLaunchKernelEx") == 0


def test_the_second_kernel_is_checked_before_the_first_is_launched(native: Native, mock: Mock) -> None:
    both = numbers(native.by_name["glm_gemm1_row_c1"], native.by_name["glm_gemm2_sum_n128"])
    with pytest.raises(HopperError, match="w2_scales is null"):
        native.run(0, 0, layer(w2_scales=0), both)
    assert mock.calls("cuLaunchKernelEx") == 0


def test_decode_gemm2_has_one_warpgroups_rows_where_two_do_not_fit(native: Native, mock: Mock) -> None:
    launch = run(native, "glm_gemm2_decode_t64", mock, intermediate_size=1536, w2_stride=1536 * HIDDEN)
    assert launch.shared == 6 * 16384 + 4096 + 1024 + -(-64 * (1536 + 280) // 1024) * 1024


def test_more_shared_memory_than_the_device_has_is_refused(opened: Native, mock: Mock) -> None:
    sizes = " ".join(map(str, argument_sizes()["gemm2_decode"]))
    line = {"glm_gemm2_decode_t64": f"glm_gemm2_decode_t64 60000 {sizes}"}  # static shared memory leaves too little
    opened.load(0, "gemm2_decode.cu", mock_image("gemm2_decode.cu", **line))
    with pytest.raises(HopperError, match=r"needs \d+ bytes of shared memory .* the device gives 172448"):
        run(opened, "glm_gemm2_decode_t64", mock, intermediate_size=1536, w2_stride=1536 * HIDDEN)


def test_an_image_that_the_driver_refuses_has_the_drivers_code(opened: Native) -> None:
    with pytest.raises(
        HopperError, match=r"topk_sum.cu cannot be loaded on cuda:0: CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)"
    ) as refused:
        opened.load(0, "topk_sum.cu", b"refuse 209\n")
    assert refused.value.code == 209
    opened.load(0, "topk_sum.cu", mock_image("topk_sum.cu"))  # and another may follow


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("other 0 8", "glm_topk_sum is not in the cubin of topk_sum.cu"),
        ("glm_topk_sum 0 8 8 8 4 4 4", "takes 6 arguments, and abi.h says 7"),
        ("glm_topk_sum 0 8 8 8 4 4 4 4 4", "takes more than the 7 arguments"),
        ("glm_topk_sum 0 8 8 8 8 4 4 4", "takes 8 bytes as argument 3, and abi.h says 4"),
    ],
)
def test_a_cubin_of_another_abi_is_refused_and_unloaded(line: str, words: str, opened: Native) -> None:
    with pytest.raises(HopperError, match=re.escape(words)) as refused:
        opened.load(0, "topk_sum.cu", f"{line}\n".encode())
    assert refused.value.code == -1
    assert "reinstall vllm-glm-patch" in str(refused.value)


def test_an_image_is_loaded_once_a_device(native: Native, mock: Mock) -> None:
    before = mock.calls("cuModuleLoadData")
    assert before == 2 * len(native.sources)
    for source in native.sources:
        native.load(0, source, b"refuse 1\n")
    assert mock.calls("cuModuleLoadData") == before


def test_loading_is_allowed_while_a_graph_is_captured(opened: Native, mock: Mock) -> None:
    mock.native.mock_capture(1)
    opened.load(0, "topk_sum.cu", mock_image("topk_sum.cu"))
    run(opened, "glm_topk_sum", mock)  # the fixture looks for violations


def test_another_context_may_be_current_and_stays_so(native: Native, mock: Mock) -> None:
    mine, current = C.c_void_p(2), C.c_void_p()  # the mock's context of device 1
    mock.native.cuCtxPushCurrent_v2(mine)
    assert run(native, "glm_topk_sum", mock, device=0).device == 0
    assert run(native, "glm_topk_sum", mock, device=1).device == 1
    mock.native.cuCtxPopCurrent_v2(C.byref(current))
    assert current.value == mine.value


def test_another_card_is_refused(opened: Native, mock: Mock) -> None:
    mock.native.mock_capability(10)
    with pytest.raises(HopperError, match=r"compute capability 10\.0; these kernels are for 9\.0"):
        opened.load(0, "topk_sum.cu", mock_image("topk_sum.cu"))


def test_a_device_without_kernels_is_named(native: Native, mock: Mock) -> None:
    with pytest.raises(HopperError, match="no kernels are loaded on cuda:2"):
        run(native, "glm_topk_sum", mock, device=2)
    with pytest.raises(HopperError, match="cuda:64 is no device"):
        native.load(64, "topk_sum.cu", mock_image("topk_sum.cu"))


def test_a_kernel_that_is_not_loaded_is_named(opened: Native, mock: Mock) -> None:
    opened.load(0, "topk_sum.cu", mock_image("topk_sum.cu"))
    with pytest.raises(HopperError, match=r"glm_gemm1_row_c1 on cuda:0 is not loaded"):
        run(opened, "glm_gemm1_row_c1", mock)


def test_a_driver_that_is_too_old_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "old.c").write_text("int cuInit(unsigned f) { return 0; }\n")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    with pytest.raises(HopperError, match=r"the driver has no cuGetErrorName; install a driver for CUDA 12\.0"):
        Native(built[0]).open(str(tmp_path / "old.so"))


def test_a_driver_from_before_12_4_serves_as_well(built: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("-O1", "-fPIC", "-shared", "-DMOCK_BEFORE_12_4")
    old = Mock(compile_cpp(tmp_path / "old.so", [NATIVE / "mock_driver.cpp"], *flags))
    native = Native(built[0])
    native.open(old.path)
    native.load(0, "topk_sum.cu", mock_image("topk_sum.cu"))
    assert run(native, "glm_topk_sum", old).block == 256
    native.close()
    assert (old.violations(), old.native.mock_leaks()) == ("", 0)


def test_a_missing_driver_or_library_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(HopperError, match=r"The CUDA driver libcuda_not_there\.so cannot be loaded"):
        Native(built[0]).open("libcuda_not_there.so")
    with pytest.raises(HopperError, match="Reinstall vllm-glm-patch"):
        Native(tmp_path / "libglm_hopper.so")


def test_a_driver_that_does_not_start_says_so(built: tuple[Path, Path], mock: Mock) -> None:
    mock.fail("cuInit", 1)
    native = Native(built[0])
    native.close()
    with pytest.raises(HopperError, match=r"does not start: CUDA_ERROR_INVALID_VALUE"):
        native.open(mock.path)


def test_the_drivers_resources_of_a_kernel_are_told(native: Native) -> None:
    resources = native.resources(0, native.by_name["glm_topk_sum"])
    assert (resources.registers, resources.local_bytes, resources.static_shared) == (168, 0, 1024)
    assert resources.dynamic_shared_limit == 232448 - 1024
    with pytest.raises(HopperError, match="is not loaded on cuda:3"):
        native.resources(3, native.by_name["glm_topk_sum"])


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_threads_on_two_devices_are_clean(sanitizer: str, tmp_path: Path) -> None:
    flags = (f"-fsanitize={sanitizer}", "-O1", "-g")
    mock = compile_cpp(tmp_path / "mock.so", [NATIVE / "mock_driver.cpp"], *flags, "-fPIC", "-shared")
    stress = compile_cpp(tmp_path / "stress", [*HOST_SOURCES, NATIVE / "launcher_stress.cpp"], *flags)
    (tmp_path / "image").write_bytes(mock_image("gemm2_decode.cu"))
    done = subprocess.run([stress, mock, tmp_path / "image"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launched 2560 wrong 0 violations 0 leaks 0 evictions some" in done.stdout


def test_the_drivers_types_are_those_of_cuda_h(tmp_path: Path) -> None:
    headers = [Path("/usr/local/cuda/include"), Path("/usr/local/cuda/targets/x86_64-linux/include")]
    found = [folder for folder in headers if (folder / "cuda.h").is_file()]
    if not found:
        pytest.skip("no cuda.h")
    compile_cpp(tmp_path / "layouts.o", [NATIVE / "layouts.cpp"], "-c", f"-I{found[0]}")


def test_the_library_needs_no_new_glibc_and_neither_python_torch_nor_cuda(built: tuple[Path, Path]) -> None:
    needed = subprocess.run(["objdump", "-p", built[0]], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED +(\S+)", needed))
    assert libraries <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    for library, newest in {"GLIBC": (2, 24), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 9)}.items():  # of manylinux_2_24
        versions = {tuple(map(int, found.split("."))) for found in re.findall(rf"\b{library}_([0-9.]+)", needed)}
        assert max(versions) <= newest, library
    exported = subprocess.run(["objdump", "-T", built[0]], capture_output=True, text=True, check=True).stdout
    ours = {line.split()[-1] for line in exported.splitlines() if " .text" in line and " w " not in line}
    declared = set(re.findall(r"\b(glm_hopper_\w+)\(", (CSRC / "host/glm_hopper.h").read_text()))
    assert ours == declared
