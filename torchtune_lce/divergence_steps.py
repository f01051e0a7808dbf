"""What stands between the products of :mod:`torchtune_lce.chunked_divergence`: plain PyTorch, or fused by a compiler.

q is the student's softmax, p the teacher's. The loss is forward_share times the forward divergence -Σ p log q, plus
reverse_share times the reverse one, Σ q (log q - log p).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchtune_lce.compiled import compiled_always
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
    return Steps(*(compiled_always(function) if fused else function for function in functions))


def of_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor | None,
    teacher_scale: Tensor | None,
    forward_share: float,
    reverse_share: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sum over tokens with all of their logits, [n, V], in whose place their gradient is written; and its gradient
    by ``scale`` [V], the factors that the logits lack.

    Four blocks of [n, V] in the accumulation dtype at most.
    """
    wide = accumulation_dtype(logits.dtype)
    log_q = _scaled(logits, scale).log_softmax(-1, dtype=wide)
    gap = reverse = d_scale = None
    if reverse_share:
        p = _scaled(teacher_logits, teacher_scale).log_softmax(-1, dtype=wide)
        gap = log_q - p
        p = p.exp_()
    else:
        p = _scaled(teacher_logits, teacher_scale).softmax(-1, dtype=wide)
    loss = -forward_share * (p * log_q).sum() if forward_share else log_q.new_zeros(())
    q = log_q.exp_()
    if reverse_share:
        reverse = (q * gap).sum(-1)
        loss = loss + reverse_share * reverse.sum()
    if need_gradient:
        d_logits = _by_logits(q, p, gap, reverse, forward_share, reverse_share)
        # Before another is made.
        del log_q, q, p, gap
        d_scale = _unscale(d_logits, logits, scale)
        logits.copy_(d_logits)
    return loss, d_scale


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
    scale: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    reverse: Tensor,
    forward_share: float,
    reverse_share: float,
    dtype: torch.dtype,
):
    """Gradient by a chunk of the student's logits, [N, n] in ``dtype``, its sum over the tokens, [n], and the gradient
    by ``scale`` [n], the factors that the student's logits lack; the latter two not rounded.

    ``reverse`` [N] is the reverse divergence over the whole vocabulary. Five blocks with the two that come in.
    """
    log_q, log_p = _scaled(logits, scale) - lse[:, None], teacher_logits - teacher_lse[:, None]
    gap = log_q - log_p if reverse_share else None
    d_logits = _by_logits(log_q.exp_(), log_p.exp_(), gap, reverse, forward_share, reverse_share)
    # Before another is made.
    del log_q, log_p, gap
    d_scale = _unscale(d_logits, logits, scale)
    return d_logits.to(dtype), d_logits.sum(0), d_scale


def _scaled(logits: Tensor, scale: Tensor | None) -> Tensor:
    return logits if scale is None else logits * scale


def _unscale(d_logits: Tensor, logits: Tensor, scale: Tensor | None) -> Tensor | None:
    """Gradient by the scale of the columns of ``logits``; that by logits with it becomes, in place, that without."""
    if scale is None:
        return None
    d_scale = (d_logits * logits).sum(0)
    d_logits.mul_(scale)
    return d_scale


def _by_logits(
    q: Tensor, p: Tensor, gap: Tensor | None, reverse: Tensor | None, forward_share: float, reverse_share: float
) -> Tensor:
    """forward_share (q - p) + reverse_share q (gap - reverse), gap = log q - log p, in the memory of the arguments."""
    if gap is None:
        # The forward divergence alone. Subtracted before rounding to the input dtype: small where both agree.
        return q.sub_(p)
    d_logits = gap.sub_(reverse[:, None]).mul_(reverse_share).add_(forward_share).mul_(q)
    return d_logits.sub_(p, alpha=forward_share) if forward_share else d_logits
