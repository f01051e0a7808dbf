"""``impl="torch_compile"``: the reference, fused by torch.compile."""

from collections.abc import Callable
from functools import cache, wraps

import torch

from torchtune_lce.implementations import reference
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.losses import Losses


def compiled_always(function: Callable) -> Callable:
    """The function under torch.compile, which raises where it would run a variant of it without compiling it.

    A variant is a dtype, a softcap, a bias or none, a frozen weight or not: torch's limit for a function, eight in a
    process, is soon passed, so its limit for all of them together holds. Numbers of Python are constants: torch 2.13,
    told to compile for any, may go on with one that it has seen before.
    """
    # As one whole, or torch would only warn.
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def run(*arguments):
        config = torch._dynamo.config
        with config.patch(recompile_limit=config.accumulated_recompile_limit, specialize_float=True):
            return compiled(*arguments)

    return run


@cache
def _compiled() -> Callable:
    """Compiled at the first call, once a process: importing the package must not start a compiler."""
    return compiled_always(reference.token_losses)


def token_losses(call: Call) -> Losses:
    """The logits are held once, in the input dtype."""
    # A caller that compiles fuses it himself.
    run = reference.token_losses if torch.compiler.is_compiling() else _compiled()
    return run(call)
