"""vLLM's model loader for the load format: hands the model made weights under the names of a checkpoint.

The weights go through the model's own `load_weights`, as those of a file do. So each rank keeps the part that its layout
gives it, a fused or renamed parameter is found by vLLM, and what a weight is depends on no layout.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.log import follow_vllm, logger

if TYPE_CHECKING:
    import torch

    from vllm_glm_patch.tools.model.tensors import Tensor

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+\..*")
# What every attention of a quantised model has, at -1 (zero points at 0) until vLLM has looked whether a checkpoint gave any.
_CACHE_SCALES = re.compile(r"\.(?:q|k|v|prob)_(?:scale|zero_point)$")
# Where 0.26.0 and some later releases keep experts: a module that is not in the names which `load_weights` reports.
_UNREPORTED = ".routed_experts."


def loader_class(base: type) -> type:
    """A subclass of vLLM's BaseModelLoader (0.10.1 to 0.33.0), whose `load_model` builds, fills and processes a model."""
    methods = {"download_model": _download_model, "load_weights": _load_weights, "__module__": __name__}
    return type("SyntheticModelLoader", (base,), methods)


def seed_of(extra_config: Any) -> int:
    """The seed in `--model-loader-extra-config`; 0 where it gives none.

    Raises:
        UserError: it has another key, or a seed that is no number from 0 to 2^63 - 1.
    """
    given: Mapping[str, Any] = extra_config if isinstance(extra_config, Mapping) else {}
    unknown = sorted(set(given) - {"seed"})
    if unknown:
        raise UserError(f"--model-loader-extra-config has an unknown key {unknown[0]!r}. The only key here is seed.")
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UserError(f"--model-loader-extra-config has seed {seed!r}. Give a whole number from 0 to 2^63 - 1.")
    return seed


def named_weights(config: Any, seed: int, device: torch.device, layers: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a whole checkpoint, a few MB at a time, those of other layers than `layers` left out.

    A layer's experts come ordered by what they are, gate, up or down, since vLLM takes them in any order.

    Args:
        config: the model's Hugging Face configuration, a Glm4MoeConfig.
        seed: the same seed gives the same values, on every device and in every layout.
        device: where to make them.
        layers: numbers of the layers that this rank holds.

    Raises:
        UserError: `config` is of a model that cannot be made.
    """
    from vllm_glm_patch.synthetic.fills import made_alike
    from vllm_glm_patch.synthetic.sizes import tensors_for

    for name, tensors in groupby(tensors_for(config), lambda tensor: _EXPERT.sub("", tensor.name)):
        found = _LAYER.search(name)
        if found is None or int(found.group(1)) in layers:
            kinds: dict[object, list[Tensor]] = {}
            for tensor in tensors:
                kinds.setdefault((tensor.dtype, tensor.shape, tensor.fill, tensor.value), []).append(tensor)
            for alike in kinds.values():
                yield from made_alike(alike, seed, device)


def _download_model(self: Any, model_config: Any) -> None:
    """There is nothing to download."""


def _load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
    """Fill a model that vLLM has built and not yet processed."""
    from vllm_glm_patch.synthetic.spread import measure

    follow_vllm()
    started = time.monotonic()
    seed = seed_of(self.load_config.model_loader_extra_config)
    parameters = dict(model.named_parameters())
    device = _device_of(parameters.values())
    layers = {int(found.group(1)) for name in parameters if (found := _LAYER.search(name))}
    loaded = model.load_weights(named_weights(model_config.hf_config, seed, device, layers))  # type: ignore[operator]
    _check_all_are_filled(parameters, loaded)
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    count, seconds = sum(parameter.numel() for parameter in parameters.values()), time.monotonic() - started
    load = measure(parameters, model_config.hf_config.num_experts_per_tok, seed)
    if load is None:
        logger.info("Synthetic weights: seed %d, %d parameters, %.1f s, no MoE gate on this rank.", seed, count, seconds)
        return
    logger.info(
        "Synthetic weights: seed %d, %d parameters, %.1f s, expert load of %d random tokens at the first MoE gate: "
        "variation %.3f, unused %d of %d.",
        *(seed, count, seconds, load.tokens, load.variation, load.unused, load.experts),
    )
    if not load.is_spread:
        logger.warning(
            "The synthetic router sends random tokens to few experts (variation %.3f, unused %d of %d), so times measured "
            "with it say little. Try another seed: --model-loader-extra-config '{\"seed\": %d}'.",
            *(load.variation, load.unused, load.experts, seed + 1),
        )


def _device_of(parameters: Iterable[torch.Tensor]) -> torch.device:
    """Where to make weights: the accelerator that holds some, else the CPU; offloaded ones are copied there."""
    import torch

    devices = {parameter.device for parameter in parameters}
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def _check_all_are_filled(parameters: Mapping[str, torch.Tensor], loaded: set[str] | None) -> None:
    """Warn of parameters that vLLM does not report as loaded: they hold whatever was in memory.

    But for the scales of the KV cache, which a checkpoint may leave out.
    """
    if not loaded:
        return
    reported = loaded | {name for name in parameters if name.replace(_UNREPORTED, ".") in loaded}
    missing = sorted(name for name in set(parameters) - reported if not _CACHE_SCALES.search(name))
    if missing:
        logger.warning(
            "Parameters without a synthetic weight: %d, among them %s; answers and times mean little. "
            "Serve a GLM-4.6 in bf16 or FP8 (`vllm-glm-patch model OUT --config-only`).",
            *(len(missing), missing[0]),
        )
