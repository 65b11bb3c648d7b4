"""The backend in Python: its configurations, the shared prologue, and what it hands to the launcher, over the mock driver."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hopper_host import CSRC, HOST_SOURCES, LIBRARY_FLAGS, NATIVE, Mock, compile_cpp, mock_image

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_glm_patch.moe.hopper import library  # noqa: E402
from vllm_glm_patch.moe.hopper.errors import HopperError  # noqa: E402
from vllm_glm_patch.moe.hopper.native import Native  # noqa: E402
from vllm_glm_patch.moe.problem import Problem  # noqa: E402

TP8 = Problem(8, hidden_size=256, intermediate_size=192, experts=16, global_experts=16, top_k=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("hopper-build")
    return (
        compile_cpp(where / "libglm_hopper.so", HOST_SOURCES, *LIBRARY_FLAGS),
        compile_cpp(where / "libcuda_mock.so", [NATIVE / "mock_driver.cpp"], "-O1", "-fPIC", "-shared"),
    )


@pytest.fixture
def mock(built: tuple[Path, Path]) -> Mock:
    mock = Mock(built[1])
    mock.native.mock_reset()
    return mock


@pytest.fixture
def native(built: tuple[Path, Path], mock: Mock) -> Iterator[Native]:
    native = Native(built[0])
    yield native
    native.close()
    assert mock.violations() == ""
    assert mock.native.mock_leaks() == 0


def images(native: Native, refuse: int = 0, **changes: int) -> library.Images:
    files = {source: f"refuse {refuse}\n".encode() if refuse else mock_image(source) for source in native.sources}
    return dataclasses.replace(library.Images(files, "nvcc 99", native.abi_version), **changes)


def hopper_pass(native: Native, mock: Mock, config, problem: Problem = TP8, ids_dtype: torch.dtype = torch.int32):
    """A pass over real CPU tensors, its kernels loaded; returns (pass, tensors, workspace)."""
    from vllm_glm_patch.moe.generators import make_inputs
    from vllm_glm_patch.moe.hopper.backend import HopperPass, workspace_bytes
    from vllm_glm_patch.moe.pipeline import Tensors

    inputs = make_inputs(problem, 7, "spread", "cpu")
    hidden, w13, w2, w13_scale, w2_scale, weights, ids = inputs.positional()
    scales = w13_scale.reshape(problem.experts, -1), w2_scale.reshape(problem.experts, -1)
    ids = ids.to(ids_dtype)
    tensors = Tensors(hidden, w13, w2, *scales, weights, ids, inputs.expert_map, torch.empty_like(hidden))
    workspace = torch.zeros(workspace_bytes(problem, config, native), dtype=torch.uint8)
    library.Loader(native, images(native), lambda: pytest.fail("nothing is to be compiled"), mock.path).on(0)
    return HopperPass(native, problem, config, tensors, workspace, 132, lambda: 0x55), tensors, workspace


def config(gemm1: str, gemm2: str, **more: object):
    from vllm_glm_patch.moe.hopper.backend import HopperConfig

    return HopperConfig(gemm1, gemm2, **more)  # type: ignore[arg-type]


PREFILL_ROW = ("glm_gemm1_row_c1", "glm_gemm2_sum_n128")
PREFILL_COLUMNS = ("glm_gemm1_columns_c1", "glm_gemm2_sum_n256")
DECODE = ("glm_gemm1_decode_t8", "glm_gemm2_decode_t8")


@pytest.mark.parametrize(
    ("names", "launched"),
    [(PREFILL_ROW, PREFILL_ROW), (PREFILL_COLUMNS, PREFILL_COLUMNS), (DECODE, (*DECODE, "glm_topk_sum"))],
)
def test_each_path_launches_its_kernels_in_order(names, launched, native: Native, mock: Mock) -> None:
    one, _, _ = hopper_pass(native, mock, config(*names, slice=256))
    one.run()
    launches = mock.launches()
    assert tuple(launch.kernel for launch in launches) == launched
    assert {launch.stream for launch in launches} == {0x55}
    for _, step in one.steps():
        step()
    assert tuple(launch.kernel for launch in mock.launches()) == launched


def test_kernels_get_the_workspace_that_the_prologue_filled(native: Native, mock: Mock) -> None:
    """GEMM1's tiles are in its own tile_rows, GEMM2's in its; both from one routing, at the addresses that are handed on."""
    one, tensors, workspace = hopper_pass(native, mock, config(*DECODE))
    one.run()
    gemm1, gemm2, total = mock.launches()

    def ints(address: int, count: int):
        first = (address - workspace.data_ptr()) // 4
        return workspace.view(torch.int32)[first : first + count]

    pairs = TP8.pairs
    rows, tiles, counts, max_tiles = gemm1.pointer(5), gemm1.pointer(6), gemm1.pointer(7), gemm1.number(8)
    ids = tensors.topk_ids.flatten().tolist()
    assert ints(rows, pairs).tolist() == sorted(range(pairs), key=lambda pair: (ids[pair], pair))
    assert ints(counts, 1).item() == pairs
    expected = [-(-ids.count(expert) // 8) for expert in range(16)]
    assert ints(counts, 3).tolist()[1:] == [sum(expected)] * 2
    assert ints(tiles, sum(expected)).tolist() == [expert for expert, count in enumerate(expected) for _ in range(count)]
    assert gemm2.pointer(6) == tiles + 12 * max_tiles
    assert gemm2.pointer(1) == gemm1.pointer(4), "GEMM2 reads what GEMM1 wrote"
    assert total.pointer(0) == gemm2.pointer(4)
    assert total.pointer(2) == tensors.out.data_ptr()
    assert gemm1.tensor_map(0)["base"] == tensors.w13.data_ptr()
    assert gemm2.tensor_map(0)["strides"] == [192, tensors.w2.stride(0)]


def test_tile_lists_have_each_kernels_rows(native: Native, mock: Mock) -> None:
    unlike = "glm_gemm1_decode_t8", "glm_gemm2_decode_t32"
    one, tensors, workspace = hopper_pass(native, mock, config(*unlike), dataclasses.replace(TP8, tokens=200))
    one.run()
    gemm1, gemm2, _ = mock.launches()
    rows = gemm1.pointer(6), gemm2.pointer(6), gemm1.number(8)
    heights = []
    for address in rows[:2]:
        first = (address - workspace.data_ptr()) // 4 + 2 * rows[2]
        heights.append(workspace.view(torch.int32)[first : first + rows[2]].max().item())
    most = tensors.topk_ids.flatten().bincount().max().item()
    assert most > 32 and heights == [8, 32]


def test_the_default_rules_fit_the_sizes_they_are_for(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import default_config, triton_config

    names = {}
    for tokens in (1, 64, 128, 256, 1024, 8192):
        chosen = default_config(Problem(tokens))
        assert triton_config(Problem(tokens), chosen, native)
        names[tokens] = chosen.gemm1
    assert names == {
        1: "glm_gemm1_decode_t8",
        64: "glm_gemm1_decode_t8",
        128: "glm_gemm1_decode_t16",
        256: "glm_gemm1_decode_t32",
        1024: "glm_gemm1_row_split",
        8192: "glm_gemm1_row_split",
    }
    # As many slots as 101 MB hold, and never fewer than two.
    many = {tokens: default_config(Problem(tokens)) for tokens in (500, 1300, 2048, 8192, 65536)}
    assert {chosen.gemm2 for chosen in many.values()} == {"glm_gemm2_turns_lanes_n256"}
    assert {tokens: chosen.slots for tokens, chosen in many.items()} == {500: 20, 1300: 18, 2048: 12, 8192: 3, 65536: 2}
    wide = default_config(Problem(8192, intermediate_size=1536))
    assert (wide.gemm1, wide.gemm2) == ("glm_gemm1_columns_split", "glm_gemm2_ring_n256")
    assert default_config(Problem(1, intermediate_size=3072)).gemm1 == "glm_gemm1_columns_split"
    assert default_config(Problem(8192, top_k=6)).gemm2 == "glm_gemm2_sum_n256"


def test_a_tables_slots_fit_the_counts_that_its_entry_reaches(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_glm_patch.moe import tables
    from vllm_glm_patch.moe.dispatch import Card
    from vllm_glm_patch.moe.hopper import backend

    card = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))
    entry = {
        "backend": "hopper",
        "gemm1": "glm_gemm1_row_split",
        "gemm2": "glm_gemm2_turns_lanes_n256",
        "slice": 256,
        "slots": 6,
    }
    monkeypatch.setattr(tables, "entry", lambda problem, card: entry)
    backend.choose.cache_clear()
    try:
        chosen = {tokens: backend.choose(Problem(tokens), card) for tokens in (4096, 5792, 8192, 65536)}
    finally:
        backend.choose.cache_clear()
    assert {tokens: found.slots for tokens, found in chosen.items()} == {4096: 6, 5792: 4, 8192: 3, 65536: 2}
    for tokens in (4096, 5792, 8192):
        assert backend.workspace_bytes(Problem(tokens), chosen[tokens], native) <= 140e6


@pytest.mark.parametrize(
    "path", sorted((NATIVE.parents[2] / "vllm_glm_patch/moe/tuned").glob("*.json")), ids=lambda path: path.stem
)
def test_a_shipped_entry_has_its_slots_at_its_own_count(path: Path) -> None:
    from vllm_glm_patch.moe import tables
    from vllm_glm_patch.moe.hopper import backend
    from vllm_glm_patch.moe.problem import GLM_SHAPES

    shapes, seen = tables.read(path)["shapes"], 0
    for problem in GLM_SHAPES.values():
        for tokens, entry in shapes.get(problem.shape_key, {}).items():
            if entry.get("backend") == "hopper" and "decode" not in entry["gemm2"]:
                told = backend.told(entry)
                assert told is not None and backend._fitted(problem.with_tokens(int(tokens)), told) == told
                seen += 1
    assert seen > 10


@pytest.mark.parametrize(("triton", "rows"), [("3.3.1", 16), ("3.4.0", 16), ("3.5.0", 8), ("3.6.0+git1234", 8)])
def test_tritons_gemm1_has_tiles_that_this_triton_multiplies(
    native: Native, monkeypatch: pytest.MonkeyPatch, triton: str, rows: int
) -> None:
    from vllm_glm_patch.moe.hopper import backend

    monkeypatch.setattr("triton.__version__", triton)
    backend.least_rows.cache_clear()
    try:
        few = backend.triton_config(Problem(32), config("triton", "glm_gemm2_decode_t8"), native)
        more = backend.triton_config(Problem(300), config("triton", "glm_gemm2_decode_t32"), native)
    finally:
        backend.least_rows.cache_clear()
    assert (few.gemm1.block_m, few.gemm2.block_m) == (rows, 8)
    assert (more.gemm1.block_m, more.gemm2.block_m) == (32, 32)


def test_by_bands_the_workspace_stays_small(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import default_config, layout_of, triton_config, workspace_bytes

    assert workspace_bytes(Problem(8192), default_config(Problem(8192)), native) <= 140e6
    chosen = config(*PREFILL_ROW, slice=256, slots=3, band=2048)
    assert workspace_bytes(Problem(8192), chosen, native) <= 140e6
    assert workspace_bytes(Problem(16384, 8192, 1536), default_config(Problem(16384, 8192, 1536)), native) > 0
    # Three slots of 2048 tokens' pairs × 256 columns; the quantised tokens that lie there before need more.
    one = dataclasses.replace(chosen, band=0)
    sizes = [
        layout_of(Problem(8192), c, triton_config(Problem(8192), c, native)).offsets["tokens_or_partial"][1]
        for c in (chosen, one)
    ]
    assert sizes == [8192 * 5120, 3 * 65536 * 256 * 2]
    few = config(*DECODE, band=2048)
    assert workspace_bytes(Problem(4096), few, native) == workspace_bytes(Problem(4096), config(*DECODE), native)


def test_bands_reach_the_kernel_with_the_first_tile_of_each(native: Native, mock: Mock) -> None:
    problem = dataclasses.replace(TP8, tokens=600)
    one, tensors, workspace = hopper_pass(native, mock, config(*PREFILL_ROW, slice=256, band=256), problem)
    one.run()
    _, gemm2 = mock.launches()
    first = (gemm2.pointer(12) - workspace.data_ptr()) // 4
    tiles = [-(-int(count) // 128) for band in tensors.topk_ids.split(256) for count in band.flatten().bincount(minlength=16)]
    assert workspace.view(torch.int32)[first : first + 3].tolist() == [0, sum(tiles[:16]), sum(tiles[:32])]
    assert gemm2.number(21) == 256
    # Few enough pairs for one launch of routing, or tokens for one band: none.
    for tokens, band in ((256, 256), (600, 608)):
        one, _, _ = hopper_pass(
            native, mock, config(*PREFILL_ROW, slice=256, band=band), dataclasses.replace(TP8, tokens=tokens)
        )
        one.run()
        gemm2 = mock.launches()[1]
        assert (gemm2.pointer(12), gemm2.number(21)) == (0, 0)


def test_kernels_that_list_tiles_by_bands_are_known_to_be_others(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import by_bands

    sliced = config("triton", "glm_gemm2_sum_n256", band=2048)
    assert not by_bands(Problem(2048), sliced, native)
    assert by_bands(Problem(2049), sliced, native)
    assert not by_bands(Problem(64), config(*DECODE), native)


def test_the_ring_has_the_workspace_of_the_loads_and_what_it_cannot_add_up_is_refused(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import triton_config, workspace_bytes

    for problem in (Problem(8192), Problem(333, intermediate_size=384)):
        for size, slots, band in ((256, 2, 0), (512, 2, 0), (256, 3, 1024)):
            sizes = {
                workspace_bytes(problem, config("triton", f"glm_gemm2_{kind}_n256", slice=size, slots=slots, band=band), native)
                for kind in ("sum", "ring", "turns_lanes")
            }
            assert len(sizes) == 1
    for problem, size in ((Problem(8192, top_k=6), 256), (Problem(8192), 128)):
        with pytest.raises(HopperError, match=rf"there are {problem.top_k} choices and slices of {size}; .*glm_gemm2_sum_n128"):
            triton_config(problem, config("triton", "glm_gemm2_ring_n128", slice=size), native)
        with pytest.raises(HopperError, match=r"glm_gemm2_turns_lanes_n256 adds up 8 choices .*glm_gemm2_sum_n256"):
            triton_config(problem, config("triton", "glm_gemm2_turns_lanes_n256", slice=size), native)


def test_only_eight_choices_a_token_let_the_tuner_try_the_ring(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.candidates import slices

    eight, six = slices(Problem(8192)), slices(Problem(8192, top_k=6))
    assert [one for one in eight if one[0].startswith("sum_")] == six
    assert {one[1:] for one in eight if one[0] == "turns_lanes_n256"} > {(256, 3), (256, 20), (512, 10)}
    assert {one[0] for one in eight} - {one[0] for one in six} == {"ring_n128", "ring_n256", "turns_lanes_n256"}


def test_a_server_whose_table_names_a_kernel_that_is_no_more_warms_up_and_runs_what_there_is(
    native: Native, mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration that a server would compile and test at its start exists; none raises."""
    import json

    from vllm_glm_patch.adapters.serving import plan
    from vllm_glm_patch.moe import backends, tables
    from vllm_glm_patch.moe.dispatch import Card
    from vllm_glm_patch.moe.hopper import backend

    loader = library.Loader(native, images(native), lambda: pytest.fail("nothing is to be compiled"), mock.path)
    monkeypatch.setattr(backend, "loader", lambda: loader)
    monkeypatch.setattr(backend, "supports", lambda problem, device: True)
    card = Card("NVIDIA H200", 132, 232448, (9, 0), 0)
    problem = Problem(2048)
    gone = {"backend": "hopper", "gemm1": "glm_gemm1_row_k64_c1", "gemm2": "glm_gemm2_turns_n256", "slice": 256}
    counts = {str(count): gone for count in (16, 256, 1024)}
    made = {"card": card.name, "multiprocessors": 132, "capability": [9, 0], "shapes": {problem.shape_key: counts}}
    (tmp_path / "mine.json").write_text(json.dumps(made))
    tables.use_folder(tmp_path)
    try:
        warm, ends, _ = plan(problem, card, 2048)
        assert 2048 in warm and ends
        for tokens in (16, 2048):
            served = backends.configuration(problem.with_tokens(tokens), card)
            assert served == ("hopper", backend.default_config(problem.with_tokens(tokens)))
            backend.workspace_bytes(problem.with_tokens(tokens), served[1])  # type: ignore[index]
    finally:
        tables.use_folder(None)
        tables.forget()


def test_a_band_that_cannot_be_is_refused(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import told, workspace_bytes

    for band in (-32, 100):
        with pytest.raises(ValueError, match=f"band {band} must be a multiple of 32 tokens, or 0"):
            config(*PREFILL_ROW, band=band)
    with pytest.raises(
        HopperError, match=r"HopperConfig\(band=96\) cannot serve 8192 tokens: .* choose a multiple of 128 tokens"
    ):
        workspace_bytes(Problem(8192), config(*PREFILL_ROW, band=96), native)
    names = dict(zip(("gemm1", "gemm2"), PREFILL_ROW))
    assert told({"backend": "hopper", **names, "band": 2048}) == config(*PREFILL_ROW, band=2048)


def test_weights_are_asked_for_early_by_whoever_knows_how(native: Native, mock: Mock) -> None:
    from vllm_glm_patch.moe.hopper.backend import triton_config

    few, by_triton = config(*DECODE, early_steps=4), config("triton", DECODE[1], early_steps=4)
    assert [triton_config(TP8, one, native).gemm1.early for one in (few, by_triton)] == [0, 4]
    with pytest.raises(HopperError, match=r"early_steps=6\): Triton's GEMM1 asks for 0 or a power of two"):
        triton_config(TP8, config("triton", DECODE[1], early_steps=6), native)
    with pytest.raises(ValueError, match="early_steps 0 and early_items -1 must not be negative"):
        config(*PREFILL_ROW, early_items=-1)
    one, _, _ = hopper_pass(native, mock, config(*PREFILL_ROW, slice=256, early_steps=3, early_items=5))
    one.run()
    assert [launch.number(-1) for launch in mock.launches()[-2:]] == [3, 5]


@pytest.mark.parametrize(("tokens", "ids"), [(8, torch.int32), (300, torch.int64)])
def test_the_native_prologue_gets_the_tensors_and_the_workspace(tokens, ids, native: Native, mock: Mock) -> None:
    problem = dataclasses.replace(TP8, tokens=tokens, global_experts=32)
    chosen = config("glm_gemm1_row_c1", "glm_gemm2_sum_n128", slice=256, band=256, prologue="native")
    one, tensors, workspace = hopper_pass(native, mock, chosen, problem, ids)
    one.run()
    launches = mock.launches()
    name = {8: "glm_prologue_c1", 300: "glm_prologue_c8"}[tokens]
    assert [launch.kernel for launch in launches] == [name, chosen.gemm1, chosen.gemm2]
    first, gemm1, gemm2 = launches
    assert {launch.stream for launch in launches} == {0x55}
    assert (first.programmatic, first.grid) == (0, {8: 5, 300: 160}[tokens])
    assert [first.pointer(i) for i in (0, 3, 4)] == [
        tensor.data_ptr() for tensor in (tensors.hidden, tensors.topk_ids, tensors.expert_map)
    ]
    # What GEMM1 and GEMM2 read is what it writes; GEMM1: tokens, scales, rows, tiles, counts; GEMM2: local ids, bands.
    assert [first.pointer(i) for i in (1, 2, 6, 8, 9)] == [gemm1.pointer(i) for i in (1, 2, 6, 7, 8)]
    assert [first.pointer(i) for i in (5, 10)] == [gemm2.pointer(i) for i in (6, 12)]
    shared = one._pass
    assert first.pointer(7) == shared.histogram.data_ptr() < workspace.data_ptr() + workspace.numel()
    banded = 256 if tokens > 256 else 0
    wanted = [tokens, 256, 16, 32, 4, shared.max_tiles, 128, 128, banded, int(ids == torch.int64)]
    assert [first.number(i) for i in range(11, 21)] == wanted
    assert (first.pointer(10) != 0) == (banded > 0)
    for _, step in one.steps():
        step()
    assert [launch.kernel for launch in mock.launches()] == [name, chosen.gemm1, chosen.gemm2]


def test_more_experts_than_the_native_prologue_counts_are_left_to_tritons(native: Native, mock: Mock) -> None:
    from vllm_glm_patch.moe import routing, workspace
    from vllm_glm_patch.moe.hopper.backend import PROLOGUE_EXPERTS, prologue_of

    chosen = config(*DECODE, prologue="native")
    many = dataclasses.replace(TP8, experts=PROLOGUE_EXPERTS, global_experts=PROLOGUE_EXPERTS)
    assert prologue_of(many, chosen, native) is native.by_name["glm_prologue_c1"]
    assert prologue_of(dataclasses.replace(many, experts=PROLOGUE_EXPERTS + 1), chosen, native) is None
    assert prologue_of(TP8, config(*DECODE), native) is None
    limit = routing.SMALL_PAIRS // TP8.top_k
    names = [prologue_of(TP8.with_tokens(tokens), chosen, native).name for tokens in (limit, limit + 1)]
    assert names == ["glm_prologue_c1", "glm_prologue_c8"]
    forced = [config(*DECODE, prologue=f"native_{kind}") for kind in ("c1", "c8")]
    for tokens in (1, 8192):
        names = [prologue_of(TP8.with_tokens(tokens), one, native).name for one in forced]
        assert names == ["glm_prologue_c1", "glm_prologue_c8"]
    # What both sides count by.
    text = (CSRC / "abi.h").read_text()
    assert f"prologue_experts = {PROLOGUE_EXPERTS};" in text
    assert f"routing_chunk = {routing.CHUNK};" in text
    assert routing.CHUNK == routing.SMALL_PAIRS
    assert f"zeros = {1 + routing.DONE};" in (CSRC / "prologue.cu").read_text()
    assert [workspace.bins_of(experts) for experts in (1, 15, 16, 160, 511)] == [16, 16, 32, 256, 512]


def test_a_prologue_that_is_none_is_refused() -> None:
    from vllm_glm_patch.moe.hopper.backend import told

    with pytest.raises(ValueError, match="prologue 'cutlass' is none; there are triton, native, native_c1, native_c8"):
        config(*DECODE, prologue="cutlass")
    names = dict(zip(("gemm1", "gemm2"), DECODE))
    assert told({"backend": "hopper", **names, "prologue": "native"}) == config(*DECODE, prologue="native")
    assert config(*DECODE).prologue == "triton"


def test_kernels_that_do_not_go_together_are_refused(native: Native) -> None:
    from vllm_glm_patch.moe.hopper.backend import triton_config

    with pytest.raises(HopperError, match="do not go together"):
        triton_config(Problem(8), config("glm_gemm1_row_c1", "glm_gemm2_decode_t8"), native)
    with pytest.raises(HopperError, match="There is no kernel glm_gemm1_row_c9; there are glm_gemm1_row_c1, "):
        triton_config(Problem(8), config("glm_gemm1_row_c9", "glm_gemm2_sum_n128"), native)
    with pytest.raises(HopperError, match="glm_topk_sum is no GEMM2"):
        triton_config(Problem(8), config("triton", "glm_topk_sum"), native)


def test_it_says_why_it_cannot_serve() -> None:
    from vllm_glm_patch.moe.hopper.backend import supports, why_not

    assert why_not(Problem(1, hidden_size=5000), "cuda:0") == "hidden_size 5000 is not a multiple of 256"
    assert why_not(Problem(1, intermediate_size=96), "cuda:0") == "intermediate_size 96 is not a multiple of 192"
    assert why_not(Problem(1), "cpu") == "cpu is not a CUDA device"
    assert not supports(Problem(1), "cpu")


@pytest.mark.parametrize("code", sorted(library.REFUSALS))
def test_cubins_that_the_driver_refuses_are_compiled_here_once(code: int, native: Native, mock: Mock, caplog) -> None:
    made = []

    def compile_here() -> library.Images:
        made.append(1)
        return images(native, compiler="nvrtc 12.6")  # type: ignore[arg-type]

    loader = library.Loader(native, images(native, refuse=code), compile_here, mock.path)
    assert loader.compiler(0) == "nvrtc 12.6"
    assert loader.on(0) is native
    assert made == [1]
    assert f"({code})" in caplog.text


def test_a_wheel_without_cubins_has_them_compiled(native: Native, mock: Mock) -> None:
    assert library.Loader(native, None, lambda: images(native), mock.path).compiler(1) == "nvcc 99"


def test_a_full_device_is_no_reason_to_compile(native: Native, mock: Mock) -> None:
    loader = library.Loader(native, images(native, refuse=2), lambda: pytest.fail("compiled"), mock.path)
    with pytest.raises(HopperError, match=r"\(2\)"):
        loader.on(0)


def test_a_failure_is_kept_and_has_both_reasons(native: Native, mock: Mock) -> None:
    made = []

    def compile_here() -> library.Images:
        made.append(1)
        raise HopperError("No NVRTC here.")

    loader = library.Loader(native, images(native, refuse=209), compile_here, mock.path)
    for _ in range(2):
        with pytest.raises(HopperError, match=r"No NVRTC here\..*\(The wheel's own cubins: .*NO_BINARY_FOR_GPU"):
            loader.on(0)
    assert made == [1]


def test_cubins_of_another_abi_or_incomplete_are_refused(native: Native, mock: Mock) -> None:
    with pytest.raises(HopperError, match=rf"nvcc 99 are of ABI 0, and libglm_hopper\.so is of {native.abi_version}"):
        library.Loader(native, images(native, abi=0), lambda: pytest.fail("compiled"), mock.path).on(0)
    few = dataclasses.replace(images(native), files={"topk_sum.cu": b""})
    with pytest.raises(HopperError, match=r"lack gemm1_prefill\.cu"):
        library.Loader(native, few, lambda: pytest.fail("compiled"), mock.path).on(0)


def test_packaged_cubins_are_checked_against_their_manifest(tmp_path: Path) -> None:
    import hashlib
    import json

    assert library.packaged(tmp_path) is None
    (tmp_path / "topk_sum.cubin").write_bytes(b"code")
    digest = hashlib.sha256(b"code").hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({"abi": 1, "compiler": "nvcc 1", "files": {"topk_sum.cubin": digest}}))
    assert library.packaged(tmp_path) == library.Images({"topk_sum.cu": b"code"}, "nvcc 1", 1)
    (tmp_path / "topk_sum.cubin").write_bytes(b"cod")
    with pytest.raises(HopperError, match="are not as their manifest"):
        library.packaged(tmp_path)


def test_a_call_of_three_kernels_costs_microseconds(native: Native, mock: Mock) -> None:
    """The launcher's own work, without the driver's: a lookup of two maps and three sets of arguments."""
    one, _, _ = hopper_pass(native, mock, config(*DECODE))
    kernels = one._first, one._second, *one._sums()
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(20):
            one._launch(*kernels)
        best = min(best, (time.perf_counter() - begin) / 20)
        mock.launches()
    print(f"{1e6 * best:.1f} µs a call of three kernels, the mock's copies included")
    assert best < 200e-6
