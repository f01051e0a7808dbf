"""What stands between the products of :mod:`torchtune_lce.divergence.chunked`: plain PyTorch, or fused by a compiler.

q is the student's softmax, p the teacher's. The loss is forward_share times the forward divergence -Σ p log q, plus
reverse_share times the reverse one, Σ q (log q - log p).

Logits may share a large value. So they are taken relative to the largest of their token, the student's to its own and
the teacher's to its own, and no log-sum-exp is ever added to that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchtune_lce.implementations.fused import compiled_always
from torchtune_lce.inputs.dtypes import accumulation_dtype


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum over tokens with all of their logits, [n, V]; its gradient by these; and by ``scale`` [V], the factors
    that the logits lack.

    Four blocks of [n, V] in the accumulation dtype at most. The gradient is not written in the logits' place: up to
    torch 2.11 inductor fails to compile that for a CPU, where a difference of both models' logits is read twice.
    """
    wide = accumulation_dtype(logits.dtype)
    log_q = _scaled(logits, scale).log_softmax(-1, dtype=wide)
    gap = reverse = None
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
    if not need_gradient:
        return loss, None, None
    d_logits = _by_logits(q, p, gap, reverse, forward_share, reverse_share)
    # Before another is made.
    del log_q, q, p, gap
    return loss, d_logits, _unscale(d_logits, logits, scale)


def statistics(
    logits: Tensor, teacher_logits: Tensor, forward_share: float, reverse_share: float, before: list[Tensor]
) -> list[Tensor]:
    """Six numbers a token, [N], over the entries seen ``before`` and those of a chunk, [N, n], in whose place others
    are written: the student's peak, which is the largest logit, and total Σ exp(logit - peak); the teacher's; the
    student's logits summed with the weights of the teacher's total; and the logits' differences, student less teacher,
    with the weights of the student's. Logits in the latter two are those less their peaks.
    """
    peak, total, teacher_peak, teacher_total, logit_sum, gap_sum = before
    peak, base, shrunk, rise = _raised(peak, logits)
    teacher_peak, teacher_base, teacher_shrunk, teacher_rise = _raised(teacher_peak, teacher_logits)
    logits.sub_(base[:, None])
    teacher_logits.sub_(teacher_base[:, None])
    # First of all: a peak that rises from that of a masked chunk rises as far as a number can.
    total, teacher_total = total * shrunk, teacher_total * teacher_shrunk
    logit_sum = logit_sum * teacher_shrunk - teacher_total * rise
    gap_sum = gap_sum * shrunk - total * (rise - teacher_rise)
    exponentials = logits.exp()
    total = total + exponentials.sum(-1)
    if reverse_share:
        gap_sum = gap_sum + exponentials.mul_(logits - teacher_logits).sum(-1)
    # Before another is made.
    del exponentials
    exponentials = teacher_logits.exp()
    teacher_total = teacher_total + exponentials.sum(-1)
    if forward_share:
        logit_sum = logit_sum + exponentials.mul_(logits).sum(-1)
    return [peak, total, teacher_peak, teacher_total, logit_sum, gap_sum]


def _raised(before: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """The peak over more ``logits``; what to subtract from them, which is finite; the factor of sums of exponentials
    relative to the peak ``before``; and how far the latter lay below.
    """
    peak = torch.maximum(before, logits.amax(-1))
    base, base_before = _finite(peak), _finite(before)
    return peak, base, (before - base).exp(), base - base_before


def _finite(peak: Tensor) -> Tensor:
    """Infinities stay in the logits that they are subtracted from, or they would become NaN."""
    return peak.where(peak.isfinite(), 0)


def summary(
    peak: Tensor, total: Tensor, teacher_peak: Tensor, teacher_total: Tensor, logit_sum: Tensor, gap_sum: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What :func:`gradient` subtracts from the logits of either, two numbers each; the forward and the reverse
    divergence. From what :func:`statistics` found over the whole vocabulary; [N] all of them.
    """
    log_total, log_teacher_total = total.log(), teacher_total.log()
    normalizers = _finite(peak), log_total, _finite(teacher_peak), log_teacher_total
    return normalizers, log_total - logit_sum / teacher_total, gap_sum / total - log_total + log_teacher_total


def gradient(
    logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor | None,
    normalizers: tuple[Tensor, ...],
    reverse: Tensor,
    forward_share: float,
    reverse_share: float,
    dtype: torch.dtype,
):
    """Gradient by a chunk of the student's logits, [N, n] in ``dtype``, its sum over the tokens, [n], and the gradient
    by ``scale`` [n], the factors that the student's logits lack; the latter two not rounded.

    ``normalizers`` and ``reverse`` are :func:`summary`'s. Five blocks with the two that come in.
    """
    base, log_total, teacher_base, log_teacher_total = (x[:, None] for x in normalizers)
    log_q = (_scaled(logits, scale) - base).sub_(log_total)
    log_p = (teacher_logits - teacher_base).sub_(log_teacher_total)
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
