"""The load format `glm_patch_synthetic`: weights of a GLM-4.6 made on the device from a seed, with no checkpoint.

Importing this is cheap; torch and the model's description are imported when a model is loaded.
"""

from __future__ import annotations

from vllm_glm_patch.synthetic.registration import FORMAT, offer

__all__ = ["FORMAT", "offer"]
