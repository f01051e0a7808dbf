"""The ``cce`` implementations: tiles, forward and back, as two custom operators, or those of strip_operators.py.

Operators, so that torch.compile sees one opaque node each way and CUDA graphs can hold them: nothing in here reads a
tensor's values on the host.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.filtering import Filtering, open_record
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.kernels import strip_operators  # defines the operators of the walk over strips
from torchtune_lce.kernels.backward import output_tiles, run_backward
from torchtune_lce.kernels.descriptors import has_blocks
from torchtune_lce.kernels.division import pieces_of
from torchtune_lce.kernels.forward import MOST_TILES, Activity, lse_and_target_logit
from torchtune_lce.kernels.mean_gradients import add_mean_gradients
from torchtune_lce.kernels.operands import Gradients, Operands, Places, Tail, scaled_upstream, used_in
from torchtune_lce.kernels.operators import operator, refuse_second_derivative, rows_contiguous
from torchtune_lce.kernels.places import compact, in_order
from torchtune_lce.kernels.plan import make_plan
from torchtune_lce.kernels.row_losses import row_losses
from torchtune_lce.kernels.tail import tail_bytes, tail_direction
from torchtune_lce.kernels.tuning import Config, ceil_div, config_for


def token_losses(filtering: Filtering) -> Callable:
    """The preset's function."""

    def run(call: Call) -> Losses:
        hidden, weight, bias, low, up, scale = call.operands
        options = call.options
        if low is not None:
            # Under autocast the adapter's second matrix comes in its own dtype.
            low, up = low.to(hidden.dtype), up.to(hidden.dtype)
        # Here, so that what has to be copied is copied once for both operators.
        hidden, weight, low, up = map(rows_contiguous, (hidden, weight, low, up))
        needs_hidden, needs_weight = (
            any(x is not None and x.requires_grad for x in operands)
            for operands in ((hidden, low), (weight, bias, up, scale))
        )
        eps = options.resolved_filter_eps(hidden.dtype, needs_weight)
        filters = filtering.hidden and needs_hidden or filtering.weight and needs_weight
        records = bool(eps) and filters and torch.is_grad_enabled()
        with_mean = bool(options.label_smoothing) and not call.means_by_product
        # The forward has the gradient of hidden states.
        if low is None and needs_hidden and torch.is_grad_enabled() and not (needs_weight and records):
            return strip_operators.token_losses(
                hidden,
                weight,
                bias,
                call.labels,
                eps if records else None,
                needs_weight,
                call.with_entropy,
                with_mean,
                options,
            )
        # A gradient that nobody wants must not make the others keep more.
        filter_hidden, filter_weight = filtering.hidden or not needs_hidden, filtering.weight or not needs_weight
        nll, peak, log_total, entropies, means, *_, divisor = _cut_cross_entropy(
            hidden,
            weight,
            bias,
            low,
            up,
            scale,
            call.labels,
            options.ignore_index,
            options.softcap,
            options.logit_scale,
            eps if records else None,
            filter_hidden,
            filter_weight,
            call.with_entropy,
            with_mean,
            options.workspace_mib,
        )
        entropy = entropies.detach() if call.with_entropy else None
        return Losses(nll, peak.detach(), log_total, means if with_mean else None, divisor=divisor, entropy=entropy)

    return run


torch.library.define(
    "torchtune_lce::cut_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, Tensor targets, "
    "int ignore_index, float? softcap, float logit_scale, float? eps, bool filter_hidden, bool filter_weight, "
    "bool with_entropy, bool with_mean, int workspace_mib) "
    "-> (Tensor nll, Tensor peak, Tensor log_total, Tensor entropies, Tensor means, Tensor rows, Tensor labels, "
    "Tensor count, Tensor row_total, Tensor words, Tensor dropped_mass, Tensor divisor)",
)


def _forward(
    hidden,
    weight,
    bias,
    low,
    up,
    scale,
    targets,
    ignore_index,
    softcap,
    logit_scale,
    eps,
    filter_hidden,
    filter_weight,
    with_entropy,
    with_mean,
    workspace_mib,
):
    """nll, peak and log_total as in :class:`torchtune_lce.inputs.losses.Losses`, [N] float32, entropies or [0], and
    means of the logits, measured from the peaks, or [0].

    Then what the backward needs. ``targets`` may hold anything.

    rows [N] int64 lists the tokens in use first, count [1] int32 how many those are, labels and row_total [N, 2] are in
    that order. The latter is peak and log_total, as in :class:`Places`. words and dropped_mass are an
    :class:`Activity`, the first in one row, both empty without eps. Last what a mean divides by.
    """
    operands = _operands(hidden, weight, bias, low, up, scale, softcap, logit_scale)
    config = config_for(hidden.device, hidden.dtype)
    targets = targets.contiguous()
    rows, labels, count, divisor = compact(targets, ignore_index, weight.shape[0])
    tokens = rows.numel()
    activity = None if eps is None else _empty_activity(tokens, weight.shape[0], config, hidden.device)
    row_total = hidden.new_empty((tokens, 2), dtype=torch.float32)
    target_logit = hidden.new_empty(tokens, dtype=torch.float32)
    mean_exponent = torch.empty_like(target_logit) if with_entropy else None
    mean_logit = torch.empty_like(target_logit) if with_mean else None
    workspace = workspace_mib * 2**20 - (activity.words.nbytes if activity else 0)
    for piece in pieces_of(tokens, _forward_bytes(operands, with_entropy + with_mean), workspace, config):
        blocks = slice(piece.start // config.row_block, ceil_div(piece.stop, config.row_block))
        used = used_in(piece, count, tokens)
        lse_and_target_logit(
            _taken(operands, rows[piece], used),
            labels[piece],
            used,
            activity and activity.of(blocks, piece),
            math.log2(eps) if activity else 0.0,
            row_total[piece],
            target_logit[piece],
            mean_exponent[piece] if with_entropy else None,
            mean_logit[piece] if with_mean else None,
        )
    vocabulary, logit_scale = weight.shape[0], operands.logit_scale
    results = row_losses(
        row_total, target_logit, mean_exponent, mean_logit, rows, targets, count, vocabulary, logit_scale
    )
    if activity is None:
        nothing = [hidden.new_empty(0, dtype=dtype) for dtype in (torch.int32, torch.float32)]
        return *results, rows, labels, count, row_total, *nothing, divisor
    return *results, rows, labels, count, row_total, activity.words.view(-1), activity.dropped_mass, divisor


@torch.library.register_fake("torchtune_lce::cut_cross_entropy")
def _(*arguments):
    hidden, weight, _, _, _, _, targets, _, _, _, eps, _, _, with_entropy, with_mean, _ = arguments

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    tokens = targets.shape[0]
    config = config_for(hidden.device, hidden.dtype)
    row_blocks, words = _activity_shape(tokens, weight.shape[0], config) if eps is not None else (0, 0)
    return (
        *(empty(tokens) for _ in range(3)),
        empty(tokens if with_entropy else 0),
        empty(tokens if with_mean else 0),
        empty(tokens, dtype=torch.int64),
        torch.empty_like(targets),
        empty(1, dtype=torch.int32),
        empty(tokens, 2),
        # One row: with an axis of row blocks a compiler would compile anew where there is only one.
        empty(row_blocks * words, dtype=torch.int32),
        empty(tokens if eps is not None else 0),
        empty(dtype=torch.int32),
    )


torch.library.define(
    "torchtune_lce::cut_cross_entropy_backward",
    "(Tensor? d_nll, Tensor? d_lse, Tensor? d_means, Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, "
    "Tensor? up, Tensor? scale, Tensor rows, Tensor labels, Tensor count, Tensor row_total, Tensor words, "
    "float? softcap, float logit_scale, bool filter_hidden, bool filter_weight, bool[] needs, int workspace_mib) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_low, Tensor d_up, Tensor d_scale, Tensor tiles)",
)


def _backward(
    d_nll,
    d_lse,
    d_means,
    hidden,
    weight,
    bias,
    low,
    up,
    scale,
    rows,
    labels,
    count,
    row_total,
    words,
    softcap,
    logit_scale,
    filter_hidden,
    filter_weight,
    needs,
    workspace_mib,
):
    """Gradients by hidden, weight, bias, low, up and scale, empty where ``needs`` has no True.

    And [kept tiles, all tiles] int64, of all launches.
    """
    operands = _operands(hidden, weight, bias, low, up, scale, softcap, logit_scale)
    config = config_for(hidden.device, hidden.dtype)
    recorded = None
    if words.numel():
        words = words.view(_activity_shape(rows.numel(), weight.shape[0], config))
        recorded = Activity(words, None, config.forward_entries)
    d_nll, d_lse = scaled_upstream(d_nll, logit_scale), scaled_upstream(d_lse, logit_scale)
    d_nll = row_total.new_zeros(rows.shape) if d_nll is None else d_nll[rows]
    d_lse = None if d_lse is None else d_lse[rows]
    places = Places(rows, labels, count, row_total, d_nll, d_lse)
    need_hidden, need_weight, need_bias, need_low, need_up, need_scale = needs
    wanted = Gradients(
        hidden.new_zeros(hidden.shape) if need_hidden else None,
        weight.new_empty(weight.shape) if need_weight else None,
        bias.new_empty(bias.shape) if need_bias else None,
        low.new_zeros(low.shape, dtype=torch.float32) if need_low else None,
        up.new_empty(up.shape) if need_up else None,
        scale.new_empty(scale.shape) if need_scale else None,
    )
    tiles = torch.zeros(2, dtype=torch.int64, device=hidden.device)

    def run(piece: slice, gradients: Gradients) -> None:
        wants_tokens, wants_entries = (
            any(gradient is not None for gradient in part) for part in (gradients.by_token(), gradients.by_entry())
        )
        tokens = piece.stop - piece.start
        row_blocks = ceil_div(tokens, config.row_block)
        strip_tiles, copies = _division(operands, gradients, tokens, workspace_mib, config)
        first = piece.start // config.row_block
        here = places.of(piece)
        # Hidden states that are not copied are in order as they are if every token is in use.
        may_be_in_order = not copies and has_blocks(config, operands.hidden, operands.weight)
        plan = make_plan(
            recorded and recorded.of(slice(first, first + row_blocks), piece),
            filter_hidden or not wants_tokens,
            filter_weight or not wants_entries,
            here.count,
            row_blocks,
            weight.shape[0],
            strip_tiles,
            output_tiles(gradients, config),
            hidden.shape[1],
            config,
            tiles,
            places if may_be_in_order else None,
        )
        tail = Tail(None, None)
        if wants_tokens and not plan.is_dense and filter_hidden:
            tail = tail_direction(plan, operands, here, config)
        states = None
        if copies:
            states = in_order(operands.hidden, here.rows, here.count)
        elif may_be_in_order:
            states = operands.hidden[piece]
        run_backward(plan, operands, states, may_be_in_order, here, tail, strip_tiles, gradients, config)

    # The sums of the hidden states' gradient over strips may take half of the workspace; past that it is made by pieces
    # of tokens, in a pass of its own.
    strip_bytes = 4 * _tile_bytes(hidden, wanted, config) // config.row_block
    pieces = pieces_of(rows.numel(), max(2 * _sum_bytes(hidden), strip_bytes), workspace_mib * 2**20, config)
    everything = slice(0, rows.numel())
    if len(pieces) == 1 or not need_hidden and pieces:
        run(everything, wanted)
    elif pieces:
        others = wanted._replace(hidden=None)
        if any(gradient is not None for gradient in others):
            run(everything, others)
        for piece in pieces:
            run(piece, Gradients(wanted.hidden, None, None, None, None, None))
    else:
        for gradient in wanted.by_entry():
            if gradient is not None:
                gradient.zero_()
    if d_means is not None and d_means.numel():
        add_mean_gradients(d_means, operands, rows, count, wanted, workspace_mib * 2**20, config)
    if need_low:
        wanted = wanted._replace(low=wanted.low.to(low.dtype))
    return *(hidden.new_empty(0) if gradient is None else gradient for gradient in wanted), tiles


@torch.library.register_fake("torchtune_lce::cut_cross_entropy_backward")
def _(d_nll, d_lse, d_means, *arguments):
    operands, needs = arguments[:6], arguments[-2]
    hidden = operands[0]
    gradients = (x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(operands, needs, strict=True))
    return *gradients, hidden.new_empty(2, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, low, up, scale, _, _, softcap, logit_scale, _, *filters, _, _, workspace_mib = inputs
    _, _, _, _, _, rows, labels, count, row_total, words, dropped_mass, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, low, up, scale, rows, labels, count, row_total, words)
    ctx.settings = softcap, logit_scale, *filters, workspace_mib
    ctx.record = open_record(rows)
    if ctx.record and words.numel():
        ctx.record.dropped_mass[rows] = dropped_mass


def _differentiate(ctx, d_nll, _, d_lse, __, d_means, *___):
    *settings, workspace_mib = ctx.settings
    needs = list(ctx.needs_input_grad[:6])
    *gradients, tiles = _cut_cross_entropy_backward(
        d_nll, d_lse, d_means, *ctx.saved_tensors, *settings, needs, workspace_mib
    )
    if ctx.record:
        ctx.record.tiles = tiles
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 10


_cut_cross_entropy = operator("cut_cross_entropy", _forward, _differentiate, _setup_context)
_cut_cross_entropy_backward = operator("cut_cross_entropy_backward", _backward, refuse_second_derivative)


def _operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    scale: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Operands:
    hidden, weight, low, up = map(rows_contiguous, (hidden, weight, low, up))
    # Of a number of another type kernels would be compiled anew.
    softcap = softcap if softcap is None else float(softcap)
    bias = bias if bias is None else bias.contiguous()
    scale = scale if scale is None else scale.contiguous()
    return Operands(hidden, weight, bias, low, up, softcap, float(logit_scale), scale)


def _taken(operands: Operands, rows: Tensor, used: Tensor) -> Operands:
    """The same with what belongs to tokens in the order of ``rows``."""
    hidden, low = (x if x is None else in_order(x, rows, used) for x in (operands.hidden, operands.low))
    return replace(operands, hidden=hidden, low=low)


def _activity_shape(tokens: int, vocabulary: int, config: Config) -> tuple[int, int]:
    """Row blocks, and words of a row block."""
    words = ceil_div(vocabulary, config.forward_entries) * config.forward_entries // 32
    return ceil_div(tokens, config.row_block), words


def _empty_activity(tokens: int, vocabulary: int, config: Config, device: torch.device) -> Activity:
    row_blocks, words = _activity_shape(tokens, vocabulary, config)
    return Activity(
        torch.empty((row_blocks, words), dtype=torch.int32, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device),
        config.forward_entries,
    )


def _forward_bytes(operands: Operands, more_sums: int = 0) -> int:
    """Workspace that a token takes in the forward, beside its bits: its states in order, and a phase's statistics."""
    states = (x for x in (operands.hidden, operands.low) if x is not None)
    return sum(x.shape[1] * x.element_size() for x in states) + (3 + more_sums) * 4 * (MOST_TILES + 1)


def _sum_bytes(hidden: Tensor) -> int:
    """Workspace that the sums of a token's gradient take between strips, beside the gradient itself."""
    return 2 * hidden.shape[1] if hidden.element_size() == 2 else 0


def _tile_bytes(hidden: Tensor, wanted: Gradients, config: Config) -> int:
    """A tile's logit gradients, the softmax mass of its tokens, and what its entries' scales get."""
    gradients = config.row_block * (config.entry_tile * hidden.element_size() + 4)
    return gradients + 4 * config.entry_tile * (wanted.scale is not None)


def _division(
    operands: Operands, wanted: Gradients, tokens: int, workspace_mib: int, config: Config
) -> tuple[int, bool]:
    """Tiles of a strip, and whether hidden states are copied in the order of their places, within the workspace.

    Beside these the workspace holds the plan's lists, the sums of the gradient of hidden over strips, and those of the
    tail's mean.
    """
    hidden, weight, low = operands.hidden, operands.weight, operands.low
    vocabulary, features = weight.shape
    row_blocks = ceil_div(tokens, config.row_block)
    columns = ceil_div(vocabulary, config.entry_tile)
    workspace = workspace_mib * 2**20
    # Of an entry its key, which is sorted with where it comes from; of a tile the plan's lists, and the forward's bits.
    left = workspace - 24 * vocabulary - 64 * columns * row_blocks
    if wanted.hidden is not None:
        left -= tokens * _sum_bytes(hidden)
    if wanted.hidden is not None or low is not None:
        left -= tail_bytes(hidden)
    if low is not None:
        # Its gradient in float32, and the tail's mean of it.
        left -= 4 * low.numel() + tail_bytes(low)
    copy = tokens * features * hidden.element_size()
    # The copy's rows lie next to each other, so their length has to suit the copy engine too.
    fits = features * hidden.element_size() % 16 == 0 and left - copy >= workspace // 4
    copies = has_blocks(config, hidden, weight) and fits
    if copies:
        left -= copy
    return min(max(left // _tile_bytes(hidden, wanted, config), 2 * row_blocks), (columns + 1) * row_blocks), copies
