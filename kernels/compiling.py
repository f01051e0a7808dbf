"""Kernels that a first call needs are compiled side by side: one after the other takes twice as long.

The operator itself says which they are. It begins as ever; at the first launch of what is not compiled it is left, and
gone through once more without any launch, for the list of them; then it is called again. That needs a function of its
arguments alone, which launches on memory that it allocates, and asks none of it; one that overwrites an argument says
``way.set(Way.IN_TURN)`` first.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar

import torch
import triton

MOST_THREADS = 8


class Way(enum.Enum):
    """What a launch does whose kernel is not compiled."""

    IN_TURN = enum.auto()  # compiles it, and runs it
    FIND = enum.auto()  # leaves the operator, where several processors can compile
    LIST = enum.auto()  # has it compiled by another thread; no launch runs, of what is compiled neither


class Missing(Exception):
    """A kernel is not compiled."""


way: ContextVar[Way] = ContextVar("torchtune_lce_way_of_compiling", default=Way.IN_TURN)


def leave_if_worthwhile() -> None:
    """Before a kernel is compiled: raises :class:`Missing`, unless it is compiled in its turn."""
    # What a graph captures must not be there twice.
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if way.get() is Way.FIND and _threads() > 1 and not is_captured:
        raise Missing


def side_by_side(function: Callable) -> Callable:
    """The function with its kernels compiled so, where there are processors for it and Triton can (3.5 and newer)."""
    if not hasattr(triton, "AsyncCompileMode"):
        return function

    @functools.wraps(function)
    def run(*arguments):
        found = way.set(Way.FIND)
        try:
            try:
                return function(*arguments)
            except Missing:
                # What it had made is held until here.
                pass
            # In a context of its own: whatever interrupts it, no mode of Triton's stays, and none of a user's is met.
            Context().run(_compile_listed, function, arguments)
            way.set(Way.IN_TURN)
            return function(*arguments)
        finally:
            way.reset(found)

    return run


def _compile_listed(function: Callable, arguments: tuple) -> None:
    """What fails is compiled again in its turn, and says so there."""
    way.set(Way.LIST)
    with ThreadPoolExecutor(_threads()) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        function(*arguments)


def _threads() -> int:
    """Processors of this process; ranks of a node share them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors // max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), MOST_THREADS)
