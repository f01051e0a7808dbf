"""What stands between the products of :mod:`torchtune_lce.chunked_divergence`: plain PyTorch, or fused by a compiler.

q is the student's softmax, p the teacher's. The loss is forward_share times the forward divergence -Σ p log q, plus
reverse_share times the reverse one, Σ q (log q - log p).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchtune_lce.reference import accumulation_dtype


@dataclass(frozen=True)
class Steps:
    of_rows: Callable
    statistics: Callable
    gradient: Callable


@cache
def steps(fused: bool) -> Steps:
    """Compiled when first called, once a process."""
    functions = (of_rows, statistics, gradient)
    return Steps(*(torch.compile(function, dynamic=True) if fused else function for function in functions))


def of_rows(
    logits: Tensor, teacher_logits: Tensor, forward_share: float, reverse_share: float, need_gradient: bool
) -> Tensor:
    """The sum over tokens with all of their logits, [n, V], in whose place their gradient is written.

    Four blocks of [n, V] in the accumulation dtype at most.
    """
    wide = accumulation_dtype(logits.dtype)
    log_q = logits.log_softmax(-1, dtype=wide)
    gap = reverse = None
    if reverse_share:
        p = teacher_logits.log_softmax(-1, dtype=wide)
        gap = log_q - p
        p = p.exp_()
    else:
        p = teacher_logits.softmax(-1, dtype=wide)
    loss = -forward_share * (p * log_q).sum() if forward_share else log_q.new_zeros(())
    q = log_q.exp_()
    if reverse_share:
        reverse = (q * gap).sum(-1)
        loss = loss + reverse_share * reverse.sum()
    if need_gradient:
        logits.copy_(_by_logits(q, p, gap, reverse, forward_share, reverse_share))
    return loss


def statistics(
    logits: Tensor, teacher_logits: Tensor, forward_share: float, reverse_share: float, before: tuple[Tensor, ...]
):
    """Four numbers a token, [N], over the entries seen ``before`` and those of a chunk, [N, n]: both log-sum-exps, the
    mean of the student's logits under p, and the mean of their difference from the teacher's under q.
    """
    lse_before, teacher_lse_before, mean_logit, mean_gap = before
    lse = torch.logaddexp(lse_before, logits.logsumexp(-1))
    teacher_lse = torch.logaddexp(teacher_lse_before, teacher_logits.logsumexp(-1))
    if forward_share:
        here = (teacher_logits - teacher_lse[:, None]).exp_().mul_(logits).sum(-1)
        mean_logit = mean_logit * (teacher_lse_before - teacher_lse).exp() + here
    if reverse_share:
        here = (logits - lse[:, None]).exp_().mul_(logits - teacher_logits).sum(-1)
        mean_gap = mean_gap * (lse_before - lse).exp() + here
    return lse, teacher_lse, mean_logit, mean_gap


def gradient(
    logits: Tensor,
    teacher_logits: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    reverse: Tensor,
    forward_share: float,
    reverse_share: float,
    dtype: torch.dtype,
):
    """Gradient by a chunk of the student's logits, [N, n] in ``dtype``, and its sum over the tokens, [n], not rounded.

    ``reverse`` [N] is the reverse divergence over the whole vocabulary. Five blocks with the two that come in.
    """
    log_q, log_p = logits - lse[:, None], teacher_logits - teacher_lse[:, None]
    gap = log_q - log_p if reverse_share else None
    d_logits = _by_logits(log_q.exp_(), log_p.exp_(), gap, reverse, forward_share, reverse_share)
    return d_logits.to(dtype), d_logits.sum(0)


def _by_logits(
    q: Tensor, p: Tensor, gap: Tensor | None, reverse: Tensor | None, forward_share: float, reverse_share: float
) -> Tensor:
    """forward_share (q - p) + reverse_share q (gap - reverse), gap = log q - log p, in the memory of the arguments."""
    if gap is None:
        # The forward divergence alone. Subtracted before rounding to the input dtype: small where both agree.
        return q.sub_(p)
    d_logits = gap.sub_(reverse[:, None]).mul_(reverse_share).add_(forward_share).mul_(q)
    return d_logits.sub_(p, alpha=forward_share) if forward_share else d_logits
