"""One module a patch. Each offers `replacements(context)`: a factory for each role its catalog entry names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from packaging.version import Version

from ..settings import Settings

Factory = Callable[[Any], Any]
"""Takes the original attribute and returns what replaces it."""


@dataclass(frozen=True)
class Context:
    """What a fix may know of the deployment."""

    release: Version
    settings: Callable[[], Settings]
    """The settings in force now; they can still change when vLLM's own configuration is read."""
    relied_on: Callable[[], bool]
    """Whether every patch that this one relies on is in place or not needed."""


class Fix(Protocol):
    """The shape of a fix module. It may also offer `on_engine_config(context, vllm_config)`, and `declines(settings)`: a
    state and a reason where the patch has no use on this machine, or where a setting of its own switches it off."""

    def replacements(self, context: Context) -> Mapping[str, Factory]:
        """A factory for each role."""
