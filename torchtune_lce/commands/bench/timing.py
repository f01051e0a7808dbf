"""Milliseconds of a function, with their spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range, in milliseconds."""

    median: float
    spread: float


# Anything that measures a function by calling it: `cuda_timer`, or `clock_timer` where there is no card.
Timer = Callable[[Callable[[], object]], Timing]

_WARMUP_MS, _MEASURING_MS = 100, 500


def cuda_timer(run: Callable[[], object]) -> Timing:
    """CUDA events round each call, the L2 cache cleared before it, after a warm-up."""
    from triton.testing import do_bench

    lower, median, upper = do_bench(run, warmup=_WARMUP_MS, rep=_MEASURING_MS, quantiles=[0.25, 0.5, 0.75])
    return Timing(median, upper - lower)


def clock_timer(run: Callable[[], object], calls: int = 3) -> Timing:
    """The wall clock round each call, after one to warm up: for the CPU, where nothing runs behind its back."""
    run()
    elapsed = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        elapsed.append((time.perf_counter() - start) * 1e3)
    lower, median, upper = statistics.quantiles(elapsed, n=4, method="inclusive")
    return Timing(median, upper - lower)
