"""Tuned tables: whose counts, which table on which card, what a damaged one does; and who serves a problem."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_glm_patch.moe import backends, dispatch, tables, tune
from vllm_glm_patch.moe.backends import UPSTREAM, Backend, route, routes
from vllm_glm_patch.moe.dispatch import Card, Config, choose, default_config
from vllm_glm_patch.moe.problem import GLM_SHAPES, Problem

H100 = Card("NVIDIA H100 80GB HBM3", 132, 232448, (9, 0))
H200 = Card("NVIDIA H200", 132, 232448, (9, 0))
H800 = Card("NVIDIA H800", 132, 232448, (9, 0))
H20 = Card("NVIDIA H20", 78, 232448, (9, 0))
UNKNOWN = Card("NVIDIA H7", 114, 232448, (9, 0))
AMPERE = Card("NVIDIA A100", 108, 166912, (8, 0))
TP8 = GLM_SHAPES["TP8"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean():
    """The package's own tables before and after, and no preference."""
    tables.use_folder(None)
    tables.forget()
    yield
    backends.prefer(backends.AUTO)
    tables.use_folder(None)
    tables.forget()


def marked(number: int) -> dict[str, Any]:
    """An entry that can be told from others."""
    return Config(pairs=dispatch.Pairs(columns1=number), path="pairs").to_dict()


def table(card: Card, counts: dict[int, Any], shape: Problem = TP8) -> dict[str, Any]:
    entries = {str(count): entry for count, entry in counts.items()}
    return {
        "card": card.name, "multiprocessors": card.multiprocessors, "capability": list(card.capability),
        "shapes": {shape.shape_key: entries},
    }  # fmt: skip


def user(folder: Path, *made: dict[str, Any]) -> None:
    for number, one in enumerate(made):
        (folder / f"{number}.json").write_text(json.dumps(one))
    tables.use_folder(folder)
    tables.forget()


def columns(tokens: int, card: Card) -> int:
    """The mark of the entry that is chosen, or 0 where rules of thumb are."""
    config = choose(TP8.with_tokens(tokens), card)
    return 0 if config == default_config(TP8.with_tokens(tokens), card) else config.pairs.columns1


def test_the_nearest_count_within_a_factor_of_two_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    user(tmp_path, table(H100, {4: marked(4), 64: marked(64)}))
    assert [columns(n, H100) for n in (2, 4, 8, 32, 64, 100, 128)] == [4, 4, 4, 64, 64, 64, 64]
    assert [columns(n, H100) for n in (1, 9, 31, 129, 9000)] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(("card", "mark"), [(H100, 1), (H200, 1), (H800, 1), (UNKNOWN, 1), (H20, 20), (AMPERE, 0)], ids=str)
def test_a_card_uses_its_own_table_or_that_of_the_nearest_hopper_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Card, mark: int
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    user(tmp_path, table(H20, {64: marked(20)}), table(H100, {64: marked(1)}))
    assert columns(64, card) == mark


def test_a_table_without_the_shape_or_the_count_leaves_it_to_the_next_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    user(tmp_path, table(H20, {64: marked(20)}), table(H100, {8192: marked(1)}))
    assert columns(8192, H20) == 1
    assert columns(1024, H20) == 0


def test_the_users_table_goes_before_the_packages(tmp_path: Path) -> None:
    shipped = choose(TP8.with_tokens(8192), H100)
    user(tmp_path, table(H100, {8192: marked(7)}))
    assert columns(8192, H100) == 7
    assert choose(TP8.with_tokens(64), H100) != default_config(TP8.with_tokens(64), H100)  # the package's, still
    tables.use_folder(None)
    assert choose(TP8.with_tokens(8192), H100) == shipped


ON_H100 = {("TP4", 4096), ("TP4", 8192), ("TP4", 16384), ("TP2", 8192)}
OTHERWISE_UPSTREAM = {H100: ON_H100, H800: ON_H100, H200: {("TP4", 8192), ("TP4", 16384)}}
"""Of the counts below, where Triton's kernels were slower than vLLM's on that card (benchmarks/results/kernel-*.json), so that
vLLM's serves where the native ones cannot be loaded, as here."""


@pytest.mark.parametrize("card", [H100, H200, H800, H20, UNKNOWN], ids=str)
@pytest.mark.parametrize("shape", GLM_SHAPES)
def test_what_is_shipped_gives_every_hopper_card_tiles_that_fit_its_shared_memory(card: Card, shape: str) -> None:
    for tokens in (1, 2, 3, 8, 64, 256, 1024, 4096, 8192, 16384, 131072):
        problem = GLM_SHAPES[shape].with_tokens(tokens)
        config = choose(problem, card)
        left = (shape, tokens) in OTHERWISE_UPSTREAM.get(card, ())
        assert route(problem, card) == ("upstream" if left else "triton")
        if config.path == "grouped":
            assert tune._gemm1_bytes(problem, config.gemm1) <= card.shared_memory
            assert tune._gemm2_bytes(problem, config.gemm2) <= card.shared_memory


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not json", "Expecting value"),
        ("[]", "has not the keys"),
        (json.dumps({**table(H100, {}), "shapes": {"E=1": {"64": {"path": "grouped", "nonsense": 1}}}}), "64 tokens.*nonsense"),
        (json.dumps(table(H100, {64: {"backend": "cutlass"}})), "the backend 'cutlass' is not among triton, hopper, upstream"),
        (json.dumps(table(H100, {0: marked(1)})), "not an entry"),
        (json.dumps(table(H100, {64: {"backend": "hopper", "otherwise": "triton"}})), 'only be "upstream", beside'),
        (json.dumps(table(H100, {64: {**marked(1), "otherwise": "upstream"}})), 'only be "upstream", beside'),
    ],
    ids=["text", "list", "key", "backend", "count", "otherwise", "otherwise of Triton"],
)
def test_a_damaged_table_is_left_out_with_a_warning_that_names_it(
    tmp_path: Path, text: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    import re

    (tmp_path / "bad.json").write_text(text)
    shipped = choose(TP8.with_tokens(64), H100)
    caplog.set_level(logging.WARNING)
    tables.use_folder(tmp_path)
    assert choose(TP8.with_tokens(64), H100) == shipped
    assert re.search(rf"{re.escape(str(tmp_path / 'bad.json'))} is left out: .*{why}", caplog.text)


def test_a_folder_that_is_not_there_is_no_error() -> None:
    tables.use_folder(Path("/nonexistent/tuned"))
    assert len(tables.read_all()) >= 1


def _write_many(path: str) -> None:
    for number in range(30):
        tables.write(Path(path), {"of": number, "text": "x" * 200_000, "shapes": {}})


def test_a_table_is_replaced_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    tables.write(path, {"of": -1, "shapes": {}})
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(str(path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        json.loads(path.read_text())  # never half a file
    for writer in writers:
        writer.join()
    assert json.loads(path.read_text())["of"] == 29
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]


def test_what_was_answered_from_tables_is_forgotten_with_them_and_with_a_preference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_glm_patch.moe import op

    monkeypatch.setattr(op, "read_card", lambda index: H100)
    monkeypatch.setattr(op, "_device_index", lambda device: 0)
    problem = TP8.with_tokens(300)
    before = op.workspace_bytes(problem)
    slots = {"kind": "fused", "slice": 1024, "slots": 9, "strip": 128}
    user(tmp_path, table(H100, {300: {"path": "grouped", "gemm2": slots}}))
    larger = op.workspace_bytes(problem)
    assert larger > before
    second = Backend("second", lambda problem, card: True, lambda problem, card: 0)
    monkeypatch.setattr(backends, "BACKENDS", [*backends.BACKENDS, second])
    monkeypatch.setitem(op.RUNNERS, "second", op.Runner(lambda problem, card: 77, lambda *given: None))
    backends.prefer("second")
    assert op.workspace_bytes(problem) == 77
    backends.prefer(backends.AUTO)
    assert op.workspace_bytes(problem) == larger


# Who serves.


def test_an_entry_may_leave_its_counts_to_upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    user(tmp_path, table(H100, {8: {"backend": "upstream"}, 64: marked(4)}))
    assert routes(TP8, H100, 8192) == [(1, 3, "triton"), (4, 16, UPSTREAM), (17, 8192, "triton")]
    assert routes(TP8, H200, 16) == [(1, 3, "triton"), (4, 16, UPSTREAM)]
    # Upstream's speed on another kind of card says nothing here.
    assert routes(TP8, H20, 8192) == [(1, 8192, "triton")]


def test_a_preference_goes_before_the_table_but_never_before_what_is_possible(tmp_path: Path) -> None:
    user(tmp_path, table(H100, {8: {"backend": "upstream"}}))
    backends.prefer("triton")
    assert route(TP8.with_tokens(8), H100) == "triton"
    assert route(TP8.with_tokens(8), AMPERE) == UPSTREAM
    assert route(dataclasses.replace(TP8, hidden_size=32768), H100) == UPSTREAM
    backends.prefer(UPSTREAM)
    assert route(TP8.with_tokens(64), H100) == UPSTREAM
    with pytest.raises(ValueError, match="'cutlass' is not among auto, triton, hopper, upstream"):
        backends.prefer("cutlass")


def test_a_second_backend_needs_a_name_a_condition_and_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Backend("second", lambda problem, card: problem.intermediate_size == 192, lambda problem, card: problem.tokens > 9)
    monkeypatch.setattr(backends, "BACKENDS", [*backends.BACKENDS, second])
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    wide = GLM_SHAPES["TP1"]
    user(tmp_path, table(H100, {8192: {"backend": "second", "tile": 3}}), table(H100, {8192: {"backend": "second"}}, wide))
    assert route(TP8.with_tokens(8192), H100) == "second"
    assert backends.configuration(TP8.with_tokens(8192), H100) == ("second", True)
    assert tables.entry(TP8.with_tokens(8192), H100) == {"backend": "second", "tile": 3}
    assert choose(TP8.with_tokens(8192), H100) == default_config(TP8.with_tokens(8192), H100)
    assert route(TP8.with_tokens(64), H100) == "triton"  # no entry: the first that can
    assert route(wide.with_tokens(8192), H100) == "triton"  # the entry's cannot
    backends.prefer("second")
    assert route(wide.with_tokens(8192), H100) == UPSTREAM


def test_the_native_kernels_serve_where_they_are_asked_for_and_are_not_loaded_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_glm_patch.moe import op
    from vllm_glm_patch.moe.hopper import backend as native

    asked: list[str] = []
    monkeypatch.setattr(native, "supports", lambda problem, device: not asked.append(device) and problem.hidden_size == 5120)
    card = dataclasses.replace(H100, index=1)
    assert route(TP8.with_tokens(300), card) == "triton" and not asked
    told = {"gemm1": "glm_gemm1_row_c1", "gemm2": "glm_gemm2_sum_n128", "slice": 128, "slots": 4}
    user(tmp_path, table(H100, {8192: {"backend": "hopper", **told}, 64: {"backend": "hopper"}}))
    many, few = TP8.with_tokens(8192), TP8.with_tokens(64)
    assert route(many, card) == "hopper" and asked == ["cuda:1"]
    assert backends.configuration(many, card) == ("hopper", native.HopperConfig(**told))
    assert native.choose(few, card) == native.default_config(few)
    assert route(few, dataclasses.replace(card, index=None)) == "triton"  # no device to load them on
    backends.prefer("hopper")
    assert route(TP8.with_tokens(300), card) == "hopper"
    assert route(dataclasses.replace(TP8, hidden_size=4096, tokens=300), card) == UPSTREAM
    ran: list[object] = []
    monkeypatch.setattr(native, "run", lambda *given: ran.append(given))
    monkeypatch.setattr(native, "workspace_bytes", lambda problem, config: problem.tokens)
    runner = op.RUNNERS["hopper"]
    assert runner.need(many, card) == 8192
    runner.run(many, card, "tensors", "space")  # type: ignore[arg-type]
    assert ran == [(many, native.HopperConfig(**told), card, "tensors", "space")]


def test_a_table_with_a_native_configuration_that_does_not_exist_is_left_out(tmp_path: Path) -> None:
    bad = table(H100, {64: {"backend": "hopper", "gemm1": "a", "gemm2": "b", "tiles": 3}})
    with pytest.raises(ValueError, match=r"64 tokens.*tiles"):
        tables.check(bad)


def test_a_band_that_does_not_fit_top_k_is_refused_with_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def banded(band: int, top_k: int) -> dict[str, Any]:
        entry = {"backend": "hopper", "gemm1": "triton", "gemm2": "glm_gemm2_sum_n256", "band": band}
        return table(H100, {8192: entry}, replace(TP8, top_k=top_k))

    for band, top_k in ((0, 8), (2048, 8), (128, 8), (512, 2), (1024, 3)):
        tables.check(banded(band, top_k))
    bad = r"shape '.*top_k=8', 8192 tokens: a band of 96 tokens with top_k 8 .* multiple of 128 tokens, or 0 for one band"
    with pytest.raises(ValueError, match=bad):
        tables.check(banded(96, 8))
    with pytest.raises(ValueError, match=r"a band of 128 tokens with top_k 2 .* multiple of 512"):
        tables.check(banded(128, 2))
    user(tmp_path, banded(96, 8))
    assert (
        tables.entry(TP8.with_tokens(8192), H100)
        == tables.read(tables.file_of(H100.name, tables.SHIPPED))["shapes"][TP8.shape_key]["8192"]
    )
    assert "0.json is left out" in caplog.text


def test_each_table_says_that_its_entries_freeze_what_they_were_made_from(tmp_path: Path) -> None:
    assert "rules of thumb" in tables.NOTE and "tune --from" in tables.NOTE
    tune = (ROOT / "docs/usage.md").read_text().split("### tune\n")[1].split("\n### ")[0]
    assert "An entry freezes what it was made from" in tune
    for shipped in tables.SHIPPED.glob("*.json"):
        assert json.loads(shipped.read_text())["note"] == tables.NOTE, f"{shipped} is not as tables.write makes it"
    path = tmp_path / "a.json"
    tables.write(path, {**table(H100, {64: marked(3)}), "note": "an older release's words"})
    assert next(iter(json.loads(path.read_text()).items())) == ("note", tables.NOTE)
    assert tables.read(path)["shapes"] == table(H100, {64: marked(3)})["shapes"]


def test_a_table_may_ask_for_the_native_prologue_and_for_no_other(tmp_path: Path) -> None:
    from vllm_glm_patch.moe.hopper import backend as native

    entry = {"backend": "hopper", "gemm1": "glm_gemm1_decode_t8", "gemm2": "glm_gemm2_decode_t8", "prologue": "native"}
    user(tmp_path, table(H100, {64: entry}))
    assert native.choose(TP8.with_tokens(64), H100).prologue == "native"
    with pytest.raises(ValueError, match=r"64 tokens: prologue 'cuda' is none; there are triton, native, "):
        tables.check(table(H100, {64: {**entry, "prologue": "cuda"}}))


def test_an_entry_with_kernels_that_are_no_more_is_left_out_with_one_warning_and_serving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A user's own table may be another release's: GEMM1 in clusters of two and GEMM2 without partials are gone."""
    from types import SimpleNamespace

    from vllm_glm_patch.moe.hopper import backend as native

    there = dict.fromkeys(("glm_gemm1_row_split", "glm_gemm2_ring_n256"))
    monkeypatch.setattr(native, "loader", lambda: SimpleNamespace(native=SimpleNamespace(by_name=there)))
    monkeypatch.setattr(native, "supports", lambda problem, device: True)
    gone = {"backend": "hopper", "gemm1": "glm_gemm1_row_c2", "gemm2": "glm_gemm2_stationary_t640", "band": 640}
    half = {"backend": "hopper", "gemm1": "triton", "gemm2": "glm_gemm2_stationary_t640"}
    kept = {"backend": "hopper", "gemm1": "glm_gemm1_row_split", "gemm2": "glm_gemm2_ring_n256", "slice": 256}
    user(tmp_path, table(H100, {512: kept, 4096: gone, 16384: half}))
    caplog.set_level(logging.WARNING)
    card = dataclasses.replace(H100, index=0)
    for tokens in (4000, 8191, 16384):
        problem = TP8.with_tokens(tokens)
        assert backends.configuration(problem, card) == ("hopper", native.default_config(problem))
    assert native.choose(TP8.with_tokens(500), card).gemm2 == "glm_gemm2_ring_n256", "other entries hold"
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2, "one for each that is named, at however many counts"
    assert (
        "names glm_gemm1_row_c2 and glm_gemm2_stationary_t640, which this release of vllm-glm-patch does not have" in texts[0]
    )
    assert "names glm_gemm2_stationary_t640, which" in texts[1] and "Tune again, or remove these entries" in texts[1]
    caplog.clear()
    user(tmp_path, table(H100, {4096: gone}))
    native.choose(TP8.with_tokens(4096), card)
    assert len(caplog.records) == 1, "a table that was read anew is warned of again"


def test_a_table_made_while_triton_configurations_had_a_band_of_a_native_kernel_is_read(tmp_path: Path) -> None:
    entry = default_config(TP8.with_tokens(8192), H100).to_dict()
    former = {**entry, "gemm2": {**entry["gemm2"], "band": 0}}
    tables.check(table(H100, {8192: former}))
    assert Config.from_dict(former) == Config.from_dict(entry)
    assert former["gemm2"]["band"] == 0, "the table itself stays as it is"
    for band in (640, "x", None):
        with pytest.raises(ValueError, match=r"8192 tokens: .*band"):
            tables.check(table(H100, {8192: {**entry, "gemm2": {**entry["gemm2"], "band": band}}}))
    with pytest.raises(ValueError, match="8192 tokens"):
        tables.check(table(H100, {8192: {**entry, "gemm2": "fused"}}))
