"""Launches of kernels: past Triton's own look at their arguments where it has seen the like before.

For each launch Triton finds anew how its arguments specialize the kernel, and whether that is compiled: with thirty of
them, that takes the host longer than few tokens take the card. Here a launch is looked up by what Triton specializes
by: dtypes, whether addresses are multiples of 16, and the numbers that the kernel does not list as unspecialized.
"""

import itertools
from collections.abc import Callable, Iterable

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from torchtune_lce.kernels.compiling import Way, leave_if_worthwhile, way

# Of every launch. From 3.10 on Triton contracts multiply-adds only where it is told to: other bits.
OPTIONS = {"enable_fp_fusion": True}
# Whether a compiled kernel is started as in Triton 3.4 to 3.9.
STARTS_ALIKE = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
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
            constants = {**self._constants, **constants} if constants else self._constants
            key = (self.kernel.fn, self._key, *constants.values())
            known = _compiled.get(key)
            if known is None:
                leave_if_worthwhile()
                compiled = self.kernel[grid](*self._fixed, *numbers, **constants, **OPTIONS)
                if hasattr(compiled, "result"):
                    # Of another thread's list, or of one that was interrupted.
                    compiled = compiled.result()
                if len(_compiled) >= MOST_COMPILED:
                    _compiled.clear()
                # Constexprs are given too, though nothing of them is left to tell.
                _compiled[key] = compiled, tuple(constants[name] for name in self._constexprs)
                return
            compiled, values = known
            start, first = _started(compiled, self._key[0])
            found = self._found[own] = start, (*first, *self._given), values
        start, given, values = found
        start(*(*grid, 1, 1)[:3], *given, *numbers, *values)


def _parameters_of(kernel: JITFunction) -> tuple[list[bool], list[str]]:
    found = _parameters.get(kernel.fn)
    if found is None:
        are_specialized = [not parameter.do_not_specialize for parameter in kernel.params]
        constexprs = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        found = _parameters[kernel.fn] = are_specialized, constexprs
    return found


def _started(compiled, device: int) -> tuple[Callable, tuple]:
    """What starts a compiled kernel on the device's current stream, and what that takes between grid and arguments."""
    # From 3.5 on a hook is a chain of them.
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if not STARTS_ALIKE or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return lambda x, y, z, *arguments: compiled[x, y, z](*arguments), ()
    # As Triton does itself, which asks for the stream, and whom to tell, in each launch. The first loads the kernel.
    run, stream = compiled.run, driver.active.get_current_stream(device)
    return run, (stream, compiled.function, compiled.packed_metadata, None, None, None)


def _told_apart(arguments: tuple, are_specialized: Iterable[bool]) -> tuple[list, tuple]:
    """The arguments, tensors by their addresses; and all that Triton specializes by, first the device's index."""
    key = [_device(arguments)]
    given = _given(arguments, are_specialized, key)
    return given, tuple(key)


def _given(arguments: tuple, are_specialized: Iterable[bool], key: list) -> list:
    given = []
    for argument, is_specialized in zip(arguments, are_specialized, strict=False):
        # By type: an isinstance of Tensor takes longer than all else here.
        kind = type(argument)
        if kind is int:
            given.append(argument)
            if is_specialized and argument == 1:
                # A constant; and equal to True.
                key.append("1")
            else:
                key.append(-(2**31) <= argument < 2**31)
                key.append(is_specialized and argument % 16 == 0)
        elif kind is Tensor or issubclass(kind, Tensor):
            address = argument.data_ptr()
            given.append(address)
            key.append(argument.dtype)
            if address % 16:
                key.append("unaligned")
        elif argument is None or kind is float:
            given.append(argument)
            key.append(kind)
        elif issubclass(kind, tuple):
            # What is in one is specialized, all of it.
            given.append(tuple(_given(argument, ALL, key)))
        else:
            # A descriptor of one.
            given.append(argument)
            key += argument.base.dtype, tuple(argument.block_shape)
    return given


def _device(arguments: tuple) -> int | None:
    """Index of the first tensor's; -1 for the processor."""
    for argument in arguments:
        if isinstance(argument, tuple):
            found = _device(argument)
        else:
            found = argument.get_device() if hasattr(argument, "get_device") else None
        if found is not None:
            return found
    return None
