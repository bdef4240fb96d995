"""How long device work takes: CUDA-graph replays in which every call reads another weight copy.

A graph holds one call for each copy. The copies together are larger than the L2 cache, so that
each call finds its weights in memory, as a model's next layer would. Launch gaps are those of a
graph, not of Python; what Python costs is `eager_us`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# several times the L2 cache of any card so far (60 MB on an H200)
ROTATED_BYTES = 256 << 20
MAX_COPIES = 64
# of a graph's replays, between which others have theirs
TURNS = 5


@dataclass(frozen=True, slots=True)
class Time:
    """Median of one call, and how far its quartiles lie apart as a share of it."""

    us: float
    spread: float


def n_copies(nbytes: int) -> int:
    """How many copies of `nbytes` a graph should rotate through.

    >>> n_copies(62 << 20), n_copies(1 << 30), n_copies(1 << 10)
    (5, 2, 64)
    """
    return min(MAX_COPIES, max(2, -(-ROTATED_BYTES // nbytes)))


def graph_time(calls: Sequence[Callable[[], object]], seconds: float = 0.05) -> Time:
    """Time of one of `calls` in a CUDA graph of all of them.

    Args:
        calls: what to time, each with its own weights; compiled and called before if need be.
        seconds: how long to replay, at least five times and at most fifty.
    """
    (time,) = graph_times([calls], seconds)
    return time


def graph_times(groups: Sequence[Sequence[Callable[[], object]]], seconds: float) -> list[Time]:
    """graph_time of each of `groups`, whose graphs are replayed in turn: with many tokens the card
    is bound by power, and who comes first finds it cool."""
    graphs = [_capture(calls) for calls in groups]
    replays = []
    for graph in graphs:
        estimate = _replay(graph, 2)[-1]
        # clocks rise and caches settle before anything counts
        _replay(graph, _between(2, 0.1 * seconds / estimate, 50))
        replays.append(_between(1, seconds / estimate / TURNS, 50 // TURNS))
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(TURNS):
        for graph, n, found in zip(graphs, replays, times, strict=True):
            found += _replay(graph, n)
    quartiles = (statistics.quantiles(found, n=4) for found in times)
    return [
        Time(us=middle / len(calls) * 1e6, spread=(high - low) / middle)
        for calls, (low, middle, high) in zip(groups, quartiles, strict=True)
    ]


def eager_us(call: Callable[[], object], repeats: int = 5, calls: int = 100) -> float:
    """CPU microseconds to issue one call: the host clock over a hundred, no synchronisation."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    # the first round warms up
    return statistics.median(times[1:]) * 1e6


def scratch_bytes(call: Callable[[], torch.Tensor]) -> int:
    """Most device memory that one call holds at a time beyond its output."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = call()
    return max(0, torch.cuda.max_memory_allocated() - before - y.untyped_storage().nbytes())


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls. torch.cuda.graph would collect Python's garbage each time: 0.1 s."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        # memory of earlier graphs
        torch.cuda.empty_cache()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        except BaseException:
            # it would complain of the broken capture and hide what broke it
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Seconds of each of `times` replays."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(high, int(value)))
