"""Who serves a problem: one of this package's backends, or the caller's own kernel. Chosen by sizes alone, on the host.

A backend is named in tuned tables by its `name`. To add one: an entry in `BACKENDS`, its runner in op.py's `RUNNERS`, and
entries {"backend": name, …} in the tables. Without an entry the first backend that may and supports a problem serves it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from . import tables
from .dispatch import Card, choose
from .problem import Problem

T = TypeVar("T")
UPSTREAM = "upstream"
"""Not a backend of ours: the caller's own kernel."""
AUTO = "auto"
"""As the tuned tables say; without an entry the first backend that may and supports the problem."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the contract in op.py."""

    name: str
    supports: Callable[[Problem, Card], bool]
    """Whether it can serve a problem on a card; `card.index` is the CUDA device. Asked for each token count once."""
    configuration: Callable[[Problem, Card], Hashable]
    """What it would run a problem with. Equal ones share their kernels, so that one call compiles or loads them."""
    variant: Callable[[Problem, Card], Hashable] = lambda problem, card: None
    """What beside the configuration tells which kernels a problem needs."""
    unasked: bool = True
    """Whether it may serve without a table's entry and without being preferred."""


def _triton_supports(problem: Problem, card: Card) -> bool:
    """Hopper's FP8 matrix instructions; rows and histograms that fit one program (triton/quantise.py, routing.py)."""
    return card.capability == (9, 0) and problem.hidden_size <= 16384 and problem.experts < 1024 and problem.top_k <= 64


def _hopper_supports(problem: Problem, card: Card) -> bool:
    """Loads the native kernels; imported here, since whoever does not ask for them need not pay for them."""
    from .hopper import backend

    return card.index is not None and backend.supports(problem, f"cuda:{card.index}")


def _hopper_configuration(problem: Problem, card: Card) -> Hashable:
    from .hopper import backend

    return backend.choose(problem, card)


def _hopper_variant(problem: Problem, card: Card) -> Hashable:
    from .hopper import backend

    return backend.by_bands(problem, backend.choose(problem, card))


BACKENDS: list[Backend] = [
    Backend("triton", _triton_supports, lambda problem, card: choose(problem, card)),
    Backend("hopper", _hopper_supports, _hopper_configuration, _hopper_variant, unasked=False),
]


def names() -> tuple[str, ...]:
    """All that a table's "backend" may be."""
    return (*(backend.name for backend in BACKENDS), UPSTREAM)


_preferred = AUTO


def prefer(wanted: str) -> None:
    """What `route` goes by from now on in this process: `AUTO`, `UPSTREAM` or the name of a backend."""
    global _preferred
    if wanted not in (AUTO, *names()):
        raise ValueError(f"the backend {wanted!r} is not among {', '.join((AUTO, *names()))}")
    if wanted != _preferred:
        _preferred = wanted
        tables.changed()


@functools.lru_cache(maxsize=65536)
def route(problem: Problem, card: Card) -> str:
    """The name of who serves a problem. A preferred backend that does not support it gives way to upstream."""
    if _preferred == UPSTREAM:
        return UPSTREAM
    if _preferred != AUTO:
        return _preferred if _supports(_preferred, problem, card) else UPSTREAM
    entry = tables.entry(problem, card)
    told = entry.get("backend", "triton") if entry else None
    if told == UPSTREAM:
        return UPSTREAM
    if told is not None and _supports(told, problem, card):
        return str(told)
    if entry and entry.get(tables.OTHERWISE) == UPSTREAM:
        return UPSTREAM
    able = (backend.name for backend in BACKENDS if backend.unasked and backend.supports(problem, card))
    return next(able, UPSTREAM)


def _supports(name: str, problem: Problem, card: Card) -> bool:
    return any(backend.supports(problem, card) for backend in BACKENDS if backend.name == name)


tables.when_changed(route.cache_clear)


def configuration(problem: Problem, card: Card) -> Hashable:
    """The backend that serves a problem and what it runs it with; None where that is upstream."""
    name = route(problem, card)
    for backend in BACKENDS:
        if backend.name == name:
            return name, backend.configuration(problem, card)
    return None


def variant(problem: Problem, card: Card) -> Hashable:
    """What beside `configuration` tells which kernels a problem needs; None for upstream's."""
    name = route(problem, card)
    return next((backend.variant(problem, card) for backend in BACKENDS if backend.name == name), None)


def routes(
    problem: Problem, card: Card, most: int, left: Callable[[int], bool] = lambda tokens: False
) -> list[tuple[int, int, str]]:
    """(first count, last count, name) of each range of token counts from 1 to `most` that one serves.

    left: whether upstream serves a count, wherever it is routed.
    """
    return ranges(most, lambda n: UPSTREAM if left(n) else route.__wrapped__(problem.with_tokens(n), card))


def ranges(most: int, told: Callable[[int], T]) -> list[tuple[int, int, T]]:
    """(first count, last count, what is told) of each range of token counts from 1 to `most` of which the same is told."""
    found = []
    for same, group in itertools.groupby(range(1, most + 1), told):
        counts = list(group)
        found.append((counts[0], counts[-1], same))
    return found
