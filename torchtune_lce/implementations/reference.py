"""Linear cross-entropy in plain PyTorch with the full logits: what every other implementation must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.low_rank import LowRank


def full_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    low_rank: LowRank | None,
) -> Tensor:  # [N, V], in the accumulation dtype
    """What the model's own output layer gives."""
    logits = F.linear(hidden, weight, bias).to(accumulation_dtype(hidden.dtype))
    if low_rank is None:
        return logits
    logits = logits + F.linear(low_rank.low, low_rank.up)
    return logits if low_rank.scale is None else logits * low_rank.scale


def token_losses(call: Call) -> Losses:
    """Holds [N, V] logits, as ``F.linear`` followed by ``F.cross_entropy`` does."""
    options = call.options
    logits = full_logits(call.hidden, call.weight, call.bias, call.low_rank)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if options.logit_scale != 1:
        logits = logits * options.logit_scale
    valid = call.valid
    target = call.labels.where(valid, 0).long().unsqueeze(-1)
    peak = logits.detach().amax(-1)
    # Where an infinity is the largest, it comes back out of exp.
    peak = peak.where(peak.isfinite(), 0)
    logits = logits - peak.unsqueeze(-1)
    # Divided first: a sum of least finite numbers is none.
    means = [(logits / logits.shape[-1]).sum(-1)] if options.label_smoothing else []
    # A gather would keep all of them for its backward.
    own = logits[torch.arange(len(logits), device=logits.device), target.squeeze(-1)]
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == target, -torch.inf)
    others = logits.exp().sum(-1)
    total = others + own.exp()
    # A loss near zero is made of the other entries alone, and so is its gradient p - 1.
    near = own.abs() < 20
    confident = torch.log1p(others * (-own.where(near, 0)).exp())
    results = [confident.where(near, total.log() - own), peak, total.log(), *means]
    return Losses(*(result.where(valid, 0) for result in results))
