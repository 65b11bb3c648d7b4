"""The synthetic GLM-4.6: its files, its weights, its routing, and what happens when it cannot be written."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.model import PRESETS, ModelSpec, command, spec_for, weights, write_model
from vllm_glm_patch.tools.model.cli import Preset, WeightFormat
from vllm_glm_patch.tools.model.routing import ExpertLoad, load_of, measure, route
from vllm_glm_patch.tools.model.spec import WEIGHT_FORMATS
from vllm_glm_patch.tools.model.tensors import tensors_of
from vllm_glm_patch.tools.model.vocabulary import SPECIAL_TOKENS, answerable_ids, end_ids, special_ids

# Deep but narrow, so that all 92 layers run in a second.
DEEP = replace(
    spec_for("tiny", layers=92),
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    num_experts=8,
    top_k=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and beside other work by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", spec_for("tiny")).path


@pytest.fixture(scope="module")
def model(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(str(tiny), torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(str(tiny))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def random_prompts(count: int, length: int, spec: ModelSpec) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(7))


# --- the checkpoint -------------------------------------------------------------------------------------------


def test_transformers_finds_every_weight_it_expects_and_no_other(tiny: Path) -> None:
    _, info = transformers.AutoModelForCausalLM.from_pretrained(str(tiny), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_config_is_read_as_glm4_moe(tiny: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(str(tiny))
    assert type(config).__name__ == "Glm4MoeConfig"
    assert config.architectures == ["Glm4MoeForCausalLM"]
    assert (config.n_routed_experts, config.num_experts_per_tok, config.first_k_dense_replace) == (16, 4, 1)
    assert config.use_qk_norm and config.attention_bias and not config.tie_word_embeddings
    assert json.loads((tiny / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    report = write_model(tmp_path / "m", spec_for("tiny", layers=2), shard_bytes=1 << 20)
    index = json.loads((report.path / "model.safetensors.index.json").read_text())
    assert report.shards == len(set(index["weight_map"].values())) > 1
    for name, shard in index["weight_map"].items():
        with safe_open(str(report.path / shard), framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == report.nbytes


def test_same_seed_gives_the_same_tensors_however_they_are_sharded(tmp_path: Path) -> None:
    spec = spec_for("tiny", layers=2, weight_format="fp8", seed=5)
    one = read_tensors(write_model(tmp_path / "one", spec).path)
    many = read_tensors(write_model(tmp_path / "many", spec, shard_bytes=1 << 20).path)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)


def test_another_seed_gives_other_weights(tiny: Path, tmp_path: Path) -> None:
    other = read_tensors(write_model(tmp_path / "m", spec_for("tiny", seed=1)).path)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert not torch.equal(other[name], read_tensors(tiny)[name])


def test_fp8_has_the_names_dtypes_and_shapes_of_glm_46_fp8(tmp_path: Path) -> None:
    spec = spec_for("tiny", layers=2, weight_format="fp8")
    tensors = read_tensors(write_model(tmp_path / "m", spec).path)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    expected = {
        "model.embed_tokens.weight": (torch.bfloat16, (1024, 256)),
        "model.norm.weight": (torch.bfloat16, (256,)),
        "lm_head.weight": (torch.bfloat16, (1024, 256)),
        "model.layers.1.mlp.gate.weight": (torch.bfloat16, (16, 256)),
        "model.layers.1.mlp.gate.e_score_correction_bias": (torch.float32, (16,)),
    }
    linear: dict[str, tuple[int, int]] = {}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        for norm, size in (("input_layernorm", 256), ("post_attention_layernorm", 256)):
            expected[f"{prefix}.{norm}.weight"] = (torch.bfloat16, (size,))
        for part, rows in (("q", 256), ("k", 128), ("v", 128)):
            linear[f"{prefix}.self_attn.{part}_proj"] = (rows, 256)
            expected[f"{prefix}.self_attn.{part}_proj.bias"] = (torch.bfloat16, (rows,))
        for part in ("q", "k"):
            expected[f"{prefix}.self_attn.{part}_norm.weight"] = (torch.bfloat16, (64,))
        linear[f"{prefix}.self_attn.o_proj"] = (256, 256)
    mlps = {"model.layers.0.mlp": 512, "model.layers.1.mlp.shared_experts": 128}
    mlps.update({f"model.layers.1.mlp.experts.{expert}": 128 for expert in range(16)})
    for prefix, width in mlps.items():
        linear[f"{prefix}.gate_proj"] = linear[f"{prefix}.up_proj"] = (width, 256)
        linear[f"{prefix}.down_proj"] = (256, width)
    for prefix, (rows, columns) in linear.items():
        expected[f"{prefix}.weight"] = (torch.float8_e4m3fn, (rows, columns))
        expected[f"{prefix}.weight_scale"] = (torch.bfloat16, (rows, 1))
    assert found == expected


def test_fp8_config_quantises_linear_layers_but_lm_head_and_gates(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", spec_for("tiny", layers=3, weight_format="fp8")).path
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "float-quantized")
    assert quantization["ignore"] == ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)


def test_fp8_and_bf16_of_one_seed_are_the_same_model(tiny: Path, tmp_path: Path) -> None:
    quantised = read_tensors(write_model(tmp_path / "m", spec_for("tiny", weight_format="fp8")).path)
    plain = read_tensors(tiny)
    for name, tensor in plain.items():
        other = quantised[name]
        if other.dtype == torch.float8_e4m3fn:
            other = (other.float() * quantised[name + "_scale"].float()).bfloat16()
        assert torch.equal(tensor, other), name


def test_full_is_glm_46() -> None:
    shapes = {tensor.name: tensor.shape for tensor in tensors_of(spec_for("full", weight_format="bf16"))}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (151552, 5120)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (12288, 5120)
    assert shapes["model.layers.91.self_attn.q_proj.weight"] == (12288, 5120)
    assert shapes["model.layers.91.self_attn.k_proj.weight"] == (1024, 5120)
    assert shapes["model.layers.91.mlp.experts.159.down_proj.weight"] == (5120, 1536)
    assert "model.layers.2.mlp.gate.weight" not in shapes and "model.layers.3.mlp.gate.weight" in shapes
    assert len([name for name in shapes if ".experts." in name]) == 89 * 160 * 3


@pytest.mark.parametrize(
    ("preset", "ranks", "heads", "kv_heads", "expert", "dense"),
    [("tp8-rank", 8, 12, 1, 192, 1536), ("tp4-rank", 4, 24, 2, 384, 3072)],
)
def test_a_rank_holds_its_part_of_the_full_model(
    preset: str, ranks: int, heads: int, kv_heads: int, expert: int, dense: int
) -> None:
    rank, full = spec_for(preset), spec_for("full")
    assert (rank.num_heads, rank.num_kv_heads) == (heads, kv_heads)
    assert (rank.moe_intermediate_size, rank.intermediate_size) == (expert, dense)
    of_full = {tensor.name: tensor.elements for tensor in tensors_of(full) if "_proj.weight" in tensor.name}
    of_rank = {tensor.name: tensor.elements for tensor in tensors_of(rank) if "_proj.weight" in tensor.name}
    assert of_rank.keys() == of_full.keys()
    # The scales of o_proj and down_proj are one a hidden channel, whole in every rank.
    assert all(of_full[name] == ranks * size for name, size in of_rank.items() if not name.endswith("_scale"))


def test_the_largest_tensor_is_made_in_small_pieces() -> None:
    head = next(tensor for tensor in tensors_of(spec_for("full")) if tensor.nbytes > 1e9)
    assert len(next(iter(weights.pieces(head, seed=0)))) <= 16 << 20


# --- what it answers ------------------------------------------------------------------------------------------


def greedy(model: transformers.PreTrainedModel, prompts: torch.Tensor, count: int) -> torch.Tensor:
    ids = prompts
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :]


def test_greedy_answers_differ_between_prompts_and_do_not_stick_to_one_token(
    model: transformers.PreTrainedModel,
) -> None:
    prompts = random_prompts(8, 256, spec_for("tiny"))
    prompts[:, -4:] = 65  # only the distant part differs
    answers = greedy(model, prompts, 12).tolist()
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert all(len(set(answer)) >= 4 for answer in answers)


def test_answers_are_readable(model: transformers.PreTrainedModel, tokenizer) -> None:
    answers = greedy(model, random_prompts(8, 32, spec_for("tiny")), 8)
    assert set(answers.flatten().tolist()) <= set(answerable_ids(1024))
    assert all(tokenizer.decode(answer).isprintable() for answer in answers)


def test_activations_stay_finite_and_tokens_apart_over_92_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "deep", DEEP).path
    deep = transformers.AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.bfloat16).eval()
    loads = loads_of_all_gates(deep, random_prompts(4, 256, DEEP))
    assert len(loads) == 91
    assert max(load.variation for load in loads) < 0.5 and not any(load.unused for load in loads)
    with torch.no_grad():
        states = deep(random_prompts(2, 64, DEEP), output_hidden_states=True).hidden_states
    assert all(state.isfinite().all() for state in states)
    assert states[-2].abs().max() < 100


# --- routing --------------------------------------------------------------------------------------------------


def loads_of_all_gates(model: transformers.PreTrainedModel, prompts: torch.Tensor) -> list[ExpertLoad]:
    """The load as transformers' own router chooses, of every MoE layer."""
    loads: list[ExpertLoad] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]

    def note(gate, inputs, outputs) -> None:
        ids = next(output for output in outputs if output.dtype == torch.int64)
        loads.append(load_of(ids, gate.weight.shape[0]))

    hooks = [gate.register_forward_hook(note) for gate in gates]
    with torch.no_grad():
        model(prompts)
    for hook in hooks:
        hook.remove()
    return loads


def glm_router_at_hidden_5120() -> ModelSpec:
    """GLM-4.6's own router: 160 experts, top 8, hidden size 5120; experts and vocabulary are small."""
    spec = spec_for("tp8-rank", layers=1, vocab=2048)
    return replace(spec, moe_intermediate_size=16, intermediate_size=16, num_heads=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spec", [spec_for("tiny"), glm_router_at_hidden_5120()], ids=["tiny", "160-experts"])
def test_random_tokens_spread_over_all_experts(spec: ModelSpec, seed: int, tmp_path: Path) -> None:
    load = write_model(tmp_path / "m", replace(spec, seed=seed)).load
    assert load.tokens == 8192
    assert load.is_spread and load.unused == 0 and load.variation < 0.25 and load.busiest < 1.8


def test_the_whole_model_spreads_random_tokens_in_every_layer(model: transformers.PreTrainedModel) -> None:
    loads = loads_of_all_gates(model, random_prompts(8, 512, spec_for("tiny")))
    assert len(loads) == 3
    assert all(load.is_spread for load in loads)


def test_identical_tokens_are_seen_as_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, bias = torch.randn(160, 64, generator=generator), torch.zeros(160)
    alike = torch.randn(1, 64, generator=generator).expand(512, 64)
    load = load_of(route(alike, gate, bias, top_k=8), experts=160)
    assert not load.is_spread
    assert load.unused == 152 and load.busiest == 20 and load.variation == pytest.approx((160 / 8 - 1) ** 0.5)


def test_a_checkpoint_whose_tokens_are_all_alike_is_measured_as_collapsed(tmp_path: Path, monkeypatch) -> None:
    pieces = weights.pieces

    def alike(tensor, seed: int) -> Iterator[bytes]:
        if tensor.name == "model.embed_tokens.weight":
            row = b"\x80\x3f\x00\x00" * (tensor.shape[1] // 2)  # bf16 1, 0, 1, 0, …
            return iter([row * tensor.shape[0]])
        return pieces(tensor, seed)

    monkeypatch.setattr(weights, "pieces", alike)
    load = write_model(tmp_path / "m", spec_for("tiny")).load
    assert not load.is_spread and load.unused == 12


def test_an_even_load_has_no_variation() -> None:
    load = load_of(torch.tensor([[0, 1], [2, 3]]), experts=4)
    assert load == ExpertLoad(tokens=2, experts=4, top_k=2, variation=0.0, busiest=1.0, unused=0)


def test_the_correction_bias_moves_the_choice() -> None:
    hidden, gate = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    assert route(hidden, gate, torch.zeros(3), top_k=1).item() == 0
    assert route(hidden, gate, torch.tensor([0.0, 0.0, 1.0]), top_k=1).item() == 2


def test_measure_chooses_as_transformers_own_router_does(tiny: Path, model: transformers.PreTrainedModel) -> None:
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs = next(output for output in gate(hidden) if output.dtype == torch.int64)
    ours = route(hidden, gate.weight, gate.e_score_correction_bias, top_k=4)
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert measure(tiny, spec_for("tiny"), tokens=100).tokens == 100


# --- tokenizer and chat ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60).filter(lambda text: "<" not in text))
def test_any_text_survives_the_tokenizer_one_token_a_byte(text: str, tokenizer) -> None:
    if "[" in text or "/nothink" in text:
        return
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_glm_46s_ids_in_its_vocabulary() -> None:
    ids = special_ids(151552)
    assert (ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]) == (151329, 151336, 151338)
    assert (ids["<think>"], ids["</think>"], ids["<tool_call>"]) == (151350, 151351, 151352)
    assert end_ids(151552) == [151329, 151336, 151338]


def test_every_special_token_is_one_id_and_parsers_see_theirs(tokenizer) -> None:
    for text, special in SPECIAL_TOKENS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [special_ids(1024)[text]]
        assert tokenizer.decode(ids, skip_special_tokens=True) == ("" if special else text)


def test_every_answerable_id_is_a_text_of_its_own(tokenizer) -> None:
    texts = [tokenizer.decode([token]) for token in answerable_ids(1024)]
    assert len(set(texts)) == len(texts) and all(texts)


def test_the_large_vocabulary_gives_every_id_a_word(tmp_path: Path) -> None:
    spec = replace(spec_for("tiny", layers=1, vocab=151552), hidden_size=16, num_heads=2)
    folder = write_model(tmp_path / "m", spec).path
    large = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert len(large) == 151329 + len(SPECIAL_TOKENS)
    assert large.decode([151328]).strip().isalpha()
    assert large.convert_tokens_to_ids("</think>") == 151351


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def render(tokenizer, messages: list[dict], **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_a_chat_starts_and_ends_as_glm_46s_does(tokenizer) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    text = render(tokenizer, messages, add_generation_prompt=True)
    assert text == "[gMASK]<sop><|system|>\nBe short.<|user|>\nHello<|assistant|>"


def test_thinking_can_be_switched_off(tokenizer) -> None:
    text = render(tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<|assistant|>\n<think></think>")


def test_content_parts_are_joined(tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]).endswith("<|user|>\nab")


def test_tools_are_listed_as_json(tokenizer) -> None:
    text = render(tokenizer, [{"role": "user", "content": "x"}], tools=TOOLS)
    assert json.dumps(TOOLS[0]) in text.splitlines()


def test_tool_calls_are_written_as_the_glm45_parser_reads_them(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Sure.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
    ]
    answer, results = render(tokenizer, messages).split("<|assistant|>")[1].split("<|observation|>")
    assert answer.startswith("\n<think>hm</think>\nSure.")
    found = re.search(r"<tool_call>([^\n]*)\n(.*)</tool_call>", answer, re.DOTALL)
    assert found is not None and found.group(1) == "weather"
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", found.group(2), re.DOTALL)
    assert pairs == [("city", "Köln"), ("days", "3")]
    assert results.count("<tool_response>") == 2


# --- when it cannot be written --------------------------------------------------------------------------------


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        write_model(tmp_path / "m", spec_for("tiny"))
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "mine"]


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        write_model(tmp_path / "m", spec_for("tiny"))
    assert (tmp_path / "m").read_text() == "keep"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", spec_for("tiny", layers=1))
    assert (tmp_path / "m" / "config.json").is_file()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "theirs").write_text("keep")

    with pytest.raises(UserError, match="meanwhile"):
        write_model(tmp_path / "m", spec_for("tiny", layers=1), appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "theirs"]


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "nowhere"))):
        write_model(tmp_path / "nowhere" / "m", spec_for("tiny"))


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10**9))
    with pytest.raises(UserError, match=r"needs \d+\.\d GB and the disk has 1\.0 GB free"):
        write_model(tmp_path / "m", spec_for("tp8-rank", layers=4))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(tensor, seed: int) -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "pieces", full)
    with pytest.raises(UserError, match="disk filled up"):
        write_model(tmp_path / "m", spec_for("tiny"))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)  # permissions do not hold root back
        try:
            with pytest.raises(UserError, match="cannot be written: Permission denied"):
                write_model(Path(folder) / "m", spec_for("tiny"))
        finally:
            if as_root:
                os.seteuid(0)
        Path(folder).chmod(0o755)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find_spec(name))
    with pytest.raises(UserError, match="tokenizers is not installed"):
        write_model(tmp_path / "m", spec_for("tiny"))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "m", spec_for("tiny"), interrupt)
    assert not list(tmp_path.iterdir())


# --- sizes and the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "huge"}, "'huge'"),
        ({"preset": "tiny", "layers": 0}, "--layers is 0"),
        ({"preset": "tiny", "vocab": 100}, "vocabulary of 100"),
        ({"preset": "tiny", "weight_format": "int4"}, "'int4'"),
        ({"preset": "tiny", "seed": -1}, "Seed -1"),
    ],
)
def test_a_wrong_size_is_named(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        spec_for(**options)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 10])
def test_one_layer_is_always_moe(layers: int) -> None:
    spec = spec_for("tp8-rank", layers=layers)
    assert (spec.num_layers, spec.num_dense_layers) == (layers, min(3, layers - 1))


def test_the_command_offers_every_preset_and_format() -> None:
    assert [preset.value for preset in Preset] == list(PRESETS)
    assert [weight_format.value for weight_format in WeightFormat] == list(WEIGHT_FORMATS)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("model")(command)
    return app


def test_json_report_holds_sizes_and_load(app: typer.Typer, tmp_path: Path) -> None:
    options = [str(tmp_path / "m"), "--layers", "2", "--format", "fp8", "--seed", "3", "--json"]
    report = json.loads(CliRunner().invoke(app, options).stdout)
    assert report["path"] == str(tmp_path / "m")
    assert (report["spec"]["num_layers"], report["spec"]["weight_format"], report["spec"]["seed"]) == (2, "fp8", 3)
    assert report["load"]["is_spread"] is True and report["load"]["unused"] == 0


def test_the_table_says_the_load(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "m"), "--layers", "1"])
    assert result.exit_code == 0
    assert "spread over all" in result.stdout and "unused 0" in result.stdout


def test_sigterm_leaves_nothing(app: typer.Typer, tmp_path: Path, monkeypatch) -> None:
    def stop(tensor, seed: int) -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield b""

    monkeypatch.setattr(weights, "pieces", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(app, [str(tmp_path / "m")]).exit_code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before
