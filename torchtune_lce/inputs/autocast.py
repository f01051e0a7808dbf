"""Autocast is for the caller's own products: code that has chosen its dtypes runs without it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def is_available(device_type: str) -> bool:
    """Whether the device has an autocast. A compiler, which cannot trace torch's own answer in 2.11, has one."""
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)


def cast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, what F.linear would do to its inputs."""
    device = hidden.device.type
    # Autocast knows no meta device; asked which ones it knows, the compiler of torch 2.8 breaks its graph.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(hidden, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 stays as it is, in F.linear too."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def without_autocast(function: Callable) -> Callable:
    """The function with autocast off for the device of its first tensor.

    Autocast would round float32 sums to its own dtype, or one of two that belong together; and where a backward is
    called inside it and the forward was not, the logits that it computes again would not be the forward's.
    """

    @functools.wraps(function)
    def run(*arguments):
        device = next(x for x in arguments if isinstance(x, Tensor)).device.type
        if not is_available(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run
