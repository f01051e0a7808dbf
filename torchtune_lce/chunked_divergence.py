"""The divergences of :mod:`torchtune_lce.divergence` in bounded memory, in plain PyTorch.

The student's gradients are computed in the forward, which has all that they need at hand; the backward only scales
them. So no projection is read twice, or in the backward, where FSDP2 has let go of the teacher's. What that costs is
the gradients themselves, held from forward to backward: [N, D], and [V, D] where the student's weight is trained.

- Weight frozen (LoRA): pieces of tokens. A piece has its whole rows of logits, and each product is computed once.
- Weight trained: chunks of the vocabulary, so that each row of the weight's gradient is one sum, rounded once. The
  logits are computed twice, for softmax over the whole vocabulary and then for the gradients.

A custom operator: how many tokens are in use decides its shapes, which a compiler cannot know.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.autocast import without_autocast
from torchtune_lce.divergence_steps import steps
from torchtune_lce.reference import accumulation_dtype

if TYPE_CHECKING:
    from torchtune_lce.divergence import Head, Shares

torch.library.define(
    "torchtune_lce::chunked_divergence",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor labels, int ignore_index, float forward_share, "
    "float reverse_share, int workspace_mib, bool fused, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor total, Tensor count, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


def total(
    student: "Head",
    teacher: "Head",
    labels: Tensor,
    shares: "Shares",
    ignore_index: int,
    workspace_mib: int,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens in use [], and how many those are []. Heads and labels are flat, [N, D] and [N].

    ``fused``: torch.compile fuses what stands between the products.
    """
    trained = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (student.hidden, student.weight, student.bias)
    ]
    loss, count, *_ = torch.ops.torchtune_lce.chunked_divergence(
        student.hidden,
        student.weight,
        student.bias,
        teacher.hidden,
        teacher.weight,
        teacher.bias,
        labels,
        ignore_index,
        shares.forward,
        shares.reverse,
        workspace_mib,
        fused,
        *trained,
    )
    return loss, count


@torch.library.impl("torchtune_lce::chunked_divergence", "default")
@without_autocast
def _forward(
    student_hidden,  # [N, D]
    student_weight,  # [V, D]
    student_bias,  # [V]
    teacher_hidden,  # [N, E]
    teacher_weight,  # [V, E]
    teacher_bias,  # [V]
    labels,  # [N]
    ignore_index,
    forward_share,
    reverse_share,
    workspace_mib,
    fused,
    need_hidden,
    need_weight,
    need_bias,
):
    """The sum, the number of tokens in use, and gradients, empty where not needed: d_hidden of the sum, d_weight and
    d_bias of the mean. A sum over many tokens may be too large for float16, their mean too small for a single token.
    """
    rows = (labels != ignore_index).nonzero().squeeze(-1)
    count = torch.full((), rows.numel(), device=labels.device)
    projections = (student_weight, student_bias), (teacher_weight, teacher_bias)
    shares, workspace = (forward_share, reverse_share), workspace_mib * 2**20
    states = student_hidden, teacher_hidden
    if need_weight or need_bias:
        needs = need_hidden, need_weight, need_bias
        return _by_vocabulary(states, projections, rows, count, shares, workspace, fused, *needs)
    loss, d_hidden = _by_tokens(states, projections, rows, shares, workspace, fused, need_hidden)
    return loss, count, d_hidden, student_hidden.new_empty(0), student_hidden.new_empty(0)


@torch.library.register_fake("torchtune_lce::chunked_divergence")
def _(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    labels,
    ignore_index,
    forward_share,
    reverse_share,
    workspace_mib,
    fused,
    need_hidden,
    need_weight,
    need_bias,
):
    needed = ((need_hidden, student_hidden), (need_weight, student_weight), (need_bias, student_bias))
    return (
        student_hidden.new_empty((), dtype=accumulation_dtype(student_hidden.dtype)),
        labels.new_empty((), dtype=torch.int64),
        *(x.new_empty(x.shape) if need else student_hidden.new_empty(0) for need, x in needed),
    )


def _by_tokens(states, projections, rows, shares, workspace, fused, need_hidden):
    """The sum, and its gradient by the student's hidden states."""
    student, teacher = states
    wide = accumulation_dtype(student.dtype)
    vocabulary = projections[0][0].shape[0]
    # Three quarters hold both logits of a piece, the rest what some of its tokens need in the accumulation dtype, which
    # is up to four blocks at once.
    piece = workspace * 3 // 4 // (vocabulary * (student.itemsize + teacher.itemsize))
    # A product takes as long for some tokens more: whole tiles.
    piece = piece // 64 * 64 or max(piece, 1)
    block = max(workspace // 4 // (vocabulary * wide.itemsize * 4), 1)
    loss = student.new_zeros((), dtype=wide)
    d_hidden = student.new_zeros(student.shape if need_hidden else 0)
    for used in rows.split(piece):
        piece_loss, d_logits = _piece(states, projections, used, block, shares, fused, need_hidden)
        loss += piece_loss
        if need_hidden:
            d_hidden[used] = d_logits @ projections[0][0]
        # Before the next piece is made.
        del d_logits
    return loss, d_hidden


def _piece(states, projections, used, block, shares, fused, need_gradient):
    """The sum over the tokens ``used`` and, in place of the student's logits, its gradient by them."""
    logits, teacher_logits = (
        F.linear(hidden[used], *projection) for hidden, projection in zip(states, projections, strict=True)
    )
    loss = logits.new_zeros((), dtype=accumulation_dtype(logits.dtype))
    for parts in zip(logits.split(block), teacher_logits.split(block), strict=True):
        loss += steps(fused).of_rows(*parts, *shares, need_gradient)
    return loss, logits


def _by_vocabulary(states, projections, rows, count, shares, workspace, fused, need_hidden, need_weight, need_bias):
    """What the operator returns."""
    student, teacher = states
    weight, bias = projections[0]
    wide = accumulation_dtype(student.dtype)
    # Both logits and three blocks made of them; the last chunk's gradient, or a product before it is widened.
    bytes_per_entry = rows.numel() * (5 * wide.itemsize + max(student.itemsize, teacher.itemsize))
    chunk = min(weight.shape[0], max(workspace // max(bytes_per_entry, 1), 64))
    parts = [slice(start, start + chunk) for start in range(0, weight.shape[0], chunk)]
    kept = [hidden if rows.numel() == hidden.shape[0] else hidden[rows] for hidden in states]
    numbers = [
        torch.full(rows.shape, start, dtype=wide, device=rows.device) for start in (-torch.inf, -torch.inf, 0, 0)
    ]
    for part in parts:
        numbers = steps(fused).statistics(*_logits(kept, projections, part, wide), *shares, numbers)
    lse, teacher_lse, mean_logit, mean_gap = numbers
    reverse = mean_gap - lse + teacher_lse
    loss = (shares[0] * (lse - mean_logit) + shares[1] * reverse).sum()

    d_kept = torch.zeros_like(kept[0], dtype=wide) if need_hidden else None
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = student.new_empty(bias.shape if need_bias else 0)
    mean = 1 / max(rows.numel(), 1)
    for part in parts:
        both = _logits(kept, projections, part, wide)
        d_logits, by_entry = steps(fused).gradient(*both, lse, teacher_lse, reverse, *shares, student.dtype)
        if need_bias:
            d_bias[part] = by_entry * mean
        if need_hidden:
            d_kept += d_logits @ weight[part]
        if need_weight:
            torch.addmm(d_weight[part], d_logits.T, kept[0], beta=0, alpha=mean, out=d_weight[part])
        # Before the next chunk is made.
        del d_logits
    d_hidden = student.new_zeros(student.shape if need_hidden else 0)
    if need_hidden:
        d_hidden[rows] = d_kept.to(student.dtype)
    return loss, count, d_hidden, d_weight, d_bias


def _logits(kept, projections, part, dtype):
    """Student's and teacher's logits of the entries ``part``."""
    both = []
    for hidden, (weight, bias) in zip(kept, projections, strict=True):
        logits = torch.mm(hidden, weight[part].T).to(dtype)
        both.append(logits if bias is None else logits.add_(bias[part]))
    return both


torch.library.define(
    "torchtune_lce::chunked_divergence_backward",
    "(Tensor d_total, Tensor count, Tensor d_hidden, Tensor d_weight, Tensor d_bias, int workspace_mib) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


@torch.library.impl("torchtune_lce::chunked_divergence_backward", "default")
@without_autocast
def _backward(d_total, count, d_hidden, d_weight, d_bias, workspace_mib):
    """What the forward found times the upstream gradient; new tensors, since a graph may be kept and run again."""
    by_token, by_mean = d_total.reshape(1), (d_total * count).reshape(1)
    return tuple(
        _scaled(gradient, factor, workspace_mib * 2**20)
        for gradient, factor in ((d_hidden, by_token), (d_weight, by_mean), (d_bias, by_mean))
    )


def _scaled(gradient: Tensor, factor: Tensor, workspace: int) -> Tensor:
    """In the dtype of ``gradient``, though multiplied in that of ``factor`` [1]; in pieces, since CPUs widen copies."""
    result = torch.empty_like(gradient)
    if gradient.numel():
        rows = max(workspace // (gradient[0].numel() * factor.itemsize * 2), 1)
        for source, target in zip(gradient.split(rows), result.split(rows), strict=True):
            torch.mul(source, factor, out=target)
    return result


@torch.library.register_fake("torchtune_lce::chunked_divergence_backward")
def _(d_total, count, d_hidden, d_weight, d_bias, workspace_mib):
    return tuple(map(torch.empty_like, (d_hidden, d_weight, d_bias)))


def _setup_context(ctx, inputs, output) -> None:
    # The gradients are outputs too, for which zeros would be made.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.workspace_mib = inputs[-5]
    ctx.needs = inputs[-3:]


def _differentiate(ctx, d_total, *_):
    gradients = torch.ops.torchtune_lce.chunked_divergence_backward(d_total, *ctx.saved_tensors, ctx.workspace_mib)
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True))
    return *needed, *[None] * 12


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("this impl has no second derivative (create_graph=True); set impl='reference'")


torch.library.register_autograd("torchtune_lce::chunked_divergence", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::chunked_divergence_backward", _refuse_second_derivative)
