"""What the custom operators share: the device they run on, rows as kernels read them."""

from __future__ import annotations  # torch 2.8 compiles what calls these, but not `Tensor | None`

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_its_device(function: Callable) -> Callable:
    """Runs an operator on the card of its first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def run(*arguments):
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
            return function(*arguments)

    return run


def rows_contiguous(matrix: Tensor | None) -> Tensor | None:
    """Kernels take any row stride; features must lie next to each other."""
    if matrix is None or matrix.stride(-1) == 1 or matrix.shape[-1] == 1:
        return matrix
    return matrix.contiguous()


def refuse_second_derivative(ctx, *_):
    raise RuntimeError("impl='cce' has no second derivative (create_graph=True); set impl='reference'")
