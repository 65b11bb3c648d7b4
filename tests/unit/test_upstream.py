"""Fingerprints: what changes them and what does not."""

from __future__ import annotations

import ast
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_glm_patch.upstream import Upstream, find_installed, fingerprint, version_in_source

SOURCE = '''
"""A module."""
import os

LIMIT = 3


def first(a, b=2):
    """Documented."""
    # a comment
    return a + b


@staticmethod
def second(a):
    text = """
def first(): this is text at the left edge
"""
    return text + f"{a!r:>{LIMIT}}"


class Thing:
    """A class."""

    def method(self, x):
        return {k: v for k, v in x.items() if v}

    async def later(self): ...


OTHER = first(1)
'''


def test_comments_docstrings_and_layout_do_not_change_a_fingerprint() -> None:
    changed = SOURCE.replace("    # a comment\n", "").replace('    """Documented."""\n', '    "Other words."\n\n')
    assert fingerprint(changed, "first") == fingerprint(SOURCE, "first")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("a + b", "a - b", "first"),
        ("b=2", "b=3", "first"),
        ("@staticmethod\n", "", "second"),
        ("!r", "!s", "second"),
        ("if v", "if k", "Thing.method"),
        ("async def later", "def later", "Thing.later"),
        ("if v", "if k", "Thing"),
    ],
)
def test_every_change_of_code_changes_the_fingerprint(old: str, new: str, name: str) -> None:
    assert SOURCE.replace(old, new) != SOURCE
    assert fingerprint(SOURCE.replace(old, new), name) != fingerprint(SOURCE, name)


@pytest.mark.parametrize("name", ["missing", "Thing.missing", "first.inner", "LIMIT"])
def test_what_is_not_there_has_no_fingerprint(name: str) -> None:
    assert fingerprint(SOURCE, name) is None


def test_the_last_definition_counts() -> None:
    twice = SOURCE + "\n\ndef first(a, b=2):\n    return 7\n"
    assert fingerprint(twice, "first") == fingerprint("def first(a, b=2):\n    return 7\n", "first")


def test_a_file_that_is_not_python_raises() -> None:
    with pytest.raises(SyntaxError):
        fingerprint("def first(:\n", "first")


@given(st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=8), min_size=1, max_size=6, unique=True), st.data())
def test_the_quick_way_finds_what_parsing_the_whole_file_finds(names: list[str], data: st.DataObject) -> None:
    names = [f"f_{name}" for name in names]
    bodies = data.draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)))
    source = "\n\n".join(f"def {n}(x):\n    return x + {b}\n" for n, b in zip(names, bodies))
    for name, body in zip(names, bodies):
        alone = ast.unparse(ast.parse(f"def {name}(x): return x + {body}"))
        assert fingerprint(source, name) == fingerprint(alone, name)


def test_the_sources_of_modules_and_packages(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    upstream = Upstream(tmp_path, "0.32.0+cpu")
    assert upstream.source_of("vllm.v1") == tmp_path / "v1" / "__init__.py"
    assert upstream.source_of("vllm.v1.worker") == tmp_path / "v1" / "worker.py"
    assert upstream.release == "0.32.0"


@pytest.mark.parametrize("line", ['__version__ = version = "0.17.1"', "__version__ = '0.17.1'"])
def test_the_version_that_a_source_tree_states(tmp_path: Path, line: str) -> None:
    assert version_in_source(tmp_path) is None
    (tmp_path / "_version.py").write_text(f"# made by a tool\n{line}\n")
    assert version_in_source(tmp_path) == "0.17.1"


def test_looking_for_vllm_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = '0.1.2'\n")
    code = "from vllm_glm_patch import upstream; print(upstream.find_installed().root)"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert printed.strip() == str(tmp_path / "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_installed() is None
