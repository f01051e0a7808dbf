"""The values of ``impl``: what each one is, where it runs, and which one ``auto`` takes."""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from torchtune_lce.implementations import chunked, compiled, reference
from torchtune_lce.implementations.capabilities import (
    ANYWHERE,
    CAPABILITIES,
    CCE_PRESETS,
    TRANSFORMABLE,
    Capabilities,
    able,
    setting,
)
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.losses import Losses

_log = logging.getLogger("torchtune_lce")

TokenLosses = Callable[[Call], Losses]


# Of all but the presets, whose kernels are imported when they are first chosen.
_FUNCTIONS: dict[str, TokenLosses] = {
    "torch_compile": compiled.token_losses,
    "chunked": chunked.token_losses,
    "reference": reference.token_losses,
}
NAMES = ("auto", *CAPABILITIES)


def check_name(impl: str) -> None:
    if impl not in NAMES:
        raise ValueError(f"impl must be one of {', '.join(NAMES)}, got {impl!r}")


def check_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError for derivatives that the implementation's own backward does not give."""
    if CAPABILITIES[name].own_backward:
        validation.check_transforms(name, TRANSFORMABLE, *tensors)


def choose(impl: str, hidden: Tensor) -> tuple[str, TokenLosses]:
    """The implementation that runs for ``impl`` on the device and dtype of ``hidden``, and its name.

    Raises ValueError for an unknown name and RuntimeError, saying what to set instead, for one that cannot run here.
    """
    name = _resolve(impl, hidden.device, hidden.dtype)
    if name not in CCE_PRESETS:
        return name, _FUNCTIONS[name]
    # Imported here: Triton may be absent, and TRITON_INTERPRET is read when the kernels are defined.
    from torchtune_lce.kernels import autograd

    return name, autograd.token_losses(CCE_PRESETS[name])


def _resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name that ``impl`` stands for. A compiler need not look inside: same arguments, same answer."""
    check_name(impl)
    if impl == "auto":
        impl, why = automatic(device, dtype)
        _say_once(impl, why)
    against = obstacle(impl, device, dtype)
    if against:
        raise RuntimeError(f"impl={impl!r} {against}")
    return impl


# What torch.compiler.assume_constant_result does, without the seconds that importing its compiler takes.
_resolve._dynamo_marked_constant = True


def automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What ``auto`` takes there, and why."""
    kernels, compiled_logits = CAPABILITIES["cce"], CAPABILITIES["torch_compile"]
    if device.type != "cuda":
        return ANYWHERE, f"{device.type} has no Triton kernels"
    if not _has_triton():
        return ANYWHERE, "Triton is not installed"
    if torch.version.hip:
        return "torch_compile", "the kernels have not been run on ROCm"
    capability = torch.cuda.get_device_capability(device)
    least = compiled_logits.compute_capability
    if capability < least:
        return ANYWHERE, f"Triton needs compute capability {_dotted(least)}, this card has {_dotted(capability)}"
    least = kernels.compute_capability
    if capability < least:
        why = f"the kernels need compute capability {_dotted(least)}, this card has {_dotted(capability)}"
        return "torch_compile", why
    if dtype == torch.float64 and not kernels.float64:
        return "torch_compile", "the kernels do not take float64"
    return "cce", f"compute capability {_dotted(capability)}"


def obstacle(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``impl`` cannot run there and what to set instead, or None."""
    can = CAPABILITIES[impl]
    if can.needs_triton and not _has_triton():
        return f"needs Triton, which is not installed; set {_what_runs(device, dtype)}"
    if dtype == torch.float64 and not can.float64:
        return f"does not take float64; set {setting(able('float64'))}"
    return _obstacle_of_device(can, device, dtype) if can.cuda_only else None


def _obstacle_of_device(can: Capabilities, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            what_runs = _what_runs(device, dtype)
            return f"needs a CUDA card, not cpu; set {what_runs} (TRITON_INTERPRET=1 runs it slowly, for tests)"
        if dtype == torch.bfloat16:
            why = "cannot take bfloat16 in Triton's interpreter, whose bfloat16 products are wrong"
            return f"{why}; set {_what_runs(device, dtype)}"
        return None
    if device.type != "cuda":
        return f"needs a CUDA card, not {device.type}; set {_what_runs(device, dtype)}"
    if torch.version.hip:
        return f"has not been run on ROCm; set {_what_runs(device, dtype)}"
    capability = torch.cuda.get_device_capability(device)
    if capability < can.compute_capability:
        why = f"needs compute capability {_dotted(can.compute_capability)}, this card has {_dotted(capability)}"
        return f"{why}; set {_what_runs(device, dtype)}"
    return None


def _what_runs(device: torch.device, dtype: torch.dtype) -> str:
    """What ``auto`` takes there, and what runs everywhere."""
    return setting(dict.fromkeys((automatic(device, dtype)[0], ANYWHERE)))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _say_once(impl: str, why: str) -> None:
    _log.info("linear cross-entropy: impl 'auto' takes '%s' (%s)", impl, why)
