"""What a step would launch on a card, counted where there is none: Triton's kernels, and torch's own operations.

An operation counts as one, though a few (sort, pad) launch several kernels; views and fresh memory launch none.
"""

import contextlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import torchtune_lce
from torchtune_lce.kernels.launching import Repeated

PACKAGE = Path(torchtune_lce.__file__).parent
FRESH_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class Launches:
    """In their order; an operation with the line of the package that asks for it, and "autograd" where none does."""

    kernels: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = (f"  {times} x {what}" for what, times in Counter(self.kernels + self.operations).items())
        return f"{len(self.kernels)} kernels and {len(self.operations)} operations:\n" + "\n".join(lines)


@contextlib.contextmanager
def counted():
    """Yields the :class:`Launches` of what is called inside."""
    found = Launches()

    launch = Repeated.__call__

    def noted(self, *arguments, **constants):
        found.kernels.append(self.kernel.fn.__name__)
        # The interpreter copies tensors about.
        with _disable_current_modes():
            return launch(self, *arguments, **constants)

    with contextlib.ExitStack() as undo:
        undo.callback(setattr, Repeated, "__call__", launch)
        Repeated.__call__ = noted
        undo.enter_context(_Operations(found.operations))
        yield found


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, operation, _, arguments=(), settings=None):
        settings = settings or {}
        if operation.namespace == "torchtune_lce":
            # What it is made of, and not itself.
            with self:
                device = next(x for x in arguments if isinstance(x, torch.Tensor)).device.type
                keys = torch._C.DispatchKeySet(torch._C._parse_dispatch_key(device.upper()))
                return operation.redispatch(keys, *arguments, **settings)
        result = operation(*arguments, **settings)
        site = _site()
        if site and _launches(operation, arguments, result):
            self._found.append(f"{operation.name().removeprefix('aten::')} at {site}")
        return result


def _launches(operation, arguments, result) -> bool:
    if operation.name().removeprefix("aten::").partition(".")[0] in FRESH_MEMORY:
        return False
    views = any(x.alias_info is not None and not x.alias_info.is_write for x in operation._schema.returns)
    # Some copy where there is need to: `to`, `contiguous`, `reshape`.
    copies = isinstance(result, torch.Tensor) and result.untyped_storage()._cdata != _storage(arguments)
    return copies or not views


def _storage(arguments) -> int | None:
    first = next(iter(arguments), None)
    return first.untyped_storage()._cdata if isinstance(first, torch.Tensor) else None


def _site() -> str | None:
    """Where the package asks for it; None for what the tests' own poisoning of fresh memory does."""
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.name == "conftest.py":
            return None
        if PACKAGE in file.parents:
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "autograd"
