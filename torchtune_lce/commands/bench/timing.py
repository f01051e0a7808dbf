"""Milliseconds of a function, with their spread; the host's own part of them, and how many kernels it launches."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import profile


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each call, of one at least."""

    calls: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds; between two calls by their distance, as Triton's does."""
        return self._quantiles(0.5)[0]

    @property
    def spread(self) -> float:
        """Interquartile range in milliseconds."""
        lower, upper = self._quantiles(0.25, 0.75)
        return upper - lower

    def _quantiles(self, *places: float) -> list[float]:
        calls = torch.tensor(self.calls, dtype=torch.float64)
        return calls.quantile(torch.tensor(places, dtype=torch.float64)).tolist()


# Anything that measures a function by calling it: `cuda_timer`, or `clock_timer` where there is no card. Told to be one
# of so many `parts`, it takes that part of its usual time.
Timer = Callable[..., Timing]

_WARMUP_MS, _MEASURING_MS, _ESTIMATING_CALLS = 100, 500, 5
_FLUSH_BYTES = 256 * 2**20  # several times a card's L2 cache
_HOST_CALLS = 9
_CLOCKED_CALLS = 8
_QUEUED_CALLS = 20
TURNS = 4  # even: as often first as last
# What a trace calls the card's own work. Names of operators stand there too, over what they launch.
_LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset")

_Item = TypeVar("_Item")


def in_turns(items: Sequence[_Item], turns: int = TURNS) -> Iterator[_Item]:
    """A B C, C B A, A B C, ...: what warms up or throttles the card meanwhile falls on all of them alike."""
    for turn in range(turns):
        yield from items if turn % 2 == 0 else reversed(items)


def cuda_timer(run: Callable[[], object], parts: int = 1) -> Timing:
    """CUDA events round each call, the L2 cache cleared before it, after a warm-up.

    The rules are those of ``triton.testing.do_bench``: what the first call compiles is left out, five calls tell how
    many fill 100 ms of warm-up and 500 ms of measuring, and the host waits for the card at the end alone. One of
    ``parts`` takes that part of each, one call at least.
    """
    torch.cuda.empty_cache()  # what others have left would be given back inside of a call that needs memory
    run()
    torch.cuda.synchronize()
    flush = _flush()

    def cleared() -> None:
        flush.zero_()
        run()

    estimate = _mean_ms(cleared, max(1, _ESTIMATING_CALLS // parts)) * parts
    for _ in range(max(1, int(_WARMUP_MS / estimate))):
        run()
    return _each(run, flush.zero_, max(1, int(_MEASURING_MS / estimate)))


def queued_timer(run: Callable[[], object], host: float, parts: int = 1) -> Timing:
    """The card's own time of each call: it is busy when the call comes, for longer than the ``host`` milliseconds that
    asking for it takes, as a training step's other layers keep it. The L2 cache is cleared before.

    Of calls that launch more than the card's queue holds, about a thousand kernels, the host's time still is a part.
    One of ``parts`` makes that part of the usual calls, one at least.
    """
    run()
    flush = _flush()
    flushes = math.ceil(2 * host / _mean_ms(flush.zero_, _ESTIMATING_CALLS))

    def keep_busy() -> None:
        for _ in range(flushes):
            flush.zero_()

    return _each(run, keep_busy, max(1, _QUEUED_CALLS // parts))


def _mean_ms(run: Callable[[], object], calls: int) -> float:
    """The card's milliseconds a call, of so many one after the other."""
    start, end = _events()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def _each(run: Callable[[], object], before: Callable[[], object], calls: int) -> Timing:
    """CUDA events round each of so many calls, after ``before``; the host waits for the card at the end alone."""
    pairs = [_events() for _ in range(calls)]
    for start, end in pairs:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Timing(tuple(start.elapsed_time(end) for start, end in pairs))


def _flush() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def clock_timer(run: Callable[[], object], parts: int = 1, calls: int = _CLOCKED_CALLS) -> Timing:
    """The wall clock round each call, after one to warm up: for the CPU, where nothing runs behind its back.

    One of ``parts`` makes that part of the ``calls``, one at least.
    """
    run()
    return Timing(tuple(_clocked(run) for _ in range(max(1, calls // parts))))


def host_ms(run: Callable[[], object], wait: Callable[[], object] = torch.cuda.synchronize) -> float:
    """Milliseconds until ``run`` returns, the median of a few calls: what the host takes to ask for the card's work.

    ``wait`` comes before each call, so that the card is idle and none waits for another's work in its queue.
    """
    elapsed = []
    for _ in range(_HOST_CALLS):
        wait()
        elapsed.append(_clocked(run))
    wait()
    return statistics.median(elapsed)


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def launches(run: Callable[[], object]) -> int | None:
    """Kernels, memory copies and memory sets that a call of ``run`` starts on the card.

    None where the profiler saw none: without a card, and where its driver lets nobody count.
    """
    run()  # what is compiled and allocated once
    with profile() as recorded:  # of all that this machine has
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        return count_launches(json.loads(path.read_text(encoding="utf-8"))["traceEvents"]) or None


def count_launches(events: list[dict]) -> int:
    """Of a trace of ``torch.profiler``, in Chrome's form: the card's work, and not what stands over it."""
    return sum(event.get("cat") in _LAUNCHES for event in events)
