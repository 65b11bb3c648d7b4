"""Device time of a list of launches: the median of CUDA-graph replays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LEAST_US = 1000.0
"""What one graph takes at least, for its launch alone takes some 5 µs; a server's graph has all layers of a model in it."""
MOST_REPEATS = 8


@dataclass(frozen=True)
class Repeated:
    """A graph that makes the same calls `repeats` times over."""

    graph: torch.cuda.CUDAGraph
    repeats: int

    def times(self, replays: int) -> list[float]:
        """Microseconds of the calls once, in each replay."""
        return [us / self.repeats for us in replay_times(self.graph, replays)]


def capture_long(calls: Sequence[Callable[[], object]]) -> Repeated:
    """One graph that makes all calls in order, again and again where they are short: until it takes LEAST_US."""
    graph = capture(calls)
    repeats = min(MOST_REPEATS, math.ceil(LEAST_US / max(statistics.median(replay_times(graph, 3)), 1.0)))
    return Repeated(graph if repeats == 1 else capture(list(calls) * repeats), repeats)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph that makes all calls in order. Each is made once before, so compilation stays outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Microseconds of each replay, after two that are not counted."""
    for _ in range(2):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1000.0 * before.elapsed_time(after) for before, after in zip(marks, marks[1:])]


def median_us(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median microseconds of one call, where `calls` are the same work on different inputs.

    Different inputs keep few-token timings honest: weights of one input would fit the L2 cache.
    """
    return statistics.median(capture_long(calls).times(replays)) / len(calls)
