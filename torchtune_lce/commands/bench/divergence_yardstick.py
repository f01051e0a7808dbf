"""What divergences are held against: the exact ones, and what plain PyTorch's are off by."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.commands.bench.teacher_batches import TeacherBatch
from torchtune_lce.commands.shared.batches import IGNORE_INDEX
from torchtune_lce.commands.shared.objective import Objective
from torchtune_lce.commands.shared.yardstick import Errors, Yardstick, full_float32, norm_of, ratio, relative_error
from torchtune_lce.inputs.dtypes import accumulation_dtype

_LOGITS = 2**25  # of either model, held at a time, several times over


class _Found(NamedTuple):
    token_losses: Tensor  # [tokens in use]
    d_hidden: Tensor  # [N, D], of the mean loss
    d_weight: Tensor  # [V, D]
    lse: float  # the largest absolute log-sum-exp
    cancelled: float  # the norm of the student's softmax over that of the gradient by its logits


@torch.no_grad()
def measure(batch: TeacherBatch, objective: Objective) -> Yardstick:
    """Exact as :func:`torchtune_lce.commands.shared.yardstick.measure`'s: float64, or float32 beside 16 bits.

    PyTorch's logits are rounded to the inputs' dtype, as a model's output is. Divergences of this package promise not
    to do that: beside 16 bits they are held against PyTorch's that do not either, and other people's against
    ``rounded``. Its cross-entropies promise nothing.
    """
    dtype = batch.hidden.dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    with full_float32():
        exact = _plain(batch, objective, wide, wide)
        right = _beside(exact, _plain(batch, objective, dtype, dtype), dtype)
        if accumulation_dtype(dtype) == dtype or not objective.is_divergence:
            return right
        unrounded = _plain(batch, objective, accumulation_dtype(dtype), dtype)
        return replace(_beside(exact, unrounded, dtype), rounded=right)


def _beside(exact: _Found, own: _Found, dtype: torch.dtype) -> Yardstick:
    """A log-sum-exp's roundings count beside a small loss, and beside a small difference of two softmaxes."""
    rms = norm_of(exact.token_losses) / max(len(exact.token_losses), 1) ** 0.5
    difference = own.token_losses.to(exact.token_losses.dtype) - exact.token_losses
    return Yardstick(
        dtype=dtype,
        token_losses=exact.token_losses,
        d_hidden=exact.d_hidden,
        d_weight=exact.d_weight,
        own=Errors(*map(relative_error, own[:3], exact[:3])),
        own_mean=ratio(difference.sum().abs().item(), exact.token_losses.sum().abs().item()),
        filtered=Errors(0.0, 0.0, 0.0),
        condition=max(ratio(exact.lse, rms), exact.lse * exact.cancelled, 1.0),
    )


def _plain(batch: TeacherBatch, objective: Objective, logits_dtype: torch.dtype, dtype: torch.dtype) -> _Found:
    """By chunks of tokens: logits in ``logits_dtype``, and in ``dtype`` their gradient and its products."""
    rows = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    heads = [(hidden, weight.to(logits_dtype)) for hidden, weight in batch.heads]
    weight = batch.weight.to(dtype)
    d_hidden = torch.zeros_like(batch.hidden, dtype=dtype)
    d_weight = torch.zeros_like(weight, dtype=accumulation_dtype(dtype))
    losses, lse = [], 0.0
    softmax_squares, gradient_squares = torch.zeros(2, dtype=torch.float64, device=rows.device)
    for at in rows.split(max(_LOGITS // batch.shape.vocab, 1)):
        logits, teacher_logits = (hidden[at].to(logits_dtype) @ weight.T for hidden, weight in heads)
        lse = max(lse, *(x.float().logsumexp(-1).abs().max().item() for x in (logits, teacher_logits)))
        with torch.enable_grad():
            logits.requires_grad_()
            found = _token_losses(objective, logits, teacher_logits, batch.targets[at])
            (d_logits,) = torch.autograd.grad(found.sum() / len(rows), logits)
        losses.append(found.detach())
        softmax_squares += logits.detach().softmax(-1).square_().sum(dtype=torch.float64)
        gradient_squares += (d_logits * len(rows)).square_().sum(dtype=torch.float64)
        d_logits = d_logits.to(dtype)
        d_hidden[at] = d_logits @ weight
        d_weight += d_logits.T @ batch.hidden[at].to(dtype)
        del logits, teacher_logits, d_logits, found  # before the next chunk is made
    cancelled = ratio(softmax_squares.sqrt().item(), gradient_squares.sqrt().item())
    return _Found(torch.cat(losses), d_hidden, d_weight.to(dtype), lse, cancelled)


def _token_losses(objective: Objective, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """[n], in the accumulation dtype of the logits; the formulas stand in divergence/function.py."""
    wide = accumulation_dtype(logits.dtype)
    log_q, log_p = (x.to(wide).log_softmax(-1) for x in (logits, teacher_logits))
    forward, reverse = -(log_p.exp() * log_q).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    shares = objective.shares
    return objective.mix(
        shares.forward * forward + shares.reverse * reverse, lambda: F.nll_loss(log_q, labels, reduction="none")
    )
