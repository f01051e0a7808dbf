"""``impl="torch_compile"``: the reference, fused by torch.compile."""

from functools import cache

import torch
from torch import Tensor

from torchtune_lce import reference
from torchtune_lce.low_rank import LowRank
from torchtune_lce.options import Options


@cache
def _compiled():
    """Compiled at the first call, once a process: importing the package must not start a compiler.

    As one whole, so that torch raises where it would run a variant without compiling it.
    """
    return torch.compile(reference.token_losses, dynamic=True, fullgraph=True)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    low_rank: LowRank | None = None,
):
    """Same contract as :func:`torchtune_lce.reference.token_losses`; the logits are held once, in the input dtype."""
    arguments = hidden, weight, bias, targets, options, low_rank
    if torch.compiler.is_compiling():
        # The caller's compiler fuses it.
        return reference.token_losses(*arguments)
    config = torch._dynamo.config
    # A variant for each dtype, softcap, bias or none, frozen weight or not: eight, torch's limit for a function, are
    # soon too few, and past them it would run uncompiled. The names are those of torch 2.6, aliases later.
    with config.patch(cache_size_limit=config.accumulated_cache_size_limit):
        return _compiled()(*arguments)
