"""A synthetic GLM-4.6 checkpoint: real names, dtypes and shapes, weights from a seed, no download."""

from __future__ import annotations

from vllm_glm_patch.tools.model.cli import command
from vllm_glm_patch.tools.model.report import ModelReport
from vllm_glm_patch.tools.model.spec import PRESETS, ModelSpec, spec_for
from vllm_glm_patch.tools.model.write import write_config, write_model

__all__ = ["PRESETS", "ModelReport", "ModelSpec", "command", "spec_for", "write_config", "write_model"]
