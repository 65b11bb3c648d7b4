"""Replacing attributes: at once or at import, all of a patch or none, and back to the very same objects."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from vllm_glm_patch.catalog import Site
from vllm_glm_patch.patching import IN_PLACE, UNDONE, WAITING, Change, Replacement, when_imported

MODULE = """
def function():
    return "original"


class Class:
    def method(self):
        return "original"


class Child(Class):
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and is not yet."""
    name = f"glm_patch_target_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def wrapper(original: Any) -> Any:
    @functools.wraps(original)
    def replaced(*args: Any) -> str:
        return f"replaced {original(*args)}"

    return replaced


def change_of(module: str, names: list[str], tmp_path: Path, failures: list[str]) -> Change:
    source = tmp_path / f"{module}.py"
    sites = [Site("role", module, name, SpecifierSet(), {}) for name in names]
    return Change([Replacement(site, source, wrapper) for site in sites], failures.append)


def test_a_loaded_module_is_replaced_at_once_and_restored_to_the_same_object(module: str, tmp_path: Path) -> None:
    loaded = __import__(module)
    before = loaded.function, vars(loaded.Class)["method"]
    change = change_of(module, ["function", "Class.method"], tmp_path, [])
    change.begin()
    assert loaded.function() == "replaced original"
    assert loaded.Child().method() == "replaced original"
    assert [r.state for r in change.replacements] == [IN_PLACE, IN_PLACE]
    change.undo()
    assert (loaded.function, vars(loaded.Class)["method"]) == before
    assert loaded.function is before[0]
    assert [r.state for r in change.replacements] == [UNDONE, UNDONE]


def test_an_unloaded_module_is_not_imported_and_replaced_when_it_is(module: str, tmp_path: Path) -> None:
    change = change_of(module, ["function"], tmp_path, [])
    change.begin()
    assert module not in sys.modules
    assert change.replacements[0].state == WAITING
    loaded = __import__(module)
    assert loaded.function() == "replaced original"
    assert loaded.__spec__.loader.get_source(module) == MODULE


def test_a_change_that_was_undone_before_the_import_does_nothing(module: str, tmp_path: Path) -> None:
    change = change_of(module, ["function"], tmp_path, [])
    change.begin()
    change.undo()
    assert __import__(module).function() == "original"


@pytest.mark.parametrize("names", [["function", "missing"], ["function", "Class.missing"], ["function", "Child.method"]])
def test_one_site_that_is_not_there_undoes_all(module: str, tmp_path: Path, names: list[str]) -> None:
    failures: list[str] = []
    change_of(module, names, tmp_path, failures).begin()
    assert __import__(module).function() == "original"
    assert len(failures) == 1
    assert names[1] in failures[0]


def test_what_somebody_else_replaced_is_left_alone(module: str, tmp_path: Path) -> None:
    loaded = __import__(module)
    theirs = loaded.function = lambda: "theirs"
    failures: list[str] = []
    change_of(module, ["Class.method", "function"], tmp_path, failures).begin()
    assert loaded.function is theirs
    assert loaded.Class().method() == "original"
    assert "already replaced" in failures[0]


def test_undoing_leaves_what_somebody_else_put_on_top(module: str, tmp_path: Path) -> None:
    loaded = __import__(module)
    change = change_of(module, ["function"], tmp_path, [])
    change.begin()
    theirs = loaded.function = wrapper(loaded.function)
    change.undo()
    assert loaded.function is theirs


def test_a_module_in_the_middle_of_its_import_is_refused(module: str, tmp_path: Path) -> None:
    failures: list[str] = []
    (tmp_path / f"{module}.py").write_text("import glm_patch_begin\n" + MODULE)
    begin: Callable[[], None] = change_of(module, ["function"], tmp_path, failures).begin
    (tmp_path / "glm_patch_begin.py").write_text("import glm_patch_hook\nglm_patch_hook.begin()\n")
    sys.modules["glm_patch_hook"] = type(sys)("glm_patch_hook")
    sys.modules["glm_patch_hook"].begin = begin  # type: ignore[attr-defined]
    try:
        assert __import__(module).function() == "original"
    finally:
        sys.modules.pop("glm_patch_hook")
        sys.modules.pop("glm_patch_begin", None)
    assert "middle of its import" in failures[0]


def test_every_call_that_waits_for_a_module_is_made_once(module: str) -> None:
    seen: list[str] = []
    when_imported(module, lambda m: seen.append(m.__name__))
    when_imported(module, lambda m: seen.append("second"))
    __import__(module)
    sys.modules.pop(module)
    __import__(module)
    assert seen == [module, "second"]


def test_a_module_that_fails_to_import_still_fails(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ValueError('broken')\n")
    when_imported(module, lambda m: None)
    with pytest.raises(ValueError, match="broken"):
        __import__(module)
