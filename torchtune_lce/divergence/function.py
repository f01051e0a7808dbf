"""Divergences between the distributions of a student and a teacher, from hidden states and both output projections.

The formulas are those of torchtune's ``torchtune.modules.loss.kd_losses``. For one token, with p the teacher's softmax,
q the student's:

    forward   -sum_v p_v log q_v                 (without the teacher's entropy, which has no gradient)
    reverse    sum_v q_v (log q_v - log p_v)

Where torchtune leaves out entries with infinite logits, such a logit makes the loss infinite or NaN here.
"""

import torch
from torch import Tensor

from torchtune_lce.divergence import chunked
from torchtune_lce.divergence.choice import KERNELS, choose
from torchtune_lce.divergence.operands import Head, Pair, Shares, checked
from torchtune_lce.implementations.reference import full_logits
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.low_rank import LowRank


def divergence(
    student: Head,
    teacher: Head,
    labels: Tensor,  # [...]
    shares: Shares,
    *,
    ignore_index: int,
    workspace_mib: int,
    impl: str,
    normalize: bool,
) -> Tensor:
    """Sum over the tokens whose label is not ``ignore_index``, divided by their number with ``normalize``.

    Gradients reach the student alone. No tokens, or all of them ignored, give 0 with zero gradients. float32, float64
    for a float64 student.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, by name.
        RuntimeError: ``impl`` cannot run on this device, with these dtypes or with an adapter on an output.
    """
    pair = checked(student, teacher, labels, ignore_index)
    name = choose(impl, pair.student, pair.teacher)
    if name == "reference":
        total, count = _reference(pair, shares)
    else:
        validation.check_transforms(name, "impl='reference'", *pair.student.operands)
        if name == KERNELS:
            total, count = _kernels(pair, shares, workspace_mib)
        else:
            total, count = chunked.total(pair, shares, workspace_mib, fused=name == "torch_compile")
    return total / count.clamp(min=1) if normalize else total


def divergence_and_cross_entropy(
    student: Head,
    teacher: Head,
    labels: Tensor,  # [...]
    shares: Shares,
    *,
    divergence_share: float,
    ignore_index: int,
    workspace_mib: int,
) -> Tensor:
    """Means over the tokens whose label is not ``ignore_index``, [2] float32: of the divergence, and of the labels'
    cross-entropy under the student. By the kernels, which compute the second along with the first.

    They are for a loss of which the divergence is ``divergence_share``, in (0, 1), and the cross-entropy the rest:
    where they are differentiated in other shares the gradients are NaN. A label that names no entry gives NaN, in the
    cross-entropy and in its token's gradient.

    Raises: as :func:`divergence`.
    """
    pair = checked(student, teacher, labels, ignore_index)
    choose(KERNELS, pair.student, pair.teacher)
    validation.check_transforms(KERNELS, "impl='reference'", *pair.student.operands)
    totals, count = _kernels(pair, shares, workspace_mib, divergence_share)
    return totals / count


def _kernels(pair: Pair, shares: Shares, workspace_mib: int, divergence_share: float = 1.0) -> tuple[Tensor, Tensor]:
    # Imported here: Triton may be absent, and TRITON_INTERPRET is read when the kernels are defined.
    from torchtune_lce.kernels import divergence_operators

    student, teacher = (head.operands[:3] for head in (pair.student, pair.teacher))
    return divergence_operators.total(
        student,
        teacher,
        pair.labels,
        pair.ignore_index,
        shares.forward,
        shares.reverse,
        workspace_mib,
        divergence_share,
    )


def _reference(pair: Pair, shares: Shares) -> tuple[Tensor, Tensor]:
    """Plain PyTorch with both full logits."""
    student, teacher = pair.student, pair.teacher
    log_student, log_teacher = (
        _full_logits(*head.operands).to(accumulation_dtype(student.hidden.dtype)).log_softmax(-1)
        for head in (student, teacher)
    )
    losses = torch.zeros_like(log_student[:, 0])
    if shares.forward:
        losses = losses - shares.forward * (log_teacher.exp() * log_student).sum(-1)
    if shares.reverse:
        losses = losses + shares.reverse * (log_student.exp() * (log_student - log_teacher)).sum(-1)
    valid = pair.labels != pair.ignore_index
    return losses.where(valid, 0).sum(), valid.sum()


@without_autocast
def _full_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *low_rank: Tensor | None) -> Tensor:
    """[N, V], of operands widened before the product, since its result would be rounded."""
    wide = accumulation_dtype(hidden.dtype)
    hidden, weight, bias, *low_rank = (x if x is None else x.to(wide) for x in (hidden, weight, bias, *low_rank))
    return full_logits(hidden, weight, bias, None if low_rank[0] is None else LowRank(*low_rank))
