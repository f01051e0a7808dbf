"""The walk over strips as two custom operators: losses, with all that the hidden gradient needs, then that.

The second sees no vocabulary: any upstream gradients, and any number of backwards, cost two passes over [N, D].
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import torch
from torch import Tensor

from torchtune_lce.inputs.filtering import open_record
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.validation import is_readable
from torchtune_lce.kernels.operands import Operands
from torchtune_lce.kernels.operators import operator, refuse_second_derivative, rows_contiguous
from torchtune_lce.kernels.places import compact
from torchtune_lce.kernels.row_gradients import row_gradients
from torchtune_lce.kernels.strips import walk_rows
from torchtune_lce.kernels.tuning import ceil_div, config_for


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, eps: float | None, options: Options
) -> Losses:
    """What the function that :func:`torchtune_lce.kernels.autograd.token_losses` makes returns; eps None: unfiltered.

    With a gradient by hidden alone. What stands for the peak is each row's reference, see reference_logits.py.
    """
    nll, peak, log_total, *_, divisor = _strip_cross_entropy(
        hidden, weight, bias, targets, options.ignore_index, options.softcap, eps, options.workspace_mib
    )
    return Losses(nll, peak.detach(), log_total, divisor=divisor)


torch.library.define(
    "torchtune_lce::strip_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float? softcap, float? eps, "
    "int workspace_mib) -> (Tensor nll, Tensor peak, Tensor log_total, Tensor dropped_mass, Tensor values, "
    "Tensor coefficients, Tensor kept, Tensor rows, Tensor labels, Tensor count, Tensor divisor)",
)


def _forward(hidden, weight, bias, targets, ignore_index, softcap, eps, workspace_mib):
    """A :class:`Walk`; then rows [N] int64, the tokens in use first, labels in that order, count [1] int32, and what a
    mean divides by. ``targets`` may hold anything.
    """
    bias = bias if bias is None else bias.contiguous()
    # Of numbers of another type kernels would be compiled anew.
    softcap, eps = (x if x is None else float(x) for x in (softcap, eps))
    operands = Operands(rows_contiguous(hidden), rows_contiguous(weight), bias, None, None, softcap)
    targets = targets.contiguous()
    rows, labels, count, divisor = compact(targets, ignore_index, weight.shape[0])
    config = config_for(hidden.device, hidden.dtype)
    walk = walk_rows(operands, targets, rows, labels, count, eps, workspace_mib * 2**20, config)
    return *walk, rows, labels, count, divisor


@torch.library.register_fake("torchtune_lce::strip_cross_entropy")
def _(hidden, weight, bias, targets, ignore_index, softcap, eps, workspace_mib):
    tokens = targets.shape[0]
    filters = eps is not None
    row_blocks = ceil_div(tokens, config_for(hidden.device, hidden.dtype).row_block) if filters else 0
    return (
        *(hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3)),
        hidden.new_empty(tokens if filters else 0, dtype=torch.float32),
        hidden.new_empty(hidden.shape),
        hidden.new_empty((2, tokens), dtype=torch.float32),
        hidden.new_empty(row_blocks, dtype=torch.int32),
        hidden.new_empty(tokens, dtype=torch.int64),
        torch.empty_like(targets),
        hidden.new_empty(1, dtype=torch.int32),
        hidden.new_empty((), dtype=torch.int32),
    )


torch.library.define(
    "torchtune_lce::strip_cross_entropy_backward",
    "(Tensor? d_nll, Tensor? d_lse, Tensor weight, Tensor values, Tensor coefficients, Tensor rows, Tensor labels, "
    "Tensor count) -> Tensor d_hidden",
)


def _backward(d_nll, d_lse, weight, values, coefficients, rows, labels, count):
    if d_nll is None:
        d_nll = coefficients.new_zeros(1).expand(rows.numel())
    return row_gradients(values, coefficients, rows_contiguous(weight), rows, labels, count, d_nll, d_lse)


@torch.library.register_fake("torchtune_lce::strip_cross_entropy_backward")
def _(d_nll, d_lse, weight, values, *_):
    return values.new_empty(values.shape)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, *_ = inputs
    _, _, _, dropped_mass, values, coefficients, kept, rows, labels, count, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, values, coefficients, rows, labels, count)
    # A trace has no calls to tell of.
    ctx.record = open_record(rows.numel(), rows.device) if is_readable(rows) else None
    if ctx.record and dropped_mass.numel():
        ctx.record.dropped_mass.copy_(dropped_mass)
    if ctx.record:
        ctx.kept = _kept_and_all(kept, count, hidden, weight)


def _kept_and_all(kept: Tensor, count: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Columns of a row block by an entry, as :class:`FilterRecord` has them."""
    row_block = config_for(hidden.device, hidden.dtype).row_block
    vocabulary = weight.shape[0]
    if kept.numel():
        found = kept.sum(dtype=torch.int64).view(1)
    else:
        found = (count.long() + (row_block - 1)) // row_block * vocabulary
    every = torch.full_like(found, ceil_div(hidden.shape[0], row_block) * vocabulary, dtype=torch.int64)
    return torch.cat([found, every])


def _differentiate(ctx, d_nll, _, d_lse, *__):
    d_hidden = _strip_cross_entropy_backward(d_nll, d_lse, *ctx.saved_tensors)
    if ctx.record:
        ctx.record.tiles = ctx.kept
    return d_hidden, *[None] * 7


_strip_cross_entropy = operator("strip_cross_entropy", _forward, _differentiate, _setup_context)
_strip_cross_entropy_backward = operator("strip_cross_entropy_backward", _backward, refuse_second_derivative)
