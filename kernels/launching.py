"""Launches of kernels: past Triton's own look at their arguments where it has seen the like before.

For each launch Triton finds anew how its arguments specialize the kernel, and whether that is compiled: with thirty of
them, that takes the host longer than few tokens take the card. Here a launch is looked up by what Triton specializes
by: dtypes, whether addresses are multiples of 16, and the numbers that the kernel does not list as unspecialized.
"""

import itertools
from collections.abc import Iterable

from torch import Tensor, device
from triton.runtime.jit import JITFunction

from torchtune_lce.kernels.compiling import Way, leave_if_worthwhile, way

# Of every launch. From 3.10 on Triton contracts multiply-adds only where it is told to: other bits.
OPTIONS = {"enable_fp_fusion": True}
# Kernels that were launched, compiled, by everything that Triton would tell apart. Few: shapes of models, mostly.
_compiled = {}
MOST_COMPILED = 4096
# Of a kernel's function, which is hashed faster than the kernel: which parameters are specialized, constexprs' names.
_parameters = {}
ALL = itertools.repeat(True)


def launch(kernel, grid: tuple[int, ...], arguments: tuple, **constants) -> None:
    """``arguments`` are the kernel's up to its constexprs, some of them named tuples; ``constants`` these, and how it
    runs. Tensor descriptors are arguments of their own: launchers before Triton 3.9 find none in a tuple.
    """
    Repeated(kernel, arguments, **constants)(grid)


class Repeated:
    """Launches of ``kernel`` that differ in integers alone, its last arguments, which it does not specialize.

    ``fixed`` are the arguments before those, ``constants`` its constexprs and how it runs. For one call of an operator:
    its launches are on one stream of one device, and its memory stays where it is.
    """

    def __init__(self, kernel, fixed: tuple, **constants):
        self.kernel, self._fixed, self._constants = kernel, fixed, constants
        self._found = {}
        self._is_interpreted = not isinstance(kernel, JITFunction)
        if not self._is_interpreted:
            are_specialized, self._constexprs = _parameters_of(kernel)
            self._given, self._key = _told_apart(fixed, are_specialized)

    def __call__(self, grid: tuple[int, ...], *numbers: int, **constants) -> None:
        """``constants`` of this launch, beside those of all."""
        if self._is_interpreted:
            self.kernel[grid](*self._fixed, *numbers, **self._constants, **constants, **OPTIONS)
            return
        if way.get() is Way.LIST:
            self.kernel.run(*self._fixed, *numbers, grid=grid, warmup=True, **self._constants, **constants, **OPTIONS)
            return
        own = tuple(constants.values())
        found = self._found.get(own)
        if found is None:
            constants = self._constants | constants
            key = (self.kernel.fn, self._key, *constants.values())
            compiled = _compiled.get(key)
            if compiled is None:
                leave_if_worthwhile()
                compiled = self.kernel[grid](*self._fixed, *numbers, **constants, **OPTIONS)
                if hasattr(compiled, "result"):
                    # Of another thread's list, or of one that was interrupted.
                    compiled = compiled.result()
                if len(_compiled) >= MOST_COMPILED:
                    _compiled.clear()
                _compiled[key] = compiled
                return
            # Constexprs are given too, though nothing of them is left to tell.
            found = self._found[own] = compiled, [constants[name] for name in self._constexprs]
        compiled, values = found
        compiled[(*grid, 1, 1)[:3]](*self._given, *numbers, *values)


def _parameters_of(kernel: JITFunction) -> tuple[list[bool], list[str]]:
    found = _parameters.get(kernel.fn)
    if found is None:
        are_specialized = [not parameter.do_not_specialize for parameter in kernel.params]
        constexprs = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        found = _parameters[kernel.fn] = are_specialized, constexprs
    return found


def _told_apart(arguments: tuple, are_specialized: Iterable[bool]) -> tuple[list, tuple]:
    """The arguments, tensors by their addresses; and all that Triton specializes by, first the device."""
    key = [_device(arguments)]
    given = _given(arguments, are_specialized, key)
    return given, tuple(key)


def _given(arguments: tuple, are_specialized: Iterable[bool], key: list) -> list:
    given = []
    for argument, is_specialized in zip(arguments, are_specialized, strict=False):
        # By type: an isinstance of Tensor takes longer than all else here.
        kind = type(argument)
        if argument is None or kind is float:
            given.append(argument)
            key.append(kind)
        elif kind is int:
            given.append(argument)
            key.append(-(2**31) <= argument < 2**31)
            if is_specialized:
                # A 1 is a constant; and equal to True.
                key.append("1" if argument == 1 else argument % 16 == 0)
        elif kind is not Tensor and issubclass(kind, tuple):
            # What is in one is specialized, all of it.
            given.append(tuple(_given(argument, ALL, key)))
        elif kind is not Tensor and kind.__name__ == "TensorDescriptor":
            given.append(argument)
            key += argument.base.dtype, tuple(argument.block_shape)
        else:
            address = argument.data_ptr()
            given.append(address)
            key.append(argument.dtype)
            key.append(address % 16 == 0)
    return given


def _device(arguments: tuple) -> device | None:
    """Of the first tensor."""
    for argument in arguments:
        found = _device(argument) if isinstance(argument, tuple) else getattr(argument, "device", None)
        if found is not None:
            return found
    return None
