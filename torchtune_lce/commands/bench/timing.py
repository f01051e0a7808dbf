"""Milliseconds of a function, with their spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range, in milliseconds."""

    median: float
    spread: float


# Anything that measures a function by calling it: `cuda_timer`, or `clock_timer` where there is no card.
Timer = Callable[[Callable[[], object]], Timing]

_WARMUP_MS, _MEASURING_MS, _ESTIMATING_CALLS = 100, 500, 5
_FLUSH_BYTES = 256 * 2**20  # several times a card's L2 cache


def cuda_timer(run: Callable[[], object]) -> Timing:
    """CUDA events round each call, the L2 cache cleared before it, after a warm-up.

    The rules are those of ``triton.testing.do_bench``: what the first call compiles is left out, five calls tell how
    many fill 100 ms of warm-up and 500 ms of measuring, and the host waits for the card at the end alone.
    """
    run()
    torch.cuda.synchronize()
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    start, end = _events()
    start.record()
    for _ in range(_ESTIMATING_CALLS):
        flush.zero_()
        run()
    end.record()
    torch.cuda.synchronize()
    estimate = start.elapsed_time(end) / _ESTIMATING_CALLS
    for _ in range(max(1, int(_WARMUP_MS / estimate))):
        run()
    pairs = [_events() for _ in range(max(1, int(_MEASURING_MS / estimate)))]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return timing([start.elapsed_time(end) for start, end in pairs])


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def clock_timer(run: Callable[[], object], calls: int = 3) -> Timing:
    """The wall clock round each call, after one to warm up: for the CPU, where nothing runs behind its back."""
    run()
    elapsed = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        elapsed.append((time.perf_counter() - start) * 1e3)
    return timing(elapsed)


def timing(elapsed: list[float]) -> Timing:
    """Of the calls' milliseconds, one at least; between two of them by their distance, as Triton's does."""
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    lower, median, upper = torch.tensor(elapsed, dtype=torch.float64).quantile(quarters).tolist()
    return Timing(median, upper - lower)
