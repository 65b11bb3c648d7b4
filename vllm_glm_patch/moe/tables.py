"""Tuned tables: where they lie, which one speaks for a card, and its entry for a problem.

A table is a JSON file, made by `tune.py`: {"note", "card", "multiprocessors", "capability", "torch", "triton", "shapes": {shape
key: {token count: entry}}}. An entry is a configuration of the Triton kernels (dispatch.Config). With the key "backend" it
names who serves these counts instead: another backend of backends.py, with that one's configuration beside it, or
"upstream" where the caller's own kernel is faster. {"backend": "hopper", "otherwise": "upstream", …}: the caller's kernel is
the next best, where that backend cannot serve. Tables of the user's folder go before those of the package, shape by shape.
`NOTE` says what an entry freezes.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .problem import Problem

if TYPE_CHECKING:
    from .dispatch import Card

SHIPPED = Path(__file__).parent / "tuned"
# How far an entry of a table reaches, as a ratio of token counts: rows an expert, and with them the best tile, change by
# as much.
REACH = 2.0
OTHERWISE = "otherwise"
NOTE = (
    "Entries freeze what was fastest when they were measured, also where that was what the rules of thumb chose then: a rule "
    "that gets better later does not reach the counts of this table. `vllm-glm-patch bench kernel` runs what the table says; "
    "so remove the entries first, run it, and enter its result with `vllm-glm-patch tune --from kernel.json`, or tune anew."
)
"""Stands in each table, as its first key."""
_logger = logging.getLogger("vllm_glm_patch")
_user_folder: Path | None = None
_dependents: list[Callable[[], None]] = []


def use_folder(folder: Path | None) -> None:
    """Read the user's tables from `folder` from now on; None: only the package's own."""
    global _user_folder
    if folder != _user_folder:
        _user_folder = folder
        forget()


def forget() -> None:
    """Read the tables anew at the next question: one has been written."""
    read_all.cache_clear()
    changed()


def when_changed(forget_answer: Callable[[], None]) -> None:
    """Call this whenever answers that were made from tables, or from a preference, may no longer hold."""
    _dependents.append(forget_answer)


def changed() -> None:
    """Let all that depends on tables or on a preference forget its answers."""
    for forget_answer in _dependents:
        forget_answer()


def file_of(card: str, folder: Path) -> Path:
    """The table of a card, by its name as CUDA tells it."""
    return folder / f"{card.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def read_all() -> tuple[dict[str, Any], ...]:
    """All tables, the user's first. A file that is no table is left out with a warning: serving goes on without it."""
    folders = [SHIPPED] if _user_folder is None else [_user_folder, SHIPPED]
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            found.append(read(path))
        except (OSError, ValueError) as error:
            _logger.warning("The tuned table %s is left out: %s. Tune again, or remove it.", path, error)
    return tuple(found)


def read(path: Path) -> dict[str, Any]:
    """One table. ValueError where the file is none, OSError where it cannot be read."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check(table)
    return table


def write(path: Path, table: dict[str, Any]) -> None:
    """Put a table in place at once, counts in order: whoever reads it meanwhile sees the old one or the new one, whole."""
    shapes = {key: dict(sorted(counts.items(), key=lambda item: int(item[0]))) for key, counts in table["shapes"].items()}
    whole = {"note": NOTE, **{key: value for key, value in table.items() if key != "note"}, "shapes": shapes}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(whole, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    forget()


def check(table: Any) -> None:
    """ValueError where something is not a table that this release reads; the text says where."""
    from .backends import names
    from .dispatch import Config

    known = {"card": str, "multiprocessors": int, "capability": list, "shapes": dict}
    if not isinstance(table, dict) or not all(isinstance(table.get(key), kind) for key, kind in known.items()):
        raise ValueError(f"it has not the keys {', '.join(known)} of a table")
    for shape, counts in table["shapes"].items():
        for count, entry in counts.items():
            where = f"shape {shape!r}, {count} tokens"
            if not (isinstance(entry, dict) and str(count).isdigit() and int(count) > 0):
                raise ValueError(f"{where}: not an entry")
            backend = entry.get("backend", "triton")
            if backend not in names():
                raise ValueError(f"{where}: the backend {backend!r} is not among {', '.join(names())}")
            if OTHERWISE in entry and (backend != "hopper" or entry[OTHERWISE] != "upstream"):
                raise ValueError(f'{where}: "{OTHERWISE}" can only be "upstream", beside the backend "hopper"')
            try:
                if backend == "triton":
                    Config.from_dict(entry)
                elif backend == "hopper":
                    from .hopper.backend import told
                    from .routing import check_band

                    config, top_k = told(entry), _top_k(shape)
                    if config is not None and top_k is not None:
                        check_band(config.band, top_k)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error


def _top_k(shape: str) -> int | None:
    """`top_k` of a shape key; None where it has none, and so is no problem's."""
    found = re.search(r"(?:^|,)top_k=([1-9]\d*)$", shape)
    return int(found.group(1)) if found else None


def entry(problem: Problem, card: Card) -> dict[str, Any] | None:
    """The entry that speaks for a problem on a card, or None where rules of thumb must do.

    The card's own table first; else one of a card with as many multiprocessors and the same compute capability (H200 and
    H800 have H100's 132); else the nearest by multiprocessors of that capability (H20 has 78), whose tiles fit but whose
    comparison with upstream's kernel says nothing here, so its "upstream" does not count, nor does its "otherwise".
    """
    alike = [t for t in read_all() if tuple(t["capability"]) == card.capability]
    ranked = sorted(alike, key=lambda t: (t["card"] != card.name, abs(t["multiprocessors"] - card.multiprocessors)))
    for table in ranked:
        counts = table["shapes"].get(problem.shape_key)
        found = _nearest(counts, problem.tokens) if counts else None
        foreign = table["card"] != card.name and table["multiprocessors"] != card.multiprocessors
        if found is not None and not (foreign and found.get("backend") == "upstream"):
            return {key: value for key, value in found.items() if key != OTHERWISE} if foreign else found
    return None


def _nearest(counts: dict[str, dict[str, Any]], tokens: int) -> dict[str, Any] | None:
    """The entry whose count is nearest by ratio; none where that is farther than `REACH`."""

    def distance(count: str) -> float:
        return abs(math.log(int(count) / max(tokens, 1)))

    nearest = min(counts, key=distance)
    return counts[nearest] if distance(nearest) <= math.log(REACH) + 1e-9 else None
