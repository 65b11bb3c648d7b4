"""Device time of a list of launches: the median of CUDA-graph replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


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
    return statistics.median(replay_times(capture(calls), replays)) / len(calls)
