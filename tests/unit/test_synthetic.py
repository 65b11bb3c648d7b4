"""The load format `glm_patch_synthetic`: what it fills a model with, and how vLLM gets to know it."""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_glm_patch import UserError, cli, plugin, synthetic
from vllm_glm_patch.synthetic import fills, loader, sizes
from vllm_glm_patch.synthetic.spread import measure
from vllm_glm_patch.tools.model import PRESETS, ModelSpec, spec_for, weights
from vllm_glm_patch.tools.model.config import config_of
from vllm_glm_patch.tools.model.tensors import Tensor, tensors_of

CPU = torch.device("cpu")
LOADERS = "vllm.model_executor.model_loader"


def config(preset: str = "tiny", **changes: Any) -> SimpleNamespace:
    """The configuration of a preset as vLLM hands it over."""
    weight_format = changes.pop("weight_format", None)
    return SimpleNamespace(**{**config_of(spec_for(preset, weight_format=weight_format)), **changes})


def tensor(name: str, spec: ModelSpec) -> Tensor:
    return next(tensor for tensor in tensors_of(spec) if tensor.name == name)


def draws(name: str, seed: int, first: int, count: int) -> torch.Tensor:
    return fills._draws(fills._keys([name], seed, CPU), first, count)[0]


class Model(torch.nn.Module):
    """Takes the weights it is made for under their own names, as a model of vLLM takes those of its rank."""

    def __init__(self, wanted: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = {t.name: torch.nn.Parameter(torch.full(t.shape, torch.nan), requires_grad=False) for t in wanted}
        self.offered: list[str] = []

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.held.items())

    def load_weights(self, offered: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, value in offered:
            self.offered.append(name)
            if name in self.held:
                self.held[name].data.copy_(value)
        return set(self.offered) & set(self.held)


class Base:
    """vLLM's BaseModelLoader, as far as it matters here."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config


def load(model: Model, hf_config: Any, **extra: Any) -> None:
    made = loader.loader_class(Base)(SimpleNamespace(model_loader_extra_config=extra))
    made.download_model(SimpleNamespace())
    made.load_weights(model, model_config=SimpleNamespace(hf_config=hf_config))


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_every_tensor_has_the_dtype_and_shape_of_the_checkpoint(weight_format: str) -> None:
    for wanted in tensors_of(spec_for("tiny", layers=2, weight_format=weight_format)):
        value = fills.made(wanted, 0, CPU)
        assert value.shape == wanted.shape, wanted.name
        assert value.dtype == fills._DTYPES[wanted.dtype], wanted.name
        assert value.float().isfinite().all(), wanted.name


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.o_proj"])
def test_fp8_weights_times_their_scales_have_the_deviation_of_their_width(name: str) -> None:
    spec = spec_for("tiny", weight_format="fp8")
    prefix = f"model.layers.0.{name}"
    weight, scale = (fills.made(tensor(f"{prefix}.{part}", spec), 0, CPU) for part in ("weight", "weight_scale"))
    wanted = tensor(f"{prefix}.weight", spec).value
    effective = weight.float() * scale.float()
    assert effective.std().item() == pytest.approx(wanted, rel=0.05)
    assert effective.mean().item() == pytest.approx(0, abs=0.05 * wanted)
    assert weight.float().abs().max() == 448
    assert 0.7 < scale.float().min() / scale.float().mean() < 0.85  # the rows differ
    assert scale.unique().numel() > 50


def test_bf16_is_the_model_that_fp8_stores() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    spec = spec_for("tiny", weight_format="fp8")
    stored, scale = fills.made(tensor(name, spec), 3, CPU), fills.made(tensor(f"{name}_scale", spec), 3, CPU)
    plain = fills.made(tensor(name, replace(spec, weight_format="bf16")), 3, CPU)
    assert torch.equal(plain, (stored.float() * scale.float()).bfloat16())


def test_values_are_those_of_splitmix64() -> None:
    """Against a plain implementation on Python's whole numbers."""
    mask, key = 2**64 - 1, draws("name", 5, -1, 1).item()  # counter 0: the key itself, mixed
    for shift, factor in reversed(fills._ROUNDS):
        key = key * pow(factor % 2**64, -1, 2**64) & mask
        undone = key
        for _ in range(64 // shift + 1):
            undone = key ^ (undone >> shift)
        key = undone
    expected = []
    for counter in (1, 2, 3):
        z = (counter * 0x9E3779B97F4A7C15 + key) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        expected.append(z ^ (z >> 31))
    assert [value % 2**64 for value in draws("name", 5, 0, 3).tolist()] == expected


def test_all_256_steps_are_used_alike() -> None:
    wanted = Tensor("w", "F8_E4M3", (512, 4096), "linear", 1.0)
    counts = draws("w", 0, 0, wanted.elements // 8).view(torch.uint8).int().bincount(minlength=256)
    assert ((counts - wanted.elements / 256).abs() < 6 * (wanted.elements / 256) ** 0.5).all()
    assert set(fills.made(wanted, 0, CPU).view(torch.uint8).unique().tolist()) == set(weights.codes().tolist())


def test_a_seed_gives_the_same_values_and_another_seed_others() -> None:
    wanted = tensor("model.layers.1.mlp.gate.weight", spec_for("tiny"))
    assert torch.equal(fills.made(wanted, 1, CPU), fills.made(wanted, 1, CPU))
    assert not torch.equal(fills.made(wanted, 1, CPU), fills.made(wanted, 2, CPU))


def test_tensors_of_different_names_are_unrelated() -> None:
    spec = spec_for("tiny")
    one, other = (fills.made(tensor(f"model.layers.1.mlp.experts.{n}.up_proj.weight", spec), 0, CPU).float() for n in (0, 1))
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()) < 0.03


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16"])
def test_values_do_not_depend_on_the_size_of_the_pieces(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Tensor("w", dtype, (37, 24), "linear", 1.0)
    whole = fills.made(wanted, 0, CPU)
    monkeypatch.setattr(fills, "_PIECE_ELEMENTS", 200)
    assert torch.equal(fills.made(wanted, 0, CPU).float(), whole.float())


def test_values_do_not_depend_on_the_default_dtype_that_vllm_sets() -> None:
    spec = spec_for("tiny", layers=2)
    wanted = [t for t in tensors_of(spec) if t.name.startswith(("lm_head", "model.embed", "model.layers.1.mlp.gate"))]
    expected = [fills.made(t, 0, CPU) for t in wanted]
    before = torch.get_default_dtype()
    for cached in (fills._tables, weights.codes, weights.step_std):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [fills.made(t, 0, CPU) for t in wanted]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert [one.dtype for one in found] == [one.dtype for one in expected]


def test_ranks_of_a_pipeline_make_their_own_layers_of_one_model() -> None:
    everything = list(tensors_of(spec_for("tiny")))
    last = [t for t in everything if ".layers.3." in t.name]
    whole, part = Model(everything), Model(last)
    for model in (whole, part):
        load(model, config(), seed=7)
    assert not any(".layers.1." in name for name in part.offered)
    assert all(torch.equal(part.held[t.name], whole.held[t.name]) for t in last)


def test_a_whole_model_is_filled_and_its_routing_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(tensors_of(spec_for("tiny", weight_format="fp8")))
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        load(model, config(weight_format="fp8"))
    assert not any(value.isnan().any() for value in model.held.values())
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    parameters = sum(value.numel() for value in model.held.values())
    assert line.startswith(f"Synthetic weights: seed 0, {parameters} parameters, ")
    assert "expert load of 8192 random tokens at the first MoE gate: variation 0." in line
    assert line.endswith("unused 0 of 16.")
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_rank_without_a_gate_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Model([tensor("lm_head.weight", spec_for("tiny"))])
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        load(model, config())
    assert "no MoE gate on this rank" in caplog.text


def test_a_collapsed_router_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tensors_of(spec_for("tiny")))
    monkeypatch.setattr(fills, "made", lambda t, seed, device: torch.ones(t.shape, device=device))
    load(model, config())
    assert "few experts (variation 1.7" in caplog.text
    assert "Try another seed" in caplog.text


def test_parameters_that_stay_empty_are_named(caplog: pytest.LogCaptureFixture) -> None:
    load(Model([*tensors_of(spec_for("tiny")), Tensor("model.extra", "BF16", (1,), "constant", 0)]), config())
    assert "without a synthetic weight: 1, among them model.extra;" in caplog.text


def test_scales_of_the_kv_cache_that_vllm_sets_itself_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    attention = "model.layers.1.self_attn.attn"
    names = ("q_scale", "k_scale", "v_scale", "prob_scale", "q_zero_point", "k_zero_point", "v_zero_point")
    scales = [Tensor(f"{attention}.{name}", "F32", (), "constant", 0) for name in names]
    model = Model([*tensors_of(spec_for("tiny", weight_format="fp8")), *scales])
    load(model, config(weight_format="fp8"))
    assert "without a synthetic weight" not in caplog.text


class Runner(Model):
    """Keeps experts in a module of their own and reports them without it, as the MoE runner of 0.26.0 does."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name.replace(".experts.", ".experts.routed_experts."), held) for name, held in self.held.items())


def test_experts_that_vllm_reports_by_a_shorter_name_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    wanted = list(tensors_of(spec_for("tiny")))
    load(Runner(wanted), config())
    assert "without a synthetic weight" not in caplog.text
    load(Runner([*wanted, Tensor("model.layers.1.mlp.experts.w9", "BF16", (1,), "constant", 0)]), config())
    assert "without a synthetic weight: 1, among them model.layers.1.mlp.experts.routed_experts.w9;" in caplog.text


def test_fp8_weights_are_numbers_and_spread_over_both_signs() -> None:
    """0x7f and 0xff are the NaN of E4M3; a kernel would hand one of them on to a whole row."""
    for wanted in tensors_of(spec_for("tiny", layers=2, weight_format="fp8")):
        if wanted.dtype == "F8_E4M3":
            value = fills.made(wanted, 0, CPU)
            codes = value.view(torch.uint8)
            assert not bool(((codes & 0x7F) == 0x7F).any()), wanted.name
            assert (codes < 0x80).float().mean().item() == pytest.approx(0.5, abs=0.02), wanted.name


def test_fp8_parameters_take_the_bytes_as_they_are_and_bf16_scales_as_float32() -> None:
    """What vLLM's loaders do with them: a copy into a part of a stacked parameter, on the same device."""
    spec = spec_for("tiny", weight_format="fp8")
    layer = "model.layers.1.mlp.experts.3"
    rows, columns = spec.moe_intermediate_size, spec.hidden_size
    w13 = torch.empty(spec.num_experts, 2 * rows, columns, dtype=torch.float8_e4m3fn)
    w13_scale = torch.ones(spec.num_experts, 2 * rows, 1)
    for place, name in ((0, "gate_proj"), (rows, "up_proj")):
        weight, scale = (fills.made(tensor(f"{layer}.{name}.{part}", spec), 0, CPU) for part in ("weight", "weight_scale"))
        w13[3].narrow(0, place, rows).copy_(weight)
        w13_scale[3].narrow(0, place, rows).copy_(scale)
        assert torch.equal(w13[3, place : place + rows].view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(w13_scale[3, place : place + rows], scale.float())
    effective = w13[3].float() * w13_scale[3]
    assert effective.std().item() == pytest.approx(columns**-0.5, rel=0.05)


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_weights_that_are_made_together_are_those_that_are_made_alone(
    weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for("tiny", layers=2, weight_format=weight_format)
    expected = {t.name: fills.made(t, 5, CPU) for t in tensors_of(spec)}
    for elements in (1 << 23, 3 * spec.moe_intermediate_size * spec.hidden_size + 1):  # all of a layer; three at a time
        monkeypatch.setattr(fills, "_PIECE_ELEMENTS", elements)
        found = dict(loader.named_weights(config(weight_format=weight_format, num_hidden_layers=2), 5, CPU, {0, 1}))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == expected[name].dtype
            assert value.shape == expected[name].shape
            assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_no_more_than_a_piece_is_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 GB of weights on a card of 80 GB: there is no room for a second copy."""
    monkeypatch.setattr(fills, "_PIECE_ELEMENTS", 1 << 17)
    seen: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    for name, value in loader.named_weights(config(weight_format="fp8"), 0, CPU, {0, 1}):
        storage = value.untyped_storage()
        assert storage.nbytes() <= max(value.nbytes, 2 * (1 << 17)), name
        others = [ref for place, ref in seen if place != storage.data_ptr() and ref() is not None]
        assert others == [], name
        seen.append((storage.data_ptr(), weakref.ref(value)))
        del value, storage


@pytest.mark.parametrize("seed", range(3))
def test_tokens_spread_over_the_160_experts_of_glm_46(seed: int) -> None:
    spec = spec_for("full", layers=4)
    layer = "model.layers.3."
    names = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias", "post_attention_layernorm.weight")
    found = measure({layer + name: fills.made(tensor(layer + name, spec), seed, CPU) for name in names}, spec.top_k, seed)
    assert found is not None
    assert (found.tokens, found.experts, found.unused) == (8192, 160, 0)
    assert found.variation < 0.15


@pytest.mark.parametrize("preset", PRESETS)
def test_the_configuration_of_a_preset_gives_its_tensors(preset: str) -> None:
    assert list(sizes.tensors_for(config(preset))) == list(tensors_of(spec_for(preset)))


def test_what_a_configuration_switches_off_is_left_out() -> None:
    names = [t.name for t in sizes.tensors_for(config(use_qk_norm=False, attention_bias=False))]
    assert not any("_norm.weight" in name and "self_attn" in name for name in names)
    assert not any(name.endswith(".bias") for name in names)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "for model_type 'glm4_moe' only, and this model has 'llama'"),
        ({"tie_word_embeddings": True}, "for tie_word_embeddings False only, and this model has True"),
        ({"hidden_size": None}, "gives no number for hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "this model has fp8 with no groups"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        sizes.tensors_for(config(**changes))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"sead": 1}, "unknown key 'sead'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": "1"}, "seed '1'"),
        ({"seed": True}, "seed True"),
    ],
)
def test_a_wrong_extra_configuration_is_refused(extra: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        loader.seed_of(extra)


def loaders(**members: Any) -> ModuleType:
    """vLLM's module of loaders, as imported."""
    module = ModuleType(LOADERS)
    module.__spec__ = None
    vars(module).update(members)
    return module


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_the_plugin_registers_the_format_once_patched_or_not(monkeypatch: pytest.MonkeyPatch, enabled: str) -> None:
    known: list[tuple[str, type]] = []
    module = loaders(BaseModelLoader=Base, register_model_loader=lambda name: lambda cls: known.append((name, cls)))
    monkeypatch.setitem(sys.modules, LOADERS, module)
    monkeypatch.setenv("VLLM_GLM_PATCH", enabled)
    plugin.register()
    plugin.register()
    ((name, cls),) = known
    assert name == "glm_patch_synthetic"
    assert issubclass(cls, Base)


def test_a_vllm_without_registration_is_left_alone_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm_glm_patch"):
        for _ in range(2):
            monkeypatch.setitem(sys.modules, LOADERS, loaders(BaseModelLoader=Base))
            synthetic.offer()
    (line,) = [r.getMessage() for r in caplog.records]
    assert "--load-format glm_patch_synthetic is not available. Use vLLM 0.10.1 or newer" in line


@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_the_command_writes_a_model_without_weights(preset: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["model", str(tmp_path / "m"), "--preset", preset, "--config-only", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(tmp_path / "m")
    expected = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "m").iterdir()} == expected
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == config_of(spec_for(preset))
    assert [file for file in tmp_path.iterdir() if file.name != "m"] == []
