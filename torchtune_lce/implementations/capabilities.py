"""What each value of ``impl`` can do: the one table that the choice, messages, commands, docs and tests read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torchtune_lce.inputs.filtering import UNFILTERED, Filtering

# Needs nothing and runs everywhere.
ANYWHERE = "chunked"


@dataclass(frozen=True)
class Capabilities:
    """Of one implementation. What one lacks it refuses in a sentence, unless torch decides: see ``own_backward``."""

    filtering: Filtering  # which gradients leave out softmax entries below filter_eps
    float64: bool
    any_label: bool  # takes labels that name no entry, and gives NaN for their tokens; others are given none
    own_backward: bool  # custom operators, which refuse derivatives that they lack; others leave that to torch
    second_derivative: bool  # create_graph=True
    transforms: bool  # derivatives by torch.func, and forward mode
    needs_triton: bool
    needs_compiler: bool  # of C++, on a CPU
    cuda_only: bool  # Triton's interpreter on a CPU aside, which is for tests
    compute_capability: tuple[int, int]  # the least of a CUDA card that it is fast on, or runs on at all if cuda_only


_KERNELS = Capabilities(
    filtering=UNFILTERED,
    float64=False,
    any_label=True,
    own_backward=True,
    second_derivative=False,
    transforms=False,
    needs_triton=True,
    needs_compiler=False,
    cuda_only=True,
    compute_capability=(8, 0),
)
_REFERENCE = Capabilities(
    filtering=UNFILTERED,
    float64=True,
    any_label=False,
    own_backward=False,
    second_derivative=True,
    transforms=True,
    needs_triton=False,
    needs_compiler=False,
    cuda_only=False,
    compute_capability=(0, 0),
)
# The method's preset names (Wijmans et al. 2024), which kernels/autograd.py has one function for. Sums are float32 in
# all of them, which is what Kahan summation was for, so cce_kahan is cce and cce_kahan_full_c_full_e is cce_exact.
CCE_PRESETS = {
    "cce": Filtering(hidden=True, weight=True),
    "cce_exact": UNFILTERED,
    "cce_kahan": Filtering(hidden=True, weight=True),
    "cce_kahan_full_c": Filtering(hidden=True, weight=False),
    "cce_kahan_full_e": Filtering(hidden=False, weight=True),
    "cce_kahan_full_c_full_e": UNFILTERED,
}
CAPABILITIES = {
    **{name: replace(_KERNELS, filtering=filtering) for name, filtering in CCE_PRESETS.items()},
    # On a card torch's compiler is Triton, which needs 7.0.
    "torch_compile": replace(
        _REFERENCE,
        any_label=True,
        own_backward=True,
        second_derivative=False,
        transforms=False,
        needs_compiler=True,
        compute_capability=(7, 0),
    ),
    "chunked": replace(_REFERENCE, any_label=True, own_backward=True, second_derivative=False, transforms=False),
    "reference": _REFERENCE,
}


def able(capability: str) -> tuple[str, ...]:
    """The names of those that have this field of :class:`Capabilities`, the one that runs everywhere first."""
    names = (name for name, can in CAPABILITIES.items() if getattr(can, capability))
    return tuple(sorted(names, key=ANYWHERE.__ne__))


def setting(names: Iterable[str]) -> str:
    """As messages say what to set: ``impl='a', 'b' or 'c'``."""
    first, *others = map(repr, names)
    said = [f"impl={first}", *others]
    return " or ".join([", ".join(said[:-1]), said[-1]] if others else said)


# Made here, as compiled code that may refuse them would trace how.
TWICE_DIFFERENTIABLE, TRANSFORMABLE = setting(able("second_derivative")), setting(able("transforms"))
