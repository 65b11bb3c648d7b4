"""Every switch of this package, and where it is read from: the environment and vLLM's --additional-config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import UserError

PREFIX = "VLLM_GLM_PATCH"
CONFIG_KEY = "glm_patch"
CACHE = f"{PREFIX}_CACHE"  # no setting: moe/hopper/cache.py reads it, where it is needed
MOE_BACKENDS = ("auto", "triton", "hopper", "upstream")
SHAPE_POLICIES = ("auto", "captured", "guarded", "off")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Settings:
    """The switches of one deployment.

    The environment gives the start values (`from_environment`); the keys of
    ``--additional-config '{"glm_patch": {...}}'`` replace them (`with_config`), except that
    ``VLLM_GLM_PATCH=0`` keeps everything off.
    """

    enabled: bool = field(default=True, metadata={"env": PREFIX})
    """False turns every patch off."""
    strict: bool = field(default=False, metadata={"env": f"{PREFIX}_STRICT"})
    """True refuses to start where a patch that is needed cannot be applied."""
    disable: tuple[str, ...] = field(default=(), metadata={"env": f"{PREFIX}_DISABLE"})
    """Ids of single patches to leave out."""
    shape_policy: str = field(default="auto", metadata={"env": f"{PREFIX}_SHAPE_POLICY"})
    """What to do with the step of exactly max_num_batched_tokens; one of `SHAPE_POLICIES`."""
    compile_full_step: bool = field(default=False, metadata={"env": f"{PREFIX}_COMPILE_FULL_STEP"})
    """True adds the full-budget step to vLLM's compile_sizes (policy `captured` only)."""
    moe_backend: str = field(default="auto", metadata={"env": f"{PREFIX}_MOE"})
    """Which kernel serves FP8 MoE layers (patch `fused-moe`); one of `MOE_BACKENDS`."""
    tuned_dir: str = field(default="", metadata={"env": f"{PREFIX}_TUNED_DIR"})
    """The folder of the user's tuned tables; empty: `tables()` says where."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the VLLM_GLM_PATCH* variables.

        Raises:
            UserError: a variable is unknown or its value not allowed; the text lists what is.
        """
        environ = os.environ if environ is None else environ
        known = {f.metadata["env"] for f in fields(cls)}
        for name in environ:
            if name.startswith(PREFIX) and name not in {*known, CACHE} and not name.startswith(f"{PREFIX}_FENCE"):
                raise UserError(f"The variable {name} is not known; known are {', '.join(sorted(known))}.")
        given = {f.name: environ[f.metadata["env"]] for f in fields(cls) if f.metadata["env"] in environ}
        return cls().with_values(given, {f.name: f.metadata["env"] for f in fields(cls)})

    def with_config(self, additional_config: Any) -> Settings:
        """These settings with the keys of `additional_config["glm_patch"]` in place of their own.

        Raises:
            UserError: a key or value is not allowed; the text lists what is.
        """
        if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
            return self
        given = additional_config[CONFIG_KEY]
        where = f'--additional-config "{CONFIG_KEY}"'
        if not isinstance(given, Mapping):
            raise UserError(f"{where} is {given!r}; it must be an object with keys from: {', '.join(names())}.")
        for key in given:
            if key not in names():
                raise UserError(f"{where} has the unknown key {key!r}; allowed keys: {', '.join(names())}.")
        chosen = self.with_values(given, {name: f"{where} key {name!r}" for name in names()})
        return chosen if self.enabled else replace(chosen, enabled=False)

    def with_values(self, given: Mapping[str, Any], called: Mapping[str, str]) -> Settings:
        """These settings with `given` checked and put in; `called` says how to name each key in an error."""
        parsed: dict[str, Any] = {key: _PARSERS[key](value, called[key]) for key, value in given.items()}
        return replace(self, **parsed)

    def tables(self) -> Path | None:
        """The folder of the user's tuned tables, whether or not it exists; None for a user without a home."""
        chosen = self.tuned_dir or f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/vllm-glm-patch/tuned"
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            return None

    def environment(self) -> dict[str, str]:
        """The same settings as environment variables, for child processes."""
        return {f.metadata["env"]: _text(getattr(self, f.name)) for f in fields(self)}


def names() -> tuple[str, ...]:
    """The names of all settings, as used in --additional-config."""
    return tuple(f.name for f in fields(Settings))


def _flag(value: Any, called: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise UserError(f"{called} is {value!r}; allowed values: 1, true, yes, on, 0, false, no, off.")


def _ids(value: Any, called: str) -> tuple[str, ...]:
    from .catalog import patch_ids

    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{called} is {value!r}; it must be patch ids, as a list or separated by commas.")
    ids = tuple(item.strip() for item in items if item.strip())
    for item in ids:
        if item not in patch_ids():
            raise UserError(f"{called} names the unknown patch {item!r}; known patches: {', '.join(patch_ids())}.")
    return ids


def _policy(value: Any, called: str) -> str:
    text = str(value).strip().lower()
    if text not in SHAPE_POLICIES:
        raise UserError(f"{called} is {value!r}; allowed values: {', '.join(SHAPE_POLICIES)}.")
    return text


def _backend(value: Any, called: str) -> str:
    text = str(value).strip().lower()
    if text not in MOE_BACKENDS:
        raise UserError(f"{called} is {value!r}; allowed values: {', '.join(MOE_BACKENDS)}.")
    return text


def _folder(value: Any, called: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{called} is {value!r}; it must be the path of a folder.")
    return value.strip()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return ",".join(value) if isinstance(value, tuple) else str(value)


_PARSERS = {
    "enabled": _flag,
    "strict": _flag,
    "disable": _ids,
    "shape_policy": _policy,
    "compile_full_step": _flag,
    "moe_backend": _backend,
    "tuned_dir": _folder,
}
