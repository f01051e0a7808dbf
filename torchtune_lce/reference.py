"""Linear cross-entropy in plain PyTorch with the full logits: what every other implementation must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.low_rank import LowRank
from torchtune_lce.options import Options


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def token_losses(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N], ignore_index or 0 <= t < V
    options: Options,
    low_rank: LowRank | None = None,
) -> tuple[Tensor, ...]:
    """Negative log-likelihood and log-sum-exp of each token, and with label smoothing the sum of its logits.

    [N] each in the accumulation dtype, 0 where ignored. Holds [N, V] logits, as ``F.linear`` followed by
    ``F.cross_entropy`` does.
    """
    logits = full_logits(hidden, weight, bias, low_rank)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    valid = targets != options.ignore_index
    lse = logits.logsumexp(-1)
    target_logit = logits.gather(-1, targets.where(valid, 0).long().unsqueeze(-1)).squeeze(-1)
    results = [lse - target_logit, lse]
    if options.label_smoothing:
        results.append(logits.sum(-1))
    return tuple(result.where(valid, 0) for result in results)
