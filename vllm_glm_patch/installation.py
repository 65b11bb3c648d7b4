"""Applies the catalog to the running vLLM, once a process, and answers what was applied."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import catalog, patching, upstream
from .errors import StrictRefusal
from .fixes import Context, Fix
from .log import follow_vllm, logger
from .settings import PREFIX, Settings
from .version import __version__

APPLIED = "applied"
_REPORTED = "_GLM_PATCH_REPORTED"  # an environment variable, so that child processes stay quiet


@dataclass(frozen=True)
class PatchStatus:
    """What became of one patch in this process."""

    id: str
    state: str
    """``applied``, ``not needed``, ``switched off``, ``refused`` or ``not in this release``."""
    reason: str
    sites: tuple[tuple[str, str], ...] = ()
    """Each attribute with ``in place`` or ``waits for its import``."""


@dataclass(frozen=True)
class Status:
    """What this package did in this process."""

    version: str
    """Of vllm-glm-patch."""
    vllm: str | None
    """The version of vLLM; None where there is none."""
    settings: Settings
    patches: tuple[PatchStatus, ...]

    def table(self) -> str:
        """The status as lines of text, one a patch."""
        head = f"vllm-glm-patch {self.version} on vLLM {self.vllm or '(none found)'}, shape policy {self.settings.shape_policy}"
        width = max((len(p.id) for p in self.patches), default=0)
        states = max((len(p.state) for p in self.patches), default=0)
        rows = [f"  {p.id:<{width}}  {p.state:<{states}}  {p.reason}".rstrip() for p in self.patches]
        return "\n".join([head, *rows])


class _Installation:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings = Settings()
        self.found: upstream.Upstream | None = None
        self.decisions: dict[str, catalog.Decision] = {}
        self.changes: dict[str, patching.Change] = {}
        self.fixes: dict[str, tuple[Fix, Context]] = {}
        self.watch: patching.Change | None = None

    def install(self, settings: Settings) -> None:
        with self.lock:
            self.settings = settings
            self.found = upstream.find_installed()
            if self.found and self.watch is None:
                self._watch_configuration(self.found)
            decisions = catalog.decide(self.found, settings) if self.found else []
            self.decisions = {decision.id: self._kept(asked(decision, settings)) for decision in decisions}
            for patch_id in [i for i in self.changes if self.state_of(i) != catalog.APPLY]:
                self.undo(patch_id)
            self._refuse_in_strict_mode()
            for decision in self.decisions.values():
                if decision.state == catalog.APPLY and decision.id not in self.changes:
                    self._begin(decision)

    def _watch_configuration(self, found: upstream.Upstream) -> None:
        """See vLLM's configuration when it is made. This only observes, so it needs no fingerprint."""
        module, name = "vllm.engine.arg_utils", "EngineArgs.create_engine_config"
        site = catalog.Site("configuration", module, name, SpecifierSet(), {})
        replacement = patching.Replacement(site, found.source_of(module), _watched)
        self.watch = patching.Change(
            [replacement], lambda reason: logger.warning("--additional-config is not read: %s", reason)
        )
        self.watch.begin()

    def _kept(self, decision: catalog.Decision) -> catalog.Decision:
        """A patch that failed at an import in this process stays refused."""
        before = self.decisions.get(decision.id)
        failed = before and before.state == catalog.REFUSED and decision.state == catalog.APPLY
        return before if before and failed else decision

    def _begin(self, decision: catalog.Decision) -> None:
        patch, found = decision.patch, self.found
        assert patch is not None and found is not None

        def relied_on() -> bool:
            return all(self.state_of(i) in (catalog.APPLY, catalog.NOT_NEEDED) for i in patch.relies_on)

        fix: Fix = importlib.import_module(patch.fix)
        context = Context(Version(found.release), lambda: self.settings, relied_on)
        factories = fix.replacements(context)
        replacements = [
            patching.Replacement(site, found.source_of(site.module), factories[site.role]) for site in decision.sites
        ]
        self.fixes[patch.id] = (fix, context)
        self.changes[patch.id] = patching.Change(replacements, self._failure_of(patch.id))
        self.changes[patch.id].begin()

    def _failure_of(self, patch_id: str) -> Callable[[str], None]:
        def failed(reason: str) -> None:
            with self.lock:
                self.decisions[patch_id] = catalog.Decision(patch_id, catalog.REFUSED, reason)
                self.changes.pop(patch_id, None)
                self.fixes.pop(patch_id, None)
            self._refuse_in_strict_mode()
            logger.warning("The patch %s was not applied: %s. %s", patch_id, reason, _STRICT_HINT)

        return failed

    def _refuse_in_strict_mode(self) -> None:
        refused = [d for d in self.decisions.values() if d.state == catalog.REFUSED]
        if self.settings.strict and refused:
            reasons = "; ".join(f"{d.id}: {d.reason}" for d in refused)
            raise StrictRefusal(
                f"VLLM_GLM_PATCH_STRICT=1 and not every patch can be applied: {reasons}. Install a vllm-glm-patch made for "
                "this vLLM, name the patches in VLLM_GLM_PATCH_DISABLE, or unset VLLM_GLM_PATCH_STRICT."
            )

    def undo(self, patch_id: str) -> None:
        self.changes.pop(patch_id).undo()
        self.fixes.pop(patch_id, None)

    def uninstall(self) -> None:
        with self.lock:
            for patch_id in reversed(list(self.changes)):
                self.undo(patch_id)
            if self.watch is not None:
                self.watch.undo()
                self.watch = None
            self.decisions = {}

    def state_of(self, patch_id: str) -> str | None:
        decision = self.decisions.get(patch_id)
        return decision.state if decision else None

    def status(self) -> Status:
        with self.lock:
            patches = tuple(self._status_of(decision) for decision in self.decisions.values())
            return Status(__version__, self.found.version if self.found else None, self.settings, patches)

    def _status_of(self, decision: catalog.Decision) -> PatchStatus:
        if decision.state != catalog.APPLY:
            return PatchStatus(decision.id, decision.state, decision.reason)
        change = self.changes[decision.id]
        sites = tuple((str(r.site), r.state) for r in change.replacements)
        title = decision.patch.title if decision.patch else ""
        return PatchStatus(decision.id, APPLIED, title, sites)


def asked(decision: catalog.Decision, settings: Settings) -> catalog.Decision:
    """The decision after its fix was asked: it may have no use on this machine, or be switched off by a setting of its own."""
    if decision.state != catalog.APPLY or decision.patch is None:
        return decision
    declines = getattr(importlib.import_module(decision.patch.fix), "declines", None)
    answer = declines(settings) if declines is not None else None
    return decision if answer is None else catalog.Decision(decision.id, answer[0], answer[1], decision.patch)


_STRICT_HINT = "vLLM runs on without it; set VLLM_GLM_PATCH_STRICT=1 to refuse to start instead."
_installation = _Installation()


def install(settings: Settings | None = None) -> Status:
    """Patch the vLLM of this process; modules that are not imported yet are patched when they are.

    Calling it again changes nothing, unless the settings differ: then patches are added or taken back.

    Args:
        settings: the switches; by default those in the environment.

    Raises:
        UserError: a VLLM_GLM_PATCH* variable has a value that is not allowed.
        StrictRefusal: strict mode, and a patch cannot be applied.
    """
    _installation.install(Settings.from_environment() if settings is None else settings)
    return _installation.status()


def uninstall() -> None:
    """Put back every object that `install` replaced."""
    _installation.uninstall()


def status() -> Status:
    """What `install` did in this process."""
    return _installation.status()


def adopt(additional_config: Any) -> None:
    """Take over the settings in vLLM's --additional-config, for this process and its children.

    Raises:
        UserError: a key or value is not allowed.
        StrictRefusal: as `install`.
    """
    settings = _installation.settings.with_config(additional_config)
    if settings != _installation.settings:
        install(settings)
        os.environ.update(settings.environment())
        make_variables_known()


def make_variables_known() -> None:
    """vLLM warns of VLLM_* variables it does not know, or refuses them (--fail-on-environ-validation)."""
    known = getattr(sys.modules.get("vllm.envs"), "environment_variables", None)
    if isinstance(known, dict):
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            known.setdefault(name, functools.partial(os.environ.get, name))


def _watched(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        follow_vllm()
        adopt(getattr(self, "additional_config", None))
        config = original(self, *args, **kwargs)
        for fix, context in list(_installation.fixes.values()):
            told = getattr(fix, "on_engine_config", None)
            if told is not None:
                told(context, config)
        report()
        return config

    return create_engine_config


def report() -> None:
    """Log the table of patches, and one warning for those refused: once for a process and all its children."""
    if os.environ.get(_REPORTED):
        return
    os.environ[_REPORTED] = "1"
    now = status()
    logger.info("%s", now.table())
    refused = [p for p in now.patches if p.state == catalog.REFUSED]
    reasons = {p.reason for p in refused}
    if refused and len(reasons) == 1 and len(refused) == len(now.patches):
        logger.warning("%s; nothing was patched. %s", reasons.pop(), _STRICT_HINT)
    elif refused:
        text = "; ".join(f"{p.id}: {p.reason}" for p in refused)
        logger.warning("Not every patch was applied. %s. %s", text, _STRICT_HINT)
