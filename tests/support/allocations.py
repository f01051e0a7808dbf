"""What a call allocates, counted: for tests of memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


WORKSPACE_MIB = 1


# Bytes a token and a vocabulary entry for vectors of labels, places, sums and counts: a handful of 8-byte ones each.
# A block of logits, even one of 2 bytes an entry, is many times that in the shapes below.
BYTES_PER_TOKEN = 64


BYTES_PER_ENTRY = 8


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    width: int

    def logits(self, itemsize: int) -> int:
        return self.tokens * self.vocabulary * itemsize

    def vectors(self) -> int:
        return self.tokens * BYTES_PER_TOKEN + self.vocabulary * BYTES_PER_ENTRY


WIDE = Shape(tokens=1030, vocabulary=520, width=1024)


@dataclass(frozen=True)
class Usage:
    """Bytes that a call allocated: at the worst moment, and those still there when it had ended."""

    peak: int
    kept: int


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, bias: bool = False) -> dict:
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), device=device)
    targets[::7] = -100
    return {
        "hidden": torch.randn(shape.tokens, shape.width, device=device, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape.vocabulary, shape.width, device=device, dtype=dtype, requires_grad=True),
        "targets": targets,
        "bias": torch.randn(shape.vocabulary, device=device, dtype=dtype, requires_grad=True) if bias else None,
    }


def gradient_bytes(inputs: dict) -> int:
    return sum(x.nbytes for x in inputs.values() if x is not None and x.requires_grad)


def usage(call: Callable[[], None], device: torch.device, interpreted: bool) -> Usage:
    """By the allocator's own record: of every block on a CPU, of its statistics on a card, where what was asked for
    counts: a block that has room for it may be 1 MiB larger.

    Triton's interpreter leaves its arguments to the garbage collector.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        return Usage(*(after[f"requested_bytes.all.{when}"] - before for when in ("peak", "current")))
    if interpreted:
        gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
        if interpreted:
            gc.collect()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Usage(peak, live)
