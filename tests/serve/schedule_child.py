"""Lets vLLM's real scheduler cut prompts into steps, without a model; run as a process of its own, away from pytest's.

Reads a JSON list of cases {"settings": ..., "flags": ..., "prompts": [lengths]} and writes a list of
{"steps": [tokens of each step], "scheduler": its class, "limit": its own budget, "log": what was logged}.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

_BLOCKS = 4096


def main() -> None:
    model, asked, answered = map(Path, sys.argv[1:])
    answers = [run(str(model), **case) for case in json.loads(asked.read_text())]
    answered.write_text(json.dumps(answers))


def run(model: str, settings: dict[str, Any], flags: dict[str, Any], prompts: list[int]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_glm_patch

    vllm_glm_patch.install(vllm_glm_patch.Settings())
    defaults = {"enforce_eager": True, "max_num_batched_tokens": 8192, "max_model_len": 20480}
    arguments = EngineArgs(model=model, additional_config={"glm_patch": settings}, **{**defaults, **flags})
    config = arguments.create_engine_config()
    log = Lines()
    logging.getLogger("vllm").addHandler(log)  # ours takes its handlers from there
    scheduler = scheduler_of(config)
    for number, length in enumerate(prompts):
        scheduler.add_request(request(number, length, scheduler.block_size))
    steps = []
    while (tokens := scheduler.schedule().total_num_scheduled_tokens) and sum(steps) < sum(prompts):
        steps.append(tokens)
    logging.getLogger("vllm").removeHandler(log)
    limit = scheduler.max_num_scheduled_tokens
    return {"steps": steps, "scheduler": type(scheduler).__name__, "limit": limit, "log": "\n".join(log.lines)}


def scheduler_of(config: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    size = config.cache_config.block_size
    config.cache_config.num_gpu_blocks = _BLOCKS
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=16, dtype=torch.bfloat16)
    cache = KVCacheConfig(num_blocks=_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config), block_size=size
    )


def request(number: int, length: int, block_size: int) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    return Request(f"request-{number}", [number] * length, SamplingParams(max_tokens=1), None, block_hasher=hasher)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


if __name__ == "__main__":
    main()
