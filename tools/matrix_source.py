"""Reads from a release's source, without running it, how what we replace is declared there and how it is called."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from vllm_glm_patch import catalog
from vllm_glm_patch.adapters.modular_kernel import EXPERTS, MUST_BE_NONE, NEEDED, NEITHER, PREPARE
from vllm_glm_patch.upstream import Upstream


@dataclass(frozen=True)
class Callers:
    """Where a release calls what a role replaces."""

    files: str
    """Glob below the package vllm."""
    called: str
    """Regular expression for the text of the called expression."""
    by_name: str = ""
    """Where set, the call names the method as its first argument and passes nothing to it."""
    word: str = ""
    """What every file with such a call contains; by default the last word of `called`."""


_WORKERS = Callers("v1/**/*.py", r"(?:self\.)?(?:\w+\.)*collective_rpc", by_name="compile_or_warm_up_model")
_LAYERS = "model_executor/layers"
CALLERS: Mapping[str, tuple[Callers, ...]] = {
    "grouped-gemm": (Callers("**/*.py", r"(?:custom_ops\.|ops\.)?cutlass_moe_mm"),),
    "quantise": (Callers("**/*.py", r"(?:custom_ops\.|ops\.)?scaled_fp8_quant"),),
    "run": (Callers(f"{_LAYERS}/fused_moe/**/*.py", r"run_cutlass_moe_fp8"),),
    "apply": (Callers(f"{_LAYERS}/fused_moe/modular_kernel.py", r"self\.fused_experts\.apply"),),
    "modular-kernel": (
        Callers(f"{_LAYERS}/fused_moe/cutlass_moe.py", r"fn"),
        Callers(
            f"{_LAYERS}/quantization/compressed_tensors/**/compressed_tensors_moe*.py",
            r"self\.(?:kernel|moe_mk|moe_kernel\.apply)",
            word="self.",
        ),
    ),
    "scheduler": (Callers("v1/engine/core.py", r"Scheduler"),),
    "worker": (_WORKERS,),
    "profile": (Callers("v1/executor/**/*.py", r"(?:self\.)?(?:\w+\.)*collective_rpc", by_name="determine_available_memory"),),
}
ENTRIES = {
    "cutlass_moe_fp8": f"{_LAYERS}/fused_moe/**/cutlass_moe.py",
    "run_cutlass_moe_fp8": f"{_LAYERS}/fused_moe/**/cutlass_moe.py",
    "fused_experts": f"{_LAYERS}/fused_moe/fused_moe.py",
    "fp8_w8a8_moe_quant_config": f"{_LAYERS}/fused_moe/config.py",
    "MoEActivation": f"{_LAYERS}/fused_moe/activation.py",
    "MoEPermuteScratch": f"{_LAYERS}/fused_moe/moe_permute_unpermute.py",
    "scaled_fp8_quant": "_custom_ops.py",
}
"""What `tools/vllm_moe.py` of the package calls from outside, and where it looks for it: a release need not have all."""
OPAQUE = ("moe_forward", "moe_forward_shared")
"""The operators of vLLM inside of which a compiled model runs its MoE layers, so that nothing there is traced."""
OPERATOR = "torch.ops._C.dynamic_per_token_scaled_fp8_quant"
"""The operator of vLLM that a fix calls itself."""
CONFIG_FIELDS = ("max_num_batched_tokens", "max_num_scheduled_tokens", "enable_chunked_prefill", "chunked_prefill_enabled")
SCHEDULER_ATTRIBUTES = ("vllm_config", "scheduler_config", "max_model_len", "max_num_scheduled_tokens")
OBSERVED = (("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),)
"""What is only looked at, so that it needs no fingerprint, but must exist."""


@dataclass(frozen=True)
class Value:
    """An argument or default as the source writes it."""

    known: bool
    """False where the source computes it."""
    constant: Any = None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function."""

    name: str
    kind: str
    """The name of one of `inspect.Parameter`'s kinds."""
    default: Value | None
    """None where it has none."""


@dataclass(frozen=True)
class Call:
    """How one place passes its arguments."""

    file: str
    positional: tuple[Value, ...]
    keywords: Mapping[str, Value]


@dataclass(frozen=True)
class Function:
    """One attribute that a patch replaces, as one release has it."""

    patch: str
    role: str
    site: str
    is_method: bool
    parameters: tuple[Parameter, ...]
    calls: tuple[Call, ...]
    sets: tuple[str, ...]
    """Those of `SCHEDULER_ATTRIBUTES` that it assigns to self."""

    def signature(self) -> inspect.Signature:
        """The signature; a default that the source computes is the text ``computed``."""
        return signature(self.parameters)


@dataclass(frozen=True)
class Record:
    """All that the checks of `matrix_calls` need of one release; none of its code."""

    version: str
    functions: tuple[Function, ...]
    config_fields: tuple[str, ...]
    """Those of `CONFIG_FIELDS` that its SchedulerConfig has."""
    dummy_runs: Mapping[str, tuple[Parameter, ...]]
    """By file, the parameters of ``_dummy_run`` of each model runner."""
    operator_arguments: int
    """How many arguments the release passes to `OPERATOR`."""
    moe: Mapping[str, tuple[str, ...]]
    """What the adapters go by: ``prepare`` and ``experts``, those of their classes that the release has, ``description``,
    the attributes of its FusedMoEQuantConfig, and ``opaque``, those of `OPAQUE` that its layers call."""
    entries: Mapping[str, tuple[Parameter, ...]]
    """Those of `ENTRIES` that it has, and their parameters; a class has those of its making."""
    entry_modules: Mapping[str, str]
    """The module of each."""
    missing: tuple[str, ...]
    """Those of `OBSERVED` that it does not have, and functions that cannot be found or are called nowhere."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Record:
        runs = {file: _parameters(rows) for file, rows in table["dummy_runs"].items()}
        return cls(
            table["version"], tuple(map(_function, table["functions"])), tuple(table["config_fields"]), runs,
            table["operator_arguments"], {key: tuple(names) for key, names in table["moe"].items()},
            {name: _parameters(rows) for name, rows in table["entries"].items()}, table["entry_modules"],
            tuple(table["missing"]),
        )  # fmt: skip


def signature(parameters: tuple[Parameter, ...]) -> inspect.Signature:
    """The signature that these parameters make."""

    def one(parameter: Parameter) -> inspect.Parameter:
        default = parameter.default
        value = inspect.Parameter.empty if default is None else default.constant if default.known else "computed"
        return inspect.Parameter(parameter.name, getattr(inspect.Parameter, parameter.kind), default=value)

    return inspect.Signature(list(map(one, parameters)))


def read(folder: Path, version: str) -> Record:
    """Read a release's source tree or unpacked wheel."""
    source = _Source(folder)
    missing = [f"{module}.{name}" for module, name in OBSERVED if source.definition(module, name) is None]
    functions = []
    for patch in catalog.patches():
        if not patch.fix or not patch.affects.contains(version):
            continue
        for site in patch.sites_for(Version(version)):
            function = _read_site(source, patch.id, site)
            if function is None:
                missing.append(str(site))
            else:
                functions.append(function)
    operator = list(source.calls(Callers("_custom_ops.py", re.escape(OPERATOR))))
    return Record(
        version, tuple(functions), _config_fields(source), dict(_dummy_runs(source)),
        len(operator[0].positional) if operator else 0, _moe(source), *_entries(source), tuple(missing),
    )  # fmt: skip


class _Source:
    """The package vllm of one release; each file is parsed once."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "vllm"
        self._trees: dict[Path, ast.Module] = {}

    def tree(self, file: Path) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[file]

    def files(self, glob: str, word: str) -> Iterator[Path]:
        for file in sorted(self.root.glob(glob)):
            if word in file.read_text(encoding="utf-8"):
                yield file

    def definition(self, module: str, name: str) -> ast.FunctionDef | None:
        file = Upstream(self.root, "").source_of(module)
        node: ast.AST | None = self.tree(file) if file.is_file() else None
        for part in name.split("."):
            found = [n for n in getattr(node, "body", []) if getattr(n, "name", None) == part]
            node = found[-1] if found else None
        return node if isinstance(node, ast.FunctionDef) else None

    def calls(self, callers: Callers) -> Iterator[Call]:
        """The calls whose arguments the source spells out; one with ``*`` or ``**`` shows nothing and is left out."""
        word = callers.word or callers.by_name or re.split(r"[^\w]", callers.called)[-1]
        for file in self.files(callers.files, word):
            name = file.relative_to(self.root.parent).as_posix()
            for node in ast.walk(self.tree(file)):
                if isinstance(node, ast.Call) and re.fullmatch(callers.called, ast.unparse(node.func)):
                    call = _by_name(name, node, callers.by_name) if callers.by_name else _call(name, node)
                    if call is not None:
                        yield call


def _read_site(source: _Source, patch: str, site: catalog.Site) -> Function | None:
    node = source.definition(site.module, site.name)
    if node is None:
        return None
    calls = tuple(call for callers in CALLERS.get(site.role, ()) for call in source.calls(callers))
    assigned = {
        target.attr
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Assign, ast.AnnAssign))
        for target in (inner.targets if isinstance(inner, ast.Assign) else [inner.target])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }
    sets = tuple(name for name in SCHEDULER_ATTRIBUTES if name in assigned)
    return Function(patch, site.role, str(site), "." in site.name, _declared(node.args), calls, sets)


def _declared(arguments: ast.arguments) -> tuple[Parameter, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    found = [
        Parameter(a.arg, "POSITIONAL_ONLY" if index < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD", _default(d))
        for index, (a, d) in enumerate(zip(positional, defaults))
    ]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, "VAR_POSITIONAL", None))
    found += [Parameter(a.arg, "KEYWORD_ONLY", _default(d)) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, "VAR_KEYWORD", None))
    return tuple(found)


def _default(node: ast.expr | None) -> Value | None:
    return None if node is None else _value(node)


def _value(node: ast.expr) -> Value:
    plain = isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str)))
    return Value(True, node.value) if plain and isinstance(node, ast.Constant) else Value(False)


def _call(file: str, node: ast.Call) -> Call | None:
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        return None
    return Call(file, tuple(map(_value, node.args)), {k.arg: _value(k.value) for k in node.keywords if k.arg})


def _by_name(file: str, node: ast.Call, name: str) -> Call | None:
    names_it = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == name
    passes = len(node.args) > 1 or any(k.arg in ("args", "kwargs", None) for k in node.keywords)
    return Call(file, (), {}) if names_it and not passes else None


def _moe(source: _Source) -> dict[str, tuple[str, ...]]:
    classes: dict[str, ast.ClassDef] = {}
    called: set[str] = set()
    for file in source.files("model_executor/layers/fused_moe/**/*.py", ""):
        text = file.read_text(encoding="utf-8")
        called |= {name for name in OPAQUE if re.search(rf"torch\.ops\.vllm\.{name}\b", text)}
        if any(f"class {name}" in text for name in (*PREPARE, *EXPERTS, "FusedMoEQuantConfig")):
            classes |= {node.name: node for node in source.tree(file).body if isinstance(node, ast.ClassDef)}
    described = classes.get("FusedMoEQuantConfig")
    attributes: set[str] = set()
    for node in described.body if described else []:
        if isinstance(node, ast.FunctionDef):  # properties, most of them
            attributes.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            attributes.add(node.target.id)
    read = ("w1_scale", "w2_scale", *NEEDED, *MUST_BE_NONE, *NEITHER)
    return {
        "prepare": tuple(name for name in PREPARE if name in classes),
        "experts": tuple(name for name in EXPERTS if name in classes),
        "description": tuple(name for name in read if name in attributes),
        "opaque": tuple(sorted(called)),
    }


def _entries(source: _Source) -> tuple[dict[str, tuple[Parameter, ...]], dict[str, str]]:
    found: dict[str, tuple[Parameter, ...]] = {}
    modules: dict[str, str] = {}
    for name, glob in ENTRIES.items():
        for file in source.files(glob, name):
            for node in source.tree(file).body:
                if getattr(node, "name", None) != name:
                    continue
                if isinstance(node, ast.FunctionDef):
                    found[name] = _declared(node.args)
                elif isinstance(node, ast.ClassDef):
                    found[name] = _made_with(node)
                modules[name] = ".".join(file.relative_to(source.root.parent).with_suffix("").parts)
    return found, modules


def _made_with(node: ast.ClassDef) -> tuple[Parameter, ...]:
    """What making an object of a class takes: by its `__init__`, or as a dataclass."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return _declared(inner.args)[1:]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return ()
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    return tuple(
        Parameter(field.target.id, "POSITIONAL_OR_KEYWORD", _default(field.value))  # type: ignore[union-attr]
        for field in fields
        if not (field.value is not None and re.search(r"\binit=False\b", ast.unparse(field.value)))
    )


def _config_fields(source: _Source) -> tuple[str, ...]:
    fields: set[str] = set()
    for glob in ("config.py", "config/scheduler.py"):
        for file in source.files(glob, "class SchedulerConfig"):
            for node in ast.walk(source.tree(file)):
                if isinstance(node, ast.ClassDef) and node.name == "SchedulerConfig":
                    fields |= {
                        n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                    }
                    fields |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    return tuple(name for name in CONFIG_FIELDS if name in fields)


def _dummy_runs(source: _Source) -> Iterator[tuple[str, tuple[Parameter, ...]]]:
    for glob in ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"):
        for file in source.files(glob, "def _dummy_run"):
            for node in ast.walk(source.tree(file)):
                if isinstance(node, ast.FunctionDef) and node.name == "_dummy_run":
                    yield file.relative_to(source.root.parent).as_posix(), _declared(node.args)


def _function(table: Mapping[str, Any]) -> Function:
    calls = tuple(
        Call(c["file"], tuple(Value(**v) for v in c["positional"]), {k: Value(**v) for k, v in c["keywords"].items()})
        for c in table["calls"]
    )
    return Function(
        table["patch"], table["role"], table["site"], table["is_method"], _parameters(table["parameters"]), calls,
        tuple(table["sets"]),
    )  # fmt: skip


def _parameters(rows: list[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    return tuple(Parameter(r["name"], r["kind"], Value(**r["default"]) if r["default"] else None) for r in rows)
