"""The walk over strips as two custom operators: losses, with all that the hidden gradient needs, then the gradients.

The second sees no vocabulary but for a projection that is trained, and for means of capped logits: any upstream
gradients, and any number of backwards, cost a pass over [N, D] for the hidden states.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import torch
from torch import Tensor

from torchtune_lce.inputs.filtering import open_record
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.options import Options
from torchtune_lce.kernels.compiling import Way, way
from torchtune_lce.kernels.division import tiles_in_gradient
from torchtune_lce.kernels.entry_gradients import entry_gradients
from torchtune_lce.kernels.mean_gradients import add_mean_gradients
from torchtune_lce.kernels.operands import Gradients, Operands, scaled_upstream
from torchtune_lce.kernels.operators import (
    graph_is_kept,
    operator,
    refuse_second_derivative,
    rows_contiguous,
    saved_tensors_are_hooked,
    somebody_listens,
)
from torchtune_lce.kernels.places import compact
from torchtune_lce.kernels.row_gradients import row_gradients
from torchtune_lce.kernels.strips import empty_held, holds, strip_in_gradient, strip_in_workspace, walk_rows
from torchtune_lce.kernels.tuning import ceil_div, config_for


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    eps: float | None,
    is_trained: bool,
    with_entropy: bool,
    with_mean: bool,
    options: Options,
) -> Losses:
    """What the function that :func:`torchtune_lce.kernels.autograd.token_losses` makes returns; eps None: unfiltered.

    With gradients by weight and bias only where ``is_trained``, and then unfiltered. What stands for the peak is each
    row's reference, see reference_logits.py.
    """
    gradient_tiles = 0
    if weight.requires_grad and holds(is_trained, eps is not None, with_mean):
        gradient_tiles = _tiles_in_gradient(hidden, weight, 1 + with_entropy, options.workspace_mib)
    nll, peak, log_total, *_, entropies, means, _, _, _, _, _, divisor = _strip_cross_entropy(
        hidden,
        weight,
        bias,
        targets,
        options.ignore_index,
        options.softcap,
        options.logit_scale,
        eps,
        is_trained,
        gradient_tiles,
        with_entropy,
        with_mean,
        options.workspace_mib,
    )
    entropy = entropies.detach() if with_entropy else None
    return Losses(nll, peak.detach(), log_total, means if with_mean else None, divisor=divisor, entropy=entropy)


def _tiles_in_gradient(hidden: Tensor, weight: Tensor, sums_a_tile: int, workspace_mib: int) -> int:
    """0 for tracers: to them the gradient is another operator's result, and cannot be this one's before.

    And where saved tensors are moved or made again: with a gradient's size that costs more than it spares.
    """
    if somebody_listens((hidden, weight)) or saved_tensors_are_hooked() or not hidden.numel():
        return 0
    config = config_for(hidden.device, hidden.dtype)
    workspace = workspace_mib * 2**20
    return tiles_in_gradient(hidden.shape[0], *weight.shape, hidden.dtype, sums_a_tile, workspace, config)


torch.library.define(
    "torchtune_lce::strip_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float? softcap, "
    "float logit_scale, float? eps, bool is_trained, int gradient_tiles, bool with_entropy, bool with_mean, "
    "int workspace_mib) -> (Tensor nll, Tensor peak, Tensor log_total, Tensor dropped_mass, Tensor values, "
    "Tensor coefficients, Tensor kept, Tensor shares, Tensor entropies, Tensor means, Tensor held, "
    "Tensor in_gradient, Tensor rows, Tensor labels, Tensor count, Tensor divisor)",
)


def _forward(
    hidden,
    weight,
    bias,
    targets,
    ignore_index,
    softcap,
    logit_scale,
    eps,
    is_trained,
    gradient_tiles,
    with_entropy,
    with_mean,
    workspace_mib,
):
    """A :class:`Walk`; then rows [N] int64, the tokens in use first, labels in that order, count [1] int32, and what a
    mean divides by. ``targets`` may hold anything.
    """
    eps = eps if eps is None else float(eps)
    operands = _operands(hidden, weight, bias, softcap, logit_scale)
    targets = targets.contiguous()
    rows, labels, count, divisor = compact(targets, ignore_index, weight.shape[0])
    config = config_for(hidden.device, hidden.dtype)
    walk = walk_rows(
        operands,
        targets,
        rows,
        labels,
        count,
        eps,
        is_trained,
        gradient_tiles,
        with_entropy,
        with_mean,
        workspace_mib * 2**20,
        config,
    )
    return *walk, rows, labels, count, divisor


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Operands:
    # Of a number of another type kernels would be compiled anew.
    softcap = softcap if softcap is None else float(softcap)
    bias = bias if bias is None else bias.contiguous()
    return Operands(rows_contiguous(hidden), rows_contiguous(weight), bias, None, None, softcap, float(logit_scale))


@torch.library.register_fake("torchtune_lce::strip_cross_entropy")
def _(hidden, weight, bias, targets, *settings):
    _, _, _, eps, is_trained, gradient_tiles, with_entropy, with_mean, workspace_mib = settings
    tokens = targets.shape[0]
    filters = eps is not None
    config = config_for(hidden.device, hidden.dtype)
    row_blocks = ceil_div(tokens, config.row_block) if filters else 0
    workspace = workspace_mib * 2**20 if holds(is_trained, filters, with_mean) else 0
    return (
        *(hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3)),
        hidden.new_empty(tokens if filters else 0, dtype=torch.float32),
        hidden.new_empty(hidden.shape),
        hidden.new_empty((2, tokens), dtype=torch.float32),
        hidden.new_empty(row_blocks, dtype=torch.int32),
        hidden.new_empty((5, tokens) if is_trained else 0, dtype=torch.float32),
        hidden.new_empty(tokens if with_entropy else 0, dtype=torch.float32),
        hidden.new_empty(tokens if with_mean else 0, dtype=torch.float32),
        *empty_held(hidden, weight.shape[0], gradient_tiles, 1 + with_entropy + with_mean, workspace, config),
        hidden.new_empty(tokens, dtype=torch.int64),
        torch.empty_like(targets),
        hidden.new_empty(1, dtype=torch.int32),
        hidden.new_empty((), dtype=torch.int32),
    )


torch.library.define(
    "torchtune_lce::strip_cross_entropy_backward",
    "(Tensor? d_nll, Tensor? d_lse, Tensor? d_means, Tensor? hidden, Tensor weight, Tensor? bias, Tensor values, "
    "Tensor coefficients, Tensor shares, Tensor held, Tensor in_gradient, Tensor rows, Tensor labels, Tensor count, "
    "float? softcap, float logit_scale, bool[] needs, int gradient_tiles, bool overwrites, int workspace_mib) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


def _backward(
    d_nll,
    d_lse,
    d_means,
    hidden,
    weight,
    bias,
    values,
    coefficients,
    shares,
    held,
    in_gradient,
    rows,
    labels,
    count,
    softcap,
    logit_scale,
    needs,
    gradient_tiles,
    overwrites,
    workspace_mib,
):
    """Gradients by hidden, weight and bias, empty where ``needs`` has no True. Without the latter two, and without
    d_means, hidden may be None. ``overwrites``: the weight's takes the memory of ``in_gradient``.
    """
    if overwrites:
        # From its first launch on: it cannot be left for kernels to be compiled side by side, and begin again.
        way.set(Way.IN_TURN)
    d_nll, d_lse = scaled_upstream(d_nll, logit_scale), scaled_upstream(d_lse, logit_scale)
    if d_nll is None:
        d_nll = coefficients.new_zeros(1).expand(rows.numel())
    weight = rows_contiguous(weight)
    needs_hidden, needs_weight, needs_bias = needs
    workspace = workspace_mib * 2**20 - held.nbytes
    # What is scaled, until it is filled.
    d_hidden = torch.empty_like(values)
    d_weight = in_gradient.detach() if overwrites else weight.new_empty(weight.shape if needs_weight else 0)
    d_bias = weight.new_empty(weight.shape[0] if needs_bias else 0)
    if needs_weight or needs_bias:
        config, tokens = config_for(weight.device, weight.dtype), rows.numel()
        entry_gradients(
            _operands(hidden, weight, bias, softcap, logit_scale),
            rows,
            labels,
            count,
            shares,
            strip_in_workspace(held, tokens, config),
            strip_in_gradient(in_gradient, gradient_tiles, tokens, config),
            d_nll,
            d_lse,
            d_hidden,
            d_weight if needs_weight else None,
            d_bias if needs_bias else None,
            workspace,
            config,
        )
    if needs_hidden:
        row_gradients(values, coefficients, weight, rows, labels, count, d_nll, d_lse, d_hidden)
    if d_means is not None and d_means.numel():
        made = (gradient if need else None for gradient, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        add_mean_gradients(
            d_means,
            _operands(hidden, weight, bias, softcap, logit_scale),
            rows,
            count,
            Gradients(*made, None, None, None),
            workspace,
            config_for(weight.device, weight.dtype),
        )
    return d_hidden if needs_hidden else values.new_empty(0), d_weight, d_bias


@torch.library.register_fake("torchtune_lce::strip_cross_entropy_backward")
def _(d_nll, d_lse, d_means, hidden, weight, bias, values, *rest):
    needs = rest[-4]
    operands = values, weight, weight if bias is None else bias
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(operands, needs, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, _, _, softcap, logit_scale, _, is_trained, gradient_tiles, _, with_mean, workspace_mib = (
        inputs
    )
    _, _, _, dropped_mass, values, coefficients, kept, shares, _, _, *held, rows, labels, count, _ = output
    ctx.set_materialize_grads(False)
    # Who keeps hidden states for nothing keeps memory.
    of_logits = (hidden, weight, bias) if is_trained or with_mean else (None, weight, None)
    ctx.save_for_backward(*of_logits, values, coefficients, shares, *held, rows, labels, count)
    ctx.settings = softcap, logit_scale, gradient_tiles, workspace_mib
    ctx.is_overwritten = False
    ctx.record = open_record(rows)
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


def _differentiate(ctx, d_nll, _, d_lse, *others):
    upstream = d_nll, d_lse, others[6]
    softcap, logit_scale, gradient_tiles, workspace_mib = ctx.settings
    needs, saved = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    if ctx.is_overwritten:
        raise RuntimeError(
            "this backward of impl='cce' or a preset has begun before, without retain_graph=True, and what it needs is "
            "overwritten; compute the loss again"
        )
    # No other backward looks into that memory, and none traces: an operator's result may not be its argument's memory.
    overwrites = ctx.is_overwritten = (
        gradient_tiles > 0 and needs[1] and not graph_is_kept() and not somebody_listens((*upstream, *saved))
    )
    gradients = _strip_cross_entropy_backward(
        *upstream, *saved, softcap, logit_scale, needs, gradient_tiles, overwrites, workspace_mib
    )
    if ctx.record:
        ctx.record.tiles = ctx.kept
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 10


_strip_cross_entropy = operator("strip_cross_entropy", _forward, _differentiate, _setup_context)
_strip_cross_entropy_backward = operator("strip_cross_entropy_backward", _backward, refuse_second_derivative)
