"""The divergences of :mod:`torchtune_lce.divergence.function` in bounded memory, in plain PyTorch.

The student's gradients are computed in the forward, which has all that they need at hand; the backward only scales
them. So no projection is read twice, or in the backward, where FSDP2 has let go of the teacher's. What that costs is
the gradients themselves, held from forward to backward: [N, D], and [V, D] where the student's weight is trained.
An adapter on either output (:class:`torchtune_lce.inputs.low_rank.LowRank`) joins the logits, never the weight.

- Weight frozen (LoRA, on the output too): pieces of tokens. A piece has its whole rows of logits, and each product is
  computed once.
- Weight trained: chunks of the vocabulary, so that each row of the weight's gradient is one sum, rounded once. The
  logits are computed twice, for softmax over the whole vocabulary and then for the gradients.

Logits are never rounded to the dtype of the hidden states; their gradient is, once.

A custom operator: how many tokens are in use decides its shapes, which a compiler cannot know.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.divergence.operands import Pair, Shares
from torchtune_lce.divergence.steps import steps, summary
from torchtune_lce.divergence.wide_products import add_product, wide_logits
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.dtypes import accumulation_dtype


class Operands(NamedTuple):
    """What the logits of a model are made of, or the gradients by it; those of the student and by it all of one dtype,
    but for the scale's. The last three, all or none, are :class:`torchtune_lce.inputs.low_rank.LowRank`'s.
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    low: Tensor | None  # [N, r]
    up: Tensor | None  # [V, r]
    scale: Tensor | None  # [V], in the accumulation dtype


_OPERANDS = ", ".join(
    f"Tensor{'' if field in ('hidden', 'weight') else '?'} {{0}}_{field}" for field in Operands._fields
)
_GRADIENTS = ", ".join(f"Tensor d_{field}" for field in Operands._fields)

torch.library.define(
    "torchtune_lce::chunked_divergence",
    f"({_OPERANDS.format('student')}, {_OPERANDS.format('teacher')}, Tensor labels, int ignore_index, "
    "float forward_share, float reverse_share, int workspace_mib, bool fused, bool[] needs) "
    f"-> (Tensor total, Tensor count, {_GRADIENTS})",
)


def total(
    pair: Pair,
    shares: Shares,
    workspace_mib: int,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens in use [], and how many those are [].

    ``fused``: torch.compile fuses what stands between the products.
    """
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in pair.student.operands]
    loss, count, *_ = torch.ops.torchtune_lce.chunked_divergence(
        *pair.student.operands,
        *pair.teacher.operands,
        pair.labels,
        pair.ignore_index,
        shares.forward,
        shares.reverse,
        workspace_mib,
        fused,
        needs,
    )
    return loss, count


@torch.library.impl("torchtune_lce::chunked_divergence", "default")
@without_autocast
def _forward(*arguments):
    """The sum, the number of tokens in use, and gradients, empty where not needed: by hidden and low of the sum, by the
    others of the mean. A sum over many tokens may be too large for float16, their mean too small for a single token.
    """
    student, teacher, (labels, ignore_index, *shares, workspace_mib, fused, needs) = _split(arguments)
    rows = (labels != ignore_index).nonzero().squeeze(-1)
    count = torch.full((), rows.numel(), device=labels.device)
    needs = Operands(*needs)
    compute = _by_vocabulary if needs.weight or needs.bias else _by_tokens
    loss, gradients = compute(student, teacher, rows, shares, workspace_mib * 2**20, fused, needs)
    return loss, count, *(student.hidden.new_empty(0) if x is None else x for x in gradients)


@torch.library.register_fake("torchtune_lce::chunked_divergence")
def _(*arguments):
    student, _, (labels, *_, needs) = _split(arguments)
    hidden = student.hidden
    return (
        hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)),
        labels.new_empty((), dtype=torch.int64),
        *(x.new_empty(x.shape) if need else hidden.new_empty(0) for need, x in zip(needs, student, strict=True)),
    )


def _split(arguments) -> tuple[Operands, Operands, tuple]:
    """Student, teacher and what else the operator takes."""
    count = len(Operands._fields)
    return Operands(*arguments[:count]), Operands(*arguments[count : 2 * count]), arguments[2 * count :]


def _by_tokens(student, teacher, rows, shares, workspace, fused, needs):
    """The sum, and gradients, None where not needed; those by weight and bias are not to be had."""
    dtype = student.hidden.dtype
    wide = accumulation_dtype(dtype)
    vocabulary = student.weight.shape[0]
    teacher_wide = accumulation_dtype(teacher.hidden.dtype)
    piece, block = tokens_at_once(workspace, vocabulary, wide.itemsize, teacher_wide.itemsize)
    loss = student.hidden.new_zeros((), dtype=wide)
    d_hidden, d_low, d_up, d_scale = (
        x.new_zeros(x.shape, dtype=kind) if need else None
        for need, x, kind in (
            (needs.hidden, student.hidden, dtype),
            (needs.low, student.low, dtype),
            (needs.up, student.up, wide),
            (needs.scale, student.scale, wide),
        )
    )
    for used in rows.split(piece):
        piece_loss, d_logits, piece_d_scale = _piece(
            student, teacher, used, block, shares, workspace // 4, fused, any(needs)
        )
        loss += piece_loss
        if needs.hidden:
            d_hidden[used] = d_logits @ student.weight
        if needs.low:
            d_low[used] = d_logits @ student.up
        if needs.up:
            add_product(d_up, d_logits.T, student.low[used], workspace // 4)
        if needs.scale:
            d_scale += piece_d_scale
        # Before the next piece is made.
        del d_logits
    mean = 1 / max(rows.numel(), 1)
    d_up, d_scale = (None if x is None else x.mul_(mean) for x in (d_up, d_scale))
    return loss, Operands(d_hidden, None, None, d_low, None if d_up is None else d_up.to(dtype), d_scale)


def tokens_at_once(workspace: int, vocabulary: int, itemsize: int, teacher_itemsize: int) -> tuple[int, int]:
    """Tokens of a piece, and of a block among them. Item sizes are those of the accumulation dtypes.

    Three quarters of the workspace hold both logits of a piece, the rest what some of its tokens need, which is up to
    four blocks at once; before that, and after, what is widened for products.
    """
    piece = workspace * 3 // 4 // (vocabulary * (itemsize + teacher_itemsize))
    block = workspace // 4 // (vocabulary * itemsize * 4)
    # A product takes as long for some tokens more: whole tiles.
    return piece // 32 * 32 or max(piece, 1), max(block, 1)


def _piece(student, teacher, used, block, shares, workspace, fused, need_gradient):
    """The sum over the tokens ``used``, its gradient by the student's logits without their scale, in the dtype of the
    hidden states; and that by the scale, if there is one.
    """
    everything = slice(None)
    logits = wide_logits(_in_use(student, used), everything, workspace, scaled=False)
    teacher_logits = wide_logits(_in_use(teacher, used), everything, workspace, scaled=False)
    loss = logits.new_zeros(())
    d_scale = None if student.scale is None else torch.zeros_like(student.scale)
    for parts in zip(logits.split(block), teacher_logits.split(block), strict=True):
        part_loss, d_logits, part_d_scale = steps(fused).of_rows(
            *parts, student.scale, teacher.scale, *shares, need_gradient
        )
        loss += part_loss
        if d_logits is not None:
            parts[0].copy_(d_logits)
            # Before the next block's is made.
            del d_logits
        if part_d_scale is not None:
            d_scale += part_d_scale
    return loss, _rounded(logits, student.hidden.dtype, teacher_logits), d_scale


def _rounded(d_logits, dtype, memory):
    """In ``dtype``, in ``memory``, which has its shape, and whose values are not needed any more."""
    if d_logits.dtype == dtype:
        return d_logits
    return memory.view(dtype)[:, : d_logits.shape[1]].copy_(d_logits)


def _by_vocabulary(student, teacher, rows, shares, workspace, fused, needs):
    """The sum, and gradients, None where not needed."""
    dtype = student.hidden.dtype
    wide = accumulation_dtype(dtype)
    # Both logits and three blocks made of them, and the last chunk's gradient; while logits are made, what is widened
    # for their products is in place of those.
    bytes_per_entry = rows.numel() * (5 * wide.itemsize + max(dtype.itemsize, teacher.hidden.itemsize))
    vocabulary = student.weight.shape[0]
    chunk = min(vocabulary, max(workspace // max(bytes_per_entry, 1), 64))
    kept, kept_teacher = _in_use(student, rows), _in_use(teacher, rows)

    def both_logits(part, scaled):
        logits = wide_logits(kept, part, workspace // 4, scaled)
        return logits, wide_logits(kept_teacher, part, workspace // 4).to(wide)

    sums = [torch.full(rows.shape, x, dtype=wide, device=rows.device) for x in (-torch.inf, 0, -torch.inf, 0, 0, 0)]
    for start in range(0, vocabulary, chunk):
        both = both_logits(slice(start, start + chunk), scaled=True)
        sums = steps(fused).statistics(*both, *shares, sums)
        # Before the next chunk is made.
        del both
    normalizers, cross_entropy, reverse = summary(*sums)
    loss = (shares[0] * cross_entropy + shares[1] * reverse).sum()

    d_kept, d_kept_low = (
        torch.zeros_like(x, dtype=wide) if need else None
        for need, x in ((needs.hidden, kept.hidden), (needs.low, kept.low))
    )
    d_weight, d_bias, d_up, d_scale = (
        x.new_empty(x.shape) if need else None
        for need, x in (
            (needs.weight, student.weight),
            (needs.bias, student.bias),
            (needs.up, student.up),
            (needs.scale, student.scale),
        )
    )
    mean = 1 / max(rows.numel(), 1)
    for start in range(0, vocabulary, chunk):
        part = slice(start, start + chunk)
        both = both_logits(part, scaled=False)
        scale = None if kept.scale is None else kept.scale[part]
        d_logits, by_entry, by_scale = steps(fused).gradient(*both, scale, normalizers, reverse, *shares, dtype)
        # Before more is made.
        del both
        if needs.bias:
            d_bias[part] = by_entry * mean
        if needs.scale:
            d_scale[part] = by_scale * mean
        if needs.hidden:
            add_product(d_kept, d_logits, student.weight[part], workspace // 4)
        if needs.low:
            add_product(d_kept_low, d_logits, student.up[part], workspace // 4)
        for gradient, states in ((d_weight, kept.hidden), (d_up, kept.low)):
            if gradient is not None:
                torch.addmm(gradient[part], d_logits.T, states, beta=0, alpha=mean, out=gradient[part])
        # Before the next chunk is made.
        del d_logits
    d_hidden, d_low = (
        None if sums is None else x.new_zeros(x.shape).index_put_((rows,), sums.to(x.dtype))
        for sums, x in ((d_kept, student.hidden), (d_kept_low, student.low))
    )
    return loss, Operands(d_hidden, d_weight, d_bias, d_low, d_up, d_scale)


def _in_use(operands, rows):
    """Of the tokens ``rows`` alone."""
    if rows.numel() == operands.hidden.shape[0]:
        return operands
    return operands._replace(hidden=operands.hidden[rows], low=None if operands.low is None else operands.low[rows])


torch.library.define(
    "torchtune_lce::chunked_divergence_backward",
    f"(Tensor d_total, Tensor count, {_GRADIENTS}, int workspace_mib) -> ({_GRADIENTS})",
)


@torch.library.impl("torchtune_lce::chunked_divergence_backward", "default")
@without_autocast
def _backward(d_total, count, *gradients_and_workspace):
    """What the forward found times the upstream gradient; new tensors, since a graph may be kept and run again."""
    *gradients, workspace_mib = gradients_and_workspace
    by_token, by_mean = d_total.reshape(1), (d_total * count).reshape(1)
    factors = Operands(by_token, by_mean, by_mean, low=by_token, up=by_mean, scale=by_mean)
    return tuple(
        _scaled(gradient, factor, workspace_mib * 2**20) for gradient, factor in zip(gradients, factors, strict=True)
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
def _(d_total, count, *gradients_and_workspace):
    return tuple(map(torch.empty_like, gradients_and_workspace[:-1]))


def _setup_context(ctx, inputs, output) -> None:
    # The gradients are outputs too, for which zeros would be made.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    *_, ctx.workspace_mib, _, ctx.needs = inputs


def _differentiate(ctx, d_total, *_):
    gradients = torch.ops.torchtune_lce.chunked_divergence_backward(d_total, *ctx.saved_tensors, ctx.workspace_mib)
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True))
    return *needed, *[None] * (len(Operands._fields) + 7)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("this impl has no second derivative (create_graph=True); set impl='reference'")


torch.library.register_autograd("torchtune_lce::chunked_divergence", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::chunked_divergence_backward", _refuse_second_derivative)
