"""A kernel that a walk launches for each of its strips: all that Triton has to find out, it finds out once.

Triton looks at every argument of every launch, whatever it was the last time: with thirty of them that takes the host
longer than a strip of few tokens takes the card.
"""

from torch import Tensor

from torchtune_lce.kernels.tuning import LAUNCH


class Repeated:
    """Launches of ``kernel`` that differ in integers alone, its last arguments, which it does not specialize.

    ``fixed`` are the arguments before those, ``constants`` its constexprs and how it is launched. Only for launches on
    one stream of one device.
    """

    def __init__(self, kernel, fixed: tuple, **constants):
        self._kernel, self._fixed, self._constants = kernel, fixed, constants | LAUNCH
        self._addresses = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in fixed)
        self._compiled = {}

    def __call__(self, grid: tuple[int, ...], *numbers: int, **constants) -> None:
        """``constants`` of this launch, beside those of all."""
        key = tuple(constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            # None where nothing is compiled: in the interpreter.
            self._compiled[key] = self._kernel[grid](*self._fixed, *numbers, **self._constants, **constants)
            return
        # In the kernel's order, where they are told as well, though nothing of them is left to tell.
        given = self._constants | constants
        names = self._kernel.arg_names[len(self._fixed) + len(numbers) :]
        compiled[(*grid, 1, 1)[:3]](*self._addresses, *numbers, *(given[name] for name in names))
