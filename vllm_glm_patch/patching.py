"""Replaces attributes of modules, now or as soon as they are imported, all of one patch or none, and puts them back."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .catalog import Site

WAITING, IN_PLACE, UNDONE = "waits for its import", "in place", "undone"
_lock = threading.RLock()


class CannotReplace(Exception):
    """What stands at a site is not what the catalog describes; the text says what stands there."""


@dataclass
class Replacement:
    """One attribute to be replaced."""

    site: Site
    source: Path
    """The file whose fingerprint was checked; what is replaced must come from it."""
    factory: Callable[[Any], Any]
    """Makes the replacement from the original."""
    state: str = WAITING
    _owner: Any = None
    _original: Any = None
    _new: Any = None

    def put(self, module: ModuleType) -> None:
        """Put the replacement in `module`.

        Raises:
            CannotReplace: the attribute is missing, or does not come from the file that was checked.
        """
        *path, name = self.site.name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, None)
        if owner is None or name not in vars(owner):
            raise CannotReplace(f"{self.site} does not exist in the running vLLM")
        original = vars(owner)[name]
        code = getattr(inspect.unwrap(original), "__code__", None)
        if code is None or Path(code.co_filename).resolve() != self.source.resolve():
            found = code.co_filename if code else type(original).__name__
            raise CannotReplace(f"{self.site} was already replaced by something else ({found})")
        new = self.factory(original)
        setattr(owner, name, new)
        self._owner, self._original, self._new, self.state = owner, original, new, IN_PLACE

    def undo(self) -> None:
        """Put the very object back that stood there, unless somebody else replaced ours since."""
        name = self.site.name.rpartition(".")[2]
        if self.state == IN_PLACE and vars(self._owner)[name] is self._new:
            setattr(self._owner, name, self._original)
        self.state = UNDONE


class Change:
    """All replacements of one patch: in place together, or not at all."""

    def __init__(self, replacements: Sequence[Replacement], on_failure: Callable[[str], None]) -> None:
        self.replacements = tuple(replacements)
        self._on_failure = on_failure

    def begin(self) -> None:
        """Replace in the modules that are loaded, and in the others when they are imported.

        Where one attribute turns out to be another than was checked, everything is undone and `on_failure`
        is called with the reason.
        """
        for replacement in self.replacements:
            try:
                when_imported(replacement.site.module, self._putter(replacement))
            except CannotReplace as error:
                self._give_up(str(error))
                return

    def undo(self) -> None:
        """Put every original back and wait for no import any more."""
        for replacement in reversed(self.replacements):
            replacement.undo()

    def _putter(self, replacement: Replacement) -> Callable[[ModuleType], None]:
        def put(module: ModuleType) -> None:
            if replacement.state != WAITING:
                return
            try:
                replacement.put(module)
            except CannotReplace as error:
                self._give_up(str(error))

        return put

    def _give_up(self, reason: str) -> None:
        self.undo()
        self._on_failure(reason)


def when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call(module)` at once if the module is loaded, else right after its import. Imports nothing.

    Raises:
        CannotReplace: the module is in the middle of its import.
    """
    with _lock:
        module = sys.modules.get(name)
        if module is None:
            _watcher.waiting.setdefault(name, []).append(call)
            if _watcher not in sys.meta_path:
                sys.meta_path.insert(0, _watcher)
            return
    if getattr(module.__spec__, "_initializing", False):
        raise CannotReplace(f"{name} is in the middle of its import")
    call(module)


class _ImportWatcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and calls what waits for it once it is executed."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._watch(fullname, spec.loader)
                return spec
        return None

    def _watch(self, fullname: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            with _lock:
                calls = self.waiting.pop(fullname, [])
            for call in calls:
                call(module)

        loader.exec_module = exec_module


_watcher = _ImportWatcher()
