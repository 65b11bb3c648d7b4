"""Who serves a problem: one of this package's backends, or the caller's own kernel. Chosen by sizes alone, on the host.

A backend is named in tuned tables by its `name`. To add one: an entry in `BACKENDS`, its runner in op.py's `RUNNERS`, and
entries {"backend": name, …} in the tables. Rules of thumb take the first backend that supports a problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from . import tables
from .dispatch import Card, choose
from .problem import Problem

UPSTREAM = "upstream"
"""Not a backend of ours: the caller's own kernel."""
AUTO = "auto"
"""As the tuned tables say; without an entry the first backend that supports the problem."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the contract in op.py."""

    name: str
    supports: Callable[[Problem, Card], bool]
    """Whether it can serve a problem on a card; `card.index` is the CUDA device. Asked for each token count once."""
    configuration: Callable[[Problem, Card], Hashable]
    """What it would run a problem with. Equal ones share their kernels, so that one call compiles or loads them."""


def _triton_supports(problem: Problem, card: Card) -> bool:
    """Hopper's FP8 matrix instructions; rows and histograms that fit one program (triton/quantise.py, routing.py)."""
    return card.capability == (9, 0) and problem.hidden_size <= 16384 and problem.experts < 1024 and problem.top_k <= 64


BACKENDS: list[Backend] = [Backend("triton", _triton_supports, lambda problem, card: choose(problem, card))]


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
    wanted = _preferred
    able = [backend.name for backend in BACKENDS if backend.supports(problem, card)]
    if wanted != AUTO:
        return wanted if wanted in able else UPSTREAM
    entry = tables.entry(problem, card)
    told = entry.get("backend", "triton") if entry else None
    if told == UPSTREAM or not able:
        return UPSTREAM
    return told if told in able else able[0]


tables.when_changed(route.cache_clear)


def configuration(problem: Problem, card: Card) -> Hashable:
    """The backend that serves a problem and what it runs it with; None where that is upstream."""
    name = route(problem, card)
    for backend in BACKENDS:
        if backend.name == name:
            return name, backend.configuration(problem, card)
    return None


def routes(problem: Problem, card: Card, most: int) -> list[tuple[int, int, str]]:
    """(first count, last count, name) of each range of token counts from 1 to `most` that one serves."""
    found: list[tuple[int, int, str]] = []
    for tokens in range(1, most + 1):
        name = route.__wrapped__(problem.with_tokens(tokens), card)
        if found and found[-1][2] == name:
            found[-1] = (found[-1][0], tokens, name)
        else:
            found.append((tokens, tokens, name))
    return found
