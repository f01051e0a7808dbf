"""The divergences' kernels as two custom operators: sums, with the gradients of the mean, and these scaled.

Where the divergence is a share of a loss and the labels' cross-entropy the rest, the sums are two, and the gradients
those of ``divergence_share divergence + (1 - divergence_share) cross-entropy``: either is to be differentiated in its
share.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import torch
from torch import Tensor

from torchtune_lce.kernels.divergence_walk import Mixture, Needs, walk
from torchtune_lce.kernels.operands import Operands
from torchtune_lce.kernels.operators import operator, refuse_second_derivative, rows_contiguous

# Relative: what float32 makes of a share, of its products and of a mean is some 1e-7.
SAME = 1e-5


def total(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden [N, D], weight [V, D], bias [V]
    teacher: tuple[Tensor, Tensor, Tensor | None],  # hidden [N, E], weight [V, E], bias [V]
    labels: Tensor,  # [N]
    ignore_index: int,
    forward_share: float,
    reverse_share: float,
    workspace_mib: int,
    divergence_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens in use [] float32, and how many those are [] int32, but 1 if there are none.

    With a share in (0, 1) two sums, [2]: the divergence and the labels' cross-entropy. Their gradients are NaN if
    upstream ones have other shares.
    """
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in student]
    loss, divisor, *_ = _strip_divergence(
        *student,
        *teacher,
        labels,
        ignore_index,
        float(forward_share),
        float(reverse_share),
        float(divergence_share),
        workspace_mib,
        needs,
    )
    return loss, divisor


torch.library.define(
    "torchtune_lce::strip_divergence",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor labels, int ignore_index, float forward_share, float reverse_share, float divergence_share, "
    "int workspace_mib, bool[] needs) "
    "-> (Tensor total, Tensor divisor, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


def _forward(*arguments):
    """The sums, what their means divide by, and the gradients as :class:`torchtune_lce.kernels.divergence_walk.Results`
    has them.
    """
    (*tensors, labels, ignore_index, forward_share, reverse_share, divergence_share, workspace_mib, needs) = arguments
    losses, nll, *others = walk(
        _operands(*tensors[:3]),
        _operands(*tensors[3:]),
        labels.contiguous(),
        ignore_index,
        Mixture(forward_share, reverse_share, divergence_share),
        Needs(*needs),
        workspace_mib * 2**20,
    )
    sums = losses.sum()
    return sums if nll is None else torch.stack([sums, nll.sum()]), *others


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    bias = bias if bias is None else bias.contiguous()
    return Operands(rows_contiguous(hidden), rows_contiguous(weight), bias, None, None, None)


@torch.library.register_fake("torchtune_lce::strip_divergence")
def _(hidden, weight, bias, *others):
    *_, divergence_share, _, needs = others
    return (
        hidden.new_empty(2 if divergence_share != 1 else (), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int32),
        *(hidden.new_empty(x.shape if need else 0) for need, x in zip(needs, (hidden, weight, bias), strict=True)),
    )


torch.library.define(
    "torchtune_lce::strip_divergence_backward",
    "(Tensor d_total, Tensor divisor, Tensor d_hidden, Tensor d_weight, Tensor d_bias, float divergence_share) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


def _backward(d_total, divisor, d_hidden, d_weight, d_bias, divergence_share):
    """What the forward found times the upstream gradient; new tensors, since a graph may be kept and run again."""
    if divergence_share != 1:
        d_total = _in_shares(d_total, divergence_share)
    # Of one dimension: a product with a number of none would be rounded to the other's dtype before.
    by_sum, by_mean = d_total.reshape(1), (d_total * divisor).reshape(1)
    of_hidden = by_sum if d_hidden.dtype == torch.float16 else by_mean
    factors = of_hidden, by_mean, by_mean
    gradients = d_hidden, d_weight, d_bias
    results = tuple(map(torch.empty_like, gradients))
    for result, gradient, factor in zip(results, gradients, factors, strict=True):
        if gradient.numel():
            torch.mul(gradient, factor, out=result)
    return results


@torch.library.register_fake("torchtune_lce::strip_divergence_backward")
def _(d_total, divisor, *gradients_and_share):
    return tuple(map(torch.empty_like, gradients_and_share[:-1]))


def _in_shares(d_totals: Tensor, divergence_share: float) -> Tensor:
    """What the shares of both are multiplied by in the upstream gradients [2]; NaN if they are not of one number."""
    by_divergence, by_nll = d_totals[0] / divergence_share, d_totals[1] / (1 - divergence_share)
    agree = (by_divergence - by_nll).abs() <= SAME * by_divergence.abs()
    return by_divergence.where(agree, torch.nan)


def _setup_context(ctx, inputs, output) -> None:
    # The gradients are outputs too, for which zeros would be made.
    ctx.set_materialize_grads(False)
    _, *found = output
    ctx.save_for_backward(*found)
    *_, ctx.divergence_share, _, ctx.needs = inputs


def _differentiate(ctx, d_total, *_):
    gradients = _strip_divergence_backward(d_total, *ctx.saved_tensors, ctx.divergence_share)
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True))
    return *needed, *[None] * 10


_strip_divergence = operator("strip_divergence", _forward, _differentiate, _setup_context)
_strip_divergence_backward = operator("strip_divergence_backward", _backward, refuse_second_derivative)
