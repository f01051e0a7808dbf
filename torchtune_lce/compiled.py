"""``impl="torch_compile"``: the reference, fused by torch.compile."""

from functools import cache

import torch
from torch import Tensor

from torchtune_lce import reference
from torchtune_lce.low_rank import LowRank
from torchtune_lce.options import Options


@cache
def _compiled():
    """Compiled at the first call, once a process: importing the package must not start a compiler."""
    return torch.compile(reference.token_losses, dynamic=True)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    low_rank: LowRank | None = None,
):
    """Same contract as :func:`torchtune_lce.reference.token_losses`; the logits are held once, in the input dtype."""
    return _compiled()(hidden, weight, bias, targets, options, low_rank)
