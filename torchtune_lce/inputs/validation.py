"""Every complaint about the arguments of the public functions: which one, what was expected, what came."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtune_lce.inputs.dtypes import HIDDEN_DTYPES, TARGET_DTYPES
from torchtune_lce.inputs.options import METRICS, Options

REDUCTIONS = ("mean", "sum", "none")


def check_options(options: Options) -> None:
    """Raises ValueError or TypeError for a setting that no implementation accepts.

    By comparisons alone: torch.compile traces numbers through those, and not through math.isfinite.
    """
    _check_integer("ignore_index", options.ignore_index)
    _check_integer("workspace_mib", options.workspace_mib)
    if options.workspace_mib < 1:
        raise ValueError(f"workspace_mib must be at least 1, got {options.workspace_mib}")
    softcap = options.softcap
    if softcap is not None and not (_is_real(softcap) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a finite number > 0, got {softcap!r}")
    logit_scale = options.logit_scale
    # Far within float32, in which it is taken, times log2(e).
    if not (_is_real(logit_scale) and 1e-30 <= logit_scale <= 1e30):
        raise ValueError(f"logit_scale must be a number from 1e-30 to 1e30, got {logit_scale!r}")
    z_loss = options.z_loss
    if not (_is_real(z_loss) and 0 <= z_loss < math.inf):
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss!r}")
    smoothing = options.label_smoothing
    if not (_is_real(smoothing) and 0 <= smoothing <= 1):
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {smoothing!r}")
    eps = options.filter_eps
    if eps not in ("auto", None) and not (_is_real(eps) and 0 <= eps < 1):
        raise ValueError(f"filter_eps must be 'auto', None or a number in [0, 1), got {eps!r}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_metrics(metrics: Sequence[str] | str) -> tuple[str, ...]:
    """The names, each once. A command line gives a plain string for one, and omegaconf a sequence of its own."""
    if isinstance(metrics, str):
        metrics = (metrics,)
    if not isinstance(metrics, Sequence) or any(name not in METRICS for name in metrics):
        raise ValueError(f"metrics must be names out of {', '.join(METRICS)}, got {metrics!r}")
    return tuple(dict.fromkeys(metrics))


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_softcap(softcap: float | None, dtype: torch.dtype) -> None:
    """Raises ValueError for one that is no finite number in ``dtype``, that of the logits."""
    if softcap is not None and softcap > torch.finfo(dtype).max:
        raise ValueError(f"softcap must be None or a finite number > 0 in {dtype}, that of the logits, got {softcap!r}")


def check_shift(shift: int) -> None:
    _check_integer("shift", shift)
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")


def check_ignore_index(ignore_index: int, targets: Tensor) -> None:
    """Raises ValueError for a value that ``targets`` cannot hold: torch would compare with what is left of its bits."""
    info = torch.iinfo(targets.dtype)
    if not info.min <= ignore_index <= info.max:
        raise ValueError(
            f"ignore_index must be a value of the dtype of targets, {targets.dtype}, from {info.min} to {info.max}, "
            f"got {ignore_index}"
        )


def check_transforms(impl: str, instead: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where torch differentiates by other means than backward, which custom operators do not know.

    Under forward mode one would pass for a constant; under torch.func torch's own complaint is about an autograd
    function that the caller never wrote. That one is left to torch in compiled code, which cannot ask.

    ``instead``: what to set, as the message says it.
    """
    if has_tangents(*tensors):
        raise RuntimeError(f"impl={impl!r} has no forward-mode derivative (torch.func.jvp); set {instead}")
    if torch.compiler.is_compiling():
        return
    wrapped = (x for tensor in tensors if tensor is not None for x in _wrapped(tensor))
    if any(map(functorch.is_gradtrackingtensor, wrapped)):
        raise RuntimeError(
            f"impl={impl!r} has no derivative by torch.func (grad, vjp, jacrev); set {instead}, or call backward"
        )


def has_tangents(*tensors: Tensor | None) -> bool:
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def check_plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raises for what is no tensor, shows another matrix than it holds (a DTensor, NF4), or lies on another device."""
    named = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, got {type(tensor).__name__}: its data is not the matrix that it "
                "shows. Unshard or dequantise it first (torchtune_lce.LinearCrossEntropyLoss does it for FSDP2)"
            )
        check_dense(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a layout of which no implementation can take rows."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}")


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Shapes, and dtypes one by one; the values of ``targets`` are :func:`check_range`'s."""
    if hidden.dtype not in HIDDEN_DTYPES:
        raise TypeError(f"hidden must be one of {_names(HIDDEN_DTYPES)}, got {hidden.dtype}")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets must be one of {_names(TARGET_DTYPES)}, got {targets.dtype}")
    if hidden.ndim < 1:
        raise ValueError("hidden must have shape [..., D], got a scalar")
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have at least one feature, got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[-1]}] to match hidden, got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got {list(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of hidden without its last axis, {list(hidden.shape[:-1])}, "
            f"got {list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}] to match weight, got {list(bias.shape)}")


def check_same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError for operands of different dtypes; under autocast they have been cast already."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}: cast one of them, or call "
                "under torch.autocast"
            )


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can look at the values of ``tensor`` here, for this call alone; on a GPU that waits for it.

    Not in a fake tensor or on the meta device, where there are none, nor under torch.vmap, where they are many calls',
    nor while a tracer (torch.compile, torch.export, torch.fx, torch.jit) writes down what later calls will do.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return False
    if tensor.device.type == "meta" or is_fake(tensor):
        return False
    return not any(functorch.is_batchedtensor(wrapped) for wrapped in _wrapped(tensor))


def is_writable(tensor: Tensor) -> bool:
    """Whether it may be written to in place: it is no tracer's, whose tensors are of other types, nor many in one, as
    under torch.vmap and torch.autograd.grad(is_grads_batched=True).
    """
    wrapped = functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is Tensor and not wrapped


def check_range(targets: Tensor, vocabulary: int, ignore_index: int, if_too_large: str = "") -> None:
    """Raises ValueError for a target outside [0, V) that is not ignore_index; reads the tensor: a GPU synchronises.

    ``if_too_large`` ends the message where a target is V or more.
    """
    outside = targets[out_of_range(targets, vocabulary, ignore_index)]
    if not outside.numel():
        return
    said = (
        f"targets must be ignore_index ({ignore_index}) or in [0, {vocabulary}), the rows of weight; "
        f"got {outside.numel()} outside, the first {outside[0].item()}, "
        f"from {outside.min().item()} to {outside.max().item()}"
    )
    if (outside == Options.ignore_index).any():
        mark = Options.ignore_index
        said += (
            f". {mark} is torch's mark of what is ignored: set ignore_index={mark}, or mark such targets with "
            f"{ignore_index}"
        )
    raise ValueError(said + (if_too_large if (outside >= vocabulary).any() else ""))


def out_of_range(targets: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Mask, in the shape of targets, of those that name no row of the weight."""
    return (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))


def _wrapped(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as torch.func's transforms wrapped it, from the innermost transform to the outermost."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = functorch.get_unwrapped(tensor)


def _check_integer(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _is_real(value) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
