"""The values of ``impl`` of a divergence, and which one ``auto`` takes."""

import logging
from functools import cache

import torch

from torchtune_lce.divergence.operands import Head
from torchtune_lce.implementations import choice
from torchtune_lce.implementations.capabilities import ANYWHERE, CCE_PRESETS

_log = logging.getLogger("torchtune_lce")

# The kernels: of the cross-entropy's names the one of those that leave nothing out.
KERNELS = "cce_exact"
NAMES = ("auto", KERNELS, "chunked", "torch_compile", "reference")


def check_impl(impl: str) -> None:
    """Raises ValueError for a name that divergences do not have."""
    if impl in NAMES:
        return
    hint = f": a divergence leaves out nothing, its kernels are {KERNELS!r}" if impl in CCE_PRESETS else ""
    raise ValueError(f"impl must be one of {', '.join(NAMES)}, got {impl!r}{hint}")


def choose(impl: str, student: Head, teacher: Head) -> str:
    """The implementation that runs for ``impl`` on the device and dtypes of these two.

    Raises RuntimeError, saying what to set instead, for one that cannot.
    """
    dtypes = student.hidden.dtype, teacher.hidden.dtype
    has_adapter = student.low_rank is not None or teacher.low_rank is not None
    return resolve(impl, student.hidden.device, dtypes, has_adapter)


def resolve(impl: str, device: torch.device, dtypes: tuple[torch.dtype, ...], has_adapter: bool) -> str:
    """The same by what it depends on: the dtypes of both models' hidden states, and whether either has an adapter."""
    if impl == "auto":
        impl, why = _automatic(device, dtypes, has_adapter)
        _say_once(impl, why)
    if impl != KERNELS:
        return impl
    if has_adapter:
        raise RuntimeError(
            f"impl={impl!r} does not take LoRA or DoRA on the output of a student or a teacher; set "
            f"impl={ANYWHERE!r} (what 'auto' takes for it)"
        )
    for dtype in dtypes:
        against = choice.obstacle(impl, device, dtype)
        if against:
            raise RuntimeError(f"impl={impl!r} {against}")
    return impl


# As that of the cross-entropy: a compiler need not look inside, since the same arguments have the same answer.
resolve._dynamo_marked_constant = True


def _automatic(device: torch.device, dtypes: tuple[torch.dtype, ...], has_adapter: bool) -> tuple[str, str]:
    """What ``auto`` takes there, and why: the kernels where those of the cross-entropy run, else what runs anywhere."""
    if has_adapter:
        return ANYWHERE, "the kernels take no adapter on the output"
    for dtype in dtypes:
        name, why = choice.automatic(device, dtype)
        if name != "cce":
            return ANYWHERE, why
    return KERNELS, why


@cache
def _say_once(impl: str, why: str) -> None:
    _log.info("divergence: impl 'auto' takes '%s' (%s)", impl, why)
