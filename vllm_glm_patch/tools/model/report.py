"""What the command says about a model it wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_glm_patch.tools.model.routing import ExpertLoad
from vllm_glm_patch.tools.model.spec import ModelSpec


@dataclass(frozen=True)
class ModelReport:
    """A written model.

    Attributes:
        path: its folder.
        spec: its sizes, format and seed.
        parameters: weights in all, scales not counted.
        nbytes: bytes of all tensors.
        shards: safetensors files.
        seconds: time it took to write.
        load: how random tokens spread over the experts of its first MoE layer.
    """

    path: Path
    spec: ModelSpec
    parameters: int
    nbytes: int
    shards: int
    seconds: float
    load: ExpertLoad

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            **asdict(self),
            "path": str(self.path),
            "seconds": round(self.seconds, 3),
            "load": {**asdict(self.load), "is_spread": self.load.is_spread},
        }
