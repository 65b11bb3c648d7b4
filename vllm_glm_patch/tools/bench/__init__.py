"""The commands `vllm-glm-patch bench …`: throughput and latency with the patches and without, as an operator measures them."""

from .cli import app

__all__ = ["app"]
