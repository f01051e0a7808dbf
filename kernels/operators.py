"""What the custom operators share: the device they run on, rows as kernels read them, a short way for eager calls."""

from __future__ import annotations  # torch 2.8 compiles what calls these, but not `Tensor | None`

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from torchtune_lce.kernels.compiling import side_by_side


def operator(
    name: str, implementation: Callable, differentiate: Callable, setup_context: Callable | None = None
) -> Callable:
    """The operator ``torchtune_lce::name``, whose schema is defined, with its implementation and gradient.

    To tracers it is one node. An eager call takes the same parts without torch's dispatcher, whose way through an
    operator with a gradient of its own, and back, takes the host longer than the smaller kernels run.
    """
    qualified = f"torchtune_lce::{name}"
    implementation = _on_its_device(side_by_side(implementation))
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_autograd(qualified, differentiate, setup_context=setup_context)
    heard = getattr(torch.ops.torchtune_lce, name).default

    # One without a gradient says so, with a graph of gradients.
    unheard = heard
    if setup_context is not None:

        class Unheard(torch.autograd.Function):
            # In one: given apart, torch looks at signatures in each call.
            @staticmethod
            def forward(ctx, *arguments):
                results = implementation(*arguments)
                setup_context(ctx, arguments, results)
                return results

            backward = staticmethod(differentiate)

        unheard = Unheard.apply

    def call(*arguments):
        if somebody_listens(arguments):
            return heard(*arguments)
        # As torch has it, nothing is set up where nobody asks for a gradient.
        return (unheard if _needs_gradient(arguments) else implementation)(*arguments)

    return call


def somebody_listens(arguments: tuple) -> bool:
    """Tracers, transforms and modes, to which an operator must be one; or there is no memory to launch kernels on.

    Or what is there is to be negated first, which torch's dispatcher does.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    tensor = _first_tensor(arguments)
    if tensor.device.type == "meta" or is_fake(tensor):
        return True
    return any(isinstance(x, Tensor) and x.is_neg() for x in arguments)


def graph_is_kept() -> bool:
    """Whether the backward that is running may run again; also where torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves is moved by somebody, or made again (checkpoints); also where torch does not say."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(False) is not None


def _needs_gradient(arguments: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _first_tensor(arguments: tuple) -> Tensor:
    return next(x for x in arguments if isinstance(x, Tensor))


def _on_its_device(function: Callable) -> Callable:
    """Runs it on the card of its first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def run(*arguments):
        with torch.cuda.device_of(_first_tensor(arguments)):
            return function(*arguments)

    return run


def rows_contiguous(matrix: Tensor | None) -> Tensor | None:
    """Kernels take any row stride; features must lie next to each other."""
    if matrix is None or matrix.stride(-1) == 1 or matrix.shape[-1] == 1:
        return matrix
    return matrix.contiguous()


def refuse_second_derivative(ctx, *_):
    raise RuntimeError("impl='cce' and its presets have no second derivative (create_graph=True); set impl='reference'")
