"""Options and their way through the environment."""

from __future__ import annotations

import pytest

from vllm_glm_patch.fence.options import Options


def test_options_survive_the_environment() -> None:
    options = Options(512, "start", "both", 0, True, "/tmp/x y", (16, 4096), 512, "/lib/a.so", "libcuda.so.1", True, "/c.so")
    assert Options.from_environment(options.to_environment()) == options


@pytest.mark.parametrize("environment", [{}, {"VLLM_GLM_PATCH_FENCE": "0"}, {"VLLM_GLM_PATCH_FENCE": ""}])
def test_without_the_switch_there_is_no_fence(environment: dict[str, str]) -> None:
    assert Options.from_environment({**environment, "VLLM_GLM_PATCH_FENCE_ALIGN": "512"}) is None


@pytest.mark.parametrize("align", [0, 3, 1024])
def test_an_align_that_cannot_be_is_refused_by_name(align: int) -> None:
    with pytest.raises(ValueError, match=f"align is {align}"):
        Options(align=align)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ValueError, match="VLLM_GLM_PATCH_FENCE_CACHE_MB is 'much'"):
        Options.from_environment({"VLLM_GLM_PATCH_FENCE": "1", "VLLM_GLM_PATCH_FENCE_CACHE_MB": "much"})
