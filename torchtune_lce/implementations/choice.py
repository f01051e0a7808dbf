"""The values of ``impl``: what each one is, where it runs, and which one ``auto`` takes."""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchtune_lce.implementations import chunked, compiled, reference
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.options import Options

_log = logging.getLogger("torchtune_lce")

# What each returns: see reference.token_losses.
TokenLosses = Callable[[Call], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Filtering:
    """Which gradients of a ``cce`` preset leave out softmax entries below ``filter_eps``."""

    hidden: bool
    weight: bool


# The method's preset names (Wijmans et al. 2024). Sums are float32 in every one of them, which is what Kahan summation
# was for, so cce_kahan is cce and cce_kahan_full_c_full_e is cce_exact.
CCE_PRESETS = {
    "cce": Filtering(hidden=True, weight=True),
    "cce_exact": Filtering(hidden=False, weight=False),
    "cce_kahan": Filtering(hidden=True, weight=True),
    "cce_kahan_full_c": Filtering(hidden=True, weight=False),
    "cce_kahan_full_e": Filtering(hidden=False, weight=True),
    "cce_kahan_full_c_full_e": Filtering(hidden=False, weight=False),
}
_TORCH_IMPLS: dict[str, TokenLosses] = {
    "torch_compile": compiled.token_losses,
    "chunked": chunked.token_losses,
    "reference": reference.token_losses,
}
# Differentiated by autograd, in every mode that it has; the others are custom operators with a backward of their own.
MADE_OF_TORCH = ("torch_compile", "reference")
NAMES = ("auto", *CCE_PRESETS, *_TORCH_IMPLS)


def check_name(impl: str) -> None:
    if impl not in NAMES:
        raise ValueError(f"impl must be one of {', '.join(NAMES)}, got {impl!r}")


def beyond_kernels(options: Options, scaled: bool) -> str | None:
    """What these settings need of the logits that the ``cce`` implementations do not do, if anything.

    ``scaled``: a :class:`torchtune_lce.inputs.low_rank.LowRank` with a scale is part of the projection.
    """
    if scaled:
        return "scale rows of the output projection, as DoRA on model.output does"
    if options.label_smoothing and options.softcap is not None:
        return "sum up capped logits, as label_smoothing with a softcap does"
    return None


def choose(impl: str, hidden: Tensor, beyond: str | None = None) -> tuple[str, TokenLosses]:
    """The implementation that runs for ``impl`` on the device and dtype of ``hidden``, and its name.

    ``beyond`` is what :func:`beyond_kernels` says. Those with kernels return no mean of the logits.

    Raises ValueError for an unknown name and RuntimeError, saying what to set instead, for one that cannot run here.
    """
    name = _resolve(impl, hidden.device, hidden.dtype, beyond)
    if name in _TORCH_IMPLS:
        return name, _TORCH_IMPLS[name]
    # Imported here: Triton may be absent, and TRITON_INTERPRET is read when the kernels are defined.
    from torchtune_lce.kernels import autograd

    return name, autograd.token_losses(CCE_PRESETS[name])


def _resolve(impl: str, device: torch.device, dtype: torch.dtype, beyond: str | None) -> str:
    """The name that ``impl`` stands for. A compiler need not look inside: same arguments, same answer."""
    check_name(impl)
    if impl == "auto":
        impl, why = automatic(device, dtype, beyond)
        _say_once(impl, why)
    against = obstacle(impl, device, dtype, beyond)
    if against:
        raise RuntimeError(f"impl={impl!r} {against}")
    return impl


# What torch.compiler.assume_constant_result does, without the seconds that importing its compiler takes.
_resolve._dynamo_marked_constant = True


def automatic(device: torch.device, dtype: torch.dtype, beyond: str | None = None) -> tuple[str, str]:
    """What ``auto`` takes there, and why."""
    if beyond:
        return "chunked", f"the kernels do not {beyond}"
    if device.type != "cuda":
        return "chunked", f"{device.type} has no Triton kernels"
    if not _has_triton():
        return "chunked", "Triton is not installed"
    if torch.version.hip:
        return "torch_compile", "the kernels have not been run on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return "chunked", f"Triton needs compute capability 7.0, this card has {_dotted(capability)}"
    if capability < (8, 0):
        return "torch_compile", f"the kernels need compute capability 8.0, this card has {_dotted(capability)}"
    if dtype == torch.float64:
        return "torch_compile", "the kernels do not take float64"
    return "cce", f"compute capability {_dotted(capability)}"


def obstacle(impl: str, device: torch.device, dtype: torch.dtype, beyond: str | None = None) -> str | None:
    """Why ``impl`` cannot run there and what to set instead, or None. PyTorch's own can run anywhere."""
    if impl in _TORCH_IMPLS:
        return None
    if beyond:
        return f"does not {beyond}; set impl='chunked' (what 'auto' takes for it), 'torch_compile' or 'reference'"
    if not _has_triton():
        return "needs Triton, which is not installed; set impl='chunked'"
    if dtype == torch.float64:
        return "does not take float64; set impl='chunked', 'torch_compile' or 'reference'"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA card, not cpu; set impl='chunked' (TRITON_INTERPRET=1 runs it slowly, for tests)"
        if dtype == torch.bfloat16:
            return "cannot take bfloat16 in Triton's interpreter, whose bfloat16 products are wrong; set impl='chunked'"
        return None
    if device.type != "cuda":
        return f"needs a CUDA card, not {device.type}; set impl='chunked'"
    if torch.version.hip:
        return "has not been run on ROCm; set impl='torch_compile' or 'chunked'"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        instead = "impl='torch_compile' or 'chunked'" if capability >= (7, 0) else "impl='chunked'"
        return f"needs compute capability 8.0, this card has {_dotted(capability)}; set {instead}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _say_once(impl: str, why: str) -> None:
    _log.info("linear cross-entropy: impl 'auto' takes '%s' (%s)", impl, why)
