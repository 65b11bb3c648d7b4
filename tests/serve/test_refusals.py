"""Settings that are wrong, and a vLLM or a catalog that is not what the other expects."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Rooms, Served, config

from tools.environment import VLLM

pytestmark = pytest.mark.serve
LENGTHS = (8192, 8193)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("key", {"more_flags": config(shape_polcy="guarded")}, ["unknown key 'shape_polcy'", "allowed keys: ", "shape_policy"]),
        ("value", {"more_flags": config(shape_policy="soft")}, ["'soft'", "allowed values: auto, captured, guarded, off"]),
        ("variable", {"environment": {"VLLM_GLM_PATCH_DISABLE": "full-stop"}}, ["'full-stop'", "known patches: ", "full-step"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_setting_keeps_the_server_from_starting(
    rooms: Rooms, name: str, options: dict[str, object], expected: list[str]
) -> None:
    code, log = rooms.fail_to_serve(f"wrong-{name}", **options)
    assert code != 0
    error = next(line for line in log.splitlines() if "UserError: " in line)
    assert [text for text in expected if text not in error] == []
    assert "Loading weights" not in log


def break_entry(package: Path) -> None:
    """A catalog entry that is no TOML, of one patch; a fingerprint that fits no function, of another."""
    (package / "patches" / "routing-ids.toml").write_text('id = "routing-ids\n')
    change(package / "patches" / "full-step.toml", rf'^\w+ = (\["{VLLM}"\]|.*"{VLLM}".*)$', r"0000000000000000 = \1")


def forget_release(package: Path) -> None:
    """A catalog that ends before this vLLM."""
    change(package / "patches" / "releases.toml", rf'"{VLLM}".*', "]")


def change(file: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, file.read_text(), flags=re.MULTILINE | (re.DOTALL if new == "]" else 0))
    assert count, f"{file} has nothing like {pattern}"
    file.write_text(text)


def serve_with(rooms: Rooms, name: str, alter: Callable[[Path], None]) -> Served:
    folder = rooms.catalog_copy(f"{name}-package")
    alter(folder / "vllm_glm_patch")
    return rooms.serve(name, LENGTHS, python_path=[folder])


def warnings_of(log: str) -> list[str]:
    return [line for line in log.splitlines() if "WARNING" in line and "VLLM_GLM_PATCH_STRICT" in line]


def test_broken_entry_and_changed_function_are_refused_and_serving_goes_on(rooms: Rooms, unpatched: Served) -> None:
    served = serve_with(rooms, "broken", break_entry)
    assert served.texts(LENGTHS) == unpatched.texts(LENGTHS)
    (warning,) = warnings_of(served.log)
    assert "routing-ids: its catalog entry is broken: routing-ids.toml cannot be read" in warning
    assert re.search(r"full-step: vllm\.\S+ is not the function of any known release \(fingerprint [0-9a-f]{16}, ", warning)
    assert "Warmed up the step" not in served.log


def test_unknown_version_is_left_alone_and_serving_goes_on(rooms: Rooms, unpatched: Served) -> None:
    served = serve_with(rooms, "unknown-version", forget_release)
    assert served.texts(LENGTHS) == unpatched.texts(LENGTHS)
    (warning,) = warnings_of(served.log)
    assert f"vLLM {VLLM} is newer than this release knows" in warning
    assert "nothing was patched" in warning
    assert "Warmed up the step" not in served.log


@pytest.mark.parametrize("alter", [break_entry, forget_release])
def test_strict_refuses_to_start(rooms: Rooms, alter: Callable[[Path], None]) -> None:
    folder = rooms.catalog_copy("strict-package")
    alter(folder / "vllm_glm_patch")
    code, log = rooms.fail_to_serve("strict", python_path=[folder], environment={"VLLM_GLM_PATCH_STRICT": "1"})
    assert code != 0
    error = next(line for line in log.splitlines() if "StrictRefusal: " in line)
    assert "VLLM_GLM_PATCH_STRICT=1 and not every patch can be applied: " in error
    assert "full-step: " in error
    assert "unset VLLM_GLM_PATCH_STRICT" in error
    assert "Loading weights" not in log


def test_strict_starts_where_everything_is_in_order(rooms: Rooms, unpatched: Served) -> None:
    served = rooms.serve("strict-fine", (1,), environment={"VLLM_GLM_PATCH_STRICT": "1"})
    assert served.texts((1,)) == unpatched.texts((1,))
