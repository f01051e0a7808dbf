"""From a row's sums to its loss and to its gradient by hidden, for any upstream gradients.

With T, S' and u' as in strips.py, g and l the upstream gradients of a row's loss and log-sum-exp, c the softcap's
derivative and t the target:

    dE = (g + l) (u' + T c_t w_t) / (T + S') - g c_t w_t
       = (g + l) (u' - S' c_t w_t) / (T + S') + l c_t w_t

They are equal. For a likely target, T >= S', the terms of the first cancel; for an unlikely one those of the second do
where g is small beside l. So a row keeps what multiplies g + l in the one that suits it, rounded once to the inputs'
dtype, and c_t, whose sign says which.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.active_columns import Dropped
from torchtune_lce.kernels.division import GROUPS
from torchtune_lce.kernels.exponentials import Sums
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Piece, Walk
from torchtune_lce.kernels.overflow import overflown
from torchtune_lce.kernels.primitives import LOG_2, log_one_plus, multiply_add, softcap_slope
from torchtune_lce.kernels.tuning import Config, ceil_div, rows_and_columns

# Sums below it have no inverse in float32; what they are in a gradient is below any number of it.
NEGLIGIBLE = tl.constexpr(2.0**-120)


@triton.jit(do_not_specialize=["first_place", "tokens", "tokens_total", "parts", "blocks_a_group"])
def _finish_kernel(
    totals,
    weight,
    rows,
    labels,
    targets,
    references,
    row_sums,
    row_exponents,
    row_capped,
    redone,
    losses,
    entropies,
    logit_means,
    peaks,
    log_totals,
    dropped_mass,
    values,
    slopes,
    scales,
    dropped,
    means,
    shares,
    count,
    first_place,
    tokens,
    tokens_total,
    features,
    weight_stride,
    parts,
    blocks_a_group,
    softcap,
    logit_scale,
    log2_scale,
    HAS_SOFTCAP: tl.constexpr,
    FILTER: tl.constexpr,
    NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss, reference and log-sum-exp less it at each place's row, and entropies, and the logits' means less the
    reference, unless None; values, slopes and scales, for the gradient, at it; and shares, for gradients by entry,
    unless None.

    The slope is that of the softcap at the target, negative where it belongs to the loss's upstream gradient. With
    NORMALISED the values of a likely target are not scaled by 1 - p, which the scale then is: float16 has no room for
    what a confident token leaves.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tokens
    used = place < tl.minimum(tl.load(count) - first_place, tokens)
    target = tl.load(targets + place, mask=used, other=0.0)
    reference = tl.load(references + place, mask=used, other=0.0)
    others = tl.load(row_sums + place, mask=used, other=0.0)
    again = used & overflown(others, target, reference, log2_scale)
    reference = tl.where(again, tl.load(redone + place, mask=again, other=0.0), reference)
    others = tl.where(again, tl.load(redone + tokens + place, mask=again, other=0.0), others)
    # The reference in base 2 was rounded: so is the target's own exponential, and what should be 1 at the reference.
    offset = reference * -log2_scale
    own = tl.exp2(tl.where(again, (target - reference) * log2_scale, multiply_add(target, log2_scale, offset)))
    rounding = tl.where(again, 0.0, multiply_add(reference, log2_scale, offset))
    unit = tl.exp2(rounding)
    whole = own + others
    is_own = reference == target
    beyond = tl.where(is_own, log_one_plus(others / own), tl.log(whole / unit))
    slope = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_SOFTCAP:
        slope = softcap_slope(target, softcap)
    # A NaN is unlikely nowhere.
    unlikely = others > own

    row = tl.load(rows + place, mask=inside, other=0)
    write = place < tl.where(tl.program_id(1) == 0, tokens, 0)
    loss = tl.where(is_own, beyond, logit_scale * (reference - target) + beyond)
    # Where an infinity is the largest logit, it is the log-sum-exp, unless the target's is a NaN.
    log_total = tl.where((tl.abs(reference) == float("inf")) & (target == target), reference, beyond)
    peak = tl.where(tl.abs(reference) < float("inf"), logit_scale * reference, 0.0)
    tl.store(losses + row, tl.where(used, loss, 0.0), mask=write)
    if entropies is not None:
        weighted = tl.load(row_exponents + place, mask=used, other=0.0)
        weighted = tl.where(again, tl.load(redone + 2 * tokens.to(tl.int64) + place, mask=again, other=0.0), weighted)
        # Of the others all exponents have it.
        weighted -= tl.where(others > 0, others * rounding, 0.0)
        weighted += tl.where(own > 0, own * ((target - reference) * log2_scale), 0.0)
        entropy = beyond - LOG_2 * weighted / whole
        # Measured from an unlikely target both are large.
        tl.store(entropies + row, tl.where(used & ((entropy < 0) == 0), entropy, 0.0), mask=write)
    if logit_means is not None:
        mean = logit_scale * tl.load(row_capped + place, mask=used, other=0.0) - peak
        tl.store(logit_means + row, tl.where(used, mean, 0.0), mask=write)
    tl.store(peaks + row, tl.where(used, peak, 0.0), mask=write)
    tl.store(log_totals + row, tl.where(used, log_total, 0.0), mask=write)
    factor = 1 / whole
    if shares is not None:
        own_at = shares + place
        # Of a row that was done again the difference comes first, see overflow.py.
        tl.store(own_at, tl.where(again, reference, 0.0), mask=write)
        tl.store(own_at + tokens_total, tl.where(again, 0.0, offset), mask=write)
        tl.store(own_at + 2 * tokens_total, factor, mask=write)
        tl.store(own_at + 3 * tokens_total, slope * (own / whole), mask=write)
        tl.store(own_at + 4 * tokens_total, slope * (others / whole), mask=write)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALISED:
        scale = tl.where(unlikely, 1.0, others / whole)
        factor = tl.where(unlikely, factor, tl.where(others < NEGLIGIBLE, 0.0, 1 / others))
        of_target = slope * tl.where(unlikely, own * factor, -1.0)
    else:
        of_target = slope * tl.where(unlikely, own, -others) * factor
    tl.store(slopes + place, tl.where(used, tl.where(unlikely, -slope, slope), 0.0), mask=write)
    tl.store(scales + place, tl.where(used, scale, 0.0), mask=write)

    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    at = place.to(tl.int64)[:, None] * features + d[None, :]
    label = tl.load(labels + place, mask=used, other=0).to(tl.int64)
    w = tl.load(weight + label[:, None] * weight_stride + d[None, :], mask=used[:, None] & exists, other=0.0)
    total = tl.load(totals + at, mask=used[:, None] & exists, other=0.0)
    if FILTER:
        # Rows that were done again have all of it.
        mass = tl.where(again, 0.0, tl.load(dropped + place, mask=used, other=0.0))
        tl.store(dropped_mass + row, tl.where(used, mass / whole, 0.0), mask=write)
        group = tl.program_id(0) * ROWS // ROW_BLOCK // blocks_a_group
        mean = tl.zeros((COLUMNS,), tl.float32)
        for part in range(0, parts):
            mean += tl.load(means + (group + part * GROUPS).to(tl.int64) * features + d, mask=d < features, other=0.0)
        total += mass[:, None] * mean[None, :]
    value = total * factor[:, None] + of_target[:, None] * w.to(tl.float32)
    value = tl.where(used[:, None], value, 0.0)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=inside[:, None] & exists)


@triton.jit(do_not_specialize=["tokens", "d_loss_stride", "d_log_sum_stride"])
def _gradient_kernel(
    values,
    slopes,
    scales,
    weight,
    rows,
    labels,
    count,
    d_losses,
    d_log_sums,
    d_hidden,
    tokens,
    features,
    weight_stride,
    d_loss_stride,
    d_log_sum_stride,
    HAS_D_LSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient at each place's row of hidden, 0 where not in use."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tokens
    used = place < tl.load(count)
    row = tl.load(rows + place, mask=inside, other=0)
    of_loss = tl.load(d_losses + row * d_loss_stride, mask=used, other=0.0)
    both = of_loss
    of_log_sum = tl.zeros((ROWS,), tl.float32)
    if HAS_D_LSE:
        of_log_sum = tl.load(d_log_sums + row * d_log_sum_stride, mask=used, other=0.0)
        both += of_log_sum
    slope = tl.load(slopes + place, mask=used, other=0.0)
    at_target = slope * tl.where(slope < 0, of_loss, of_log_sum)
    scaled = both * tl.load(scales + place, mask=used, other=0.0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    mask = used[:, None] & exists
    value = tl.load(values + place.to(tl.int64)[:, None] * features + d[None, :], mask=mask, other=0.0)
    label = tl.load(labels + place, mask=used, other=0).to(tl.int64)
    # Of likely targets nothing is added where the log-sum-exp has no gradient.
    needed = (at_target != 0)[:, None] & mask
    w = tl.load(weight + label[:, None] * weight_stride + d[None, :], mask=needed, other=0.0)
    gradient = scaled[:, None] * value.to(tl.float32) + at_target[:, None] * w.to(tl.float32)
    out = d_hidden + row[:, None] * features + d[None, :]
    tl.store(out, gradient.to(d_hidden.dtype.element_ty), mask=inside[:, None] & exists)


def finish_rows(
    piece: Piece,
    totals: Tensor,  # [M, D] float32: u'
    row_sums: Sums,  # [M] each
    redone: Tensor,  # [2 or 3, M] float32: see redo_overflown
    left_out: Dropped | None,
    walk: Walk,  # filled at the piece's rows of hidden, and its places
    config: Config,
) -> None:
    """One launch. Values take the place of the piece's states."""
    weight, values = piece.operands.weight, piece.states
    tokens, features = values.shape
    softcap = piece.operands.softcap
    block = rows_and_columns(values.device)
    launch(
        _finish_kernel,
        (ceil_div(tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
        (
            totals,
            weight,
            piece.rows,
            piece.labels,
            piece.targets,
            piece.references,
            *row_sums,
            redone,
            walk.losses,
            None if row_sums.exponents is None else walk.entropies,
            None if row_sums.capped is None else walk.means,
            walk.references,
            walk.log_totals,
            walk.dropped_mass,
            values,
            *walk.coefficients[:, piece.first : piece.first + tokens].unbind(),
            left_out and left_out.mass,
            left_out and left_out.means,
            walk.shares[:, piece.first :] if walk.shares.numel() else None,
            piece.count,
            piece.first,
            tokens,
            walk.losses.numel(),
            features,
            weight.stride(0),
            left_out.means.shape[0] if left_out else 0,
            left_out.sample.blocks_a_group if left_out else 1,
            softcap or 1.0,
            piece.operands.logit_scale,
            piece.operands.log2_scale,
        ),
        HAS_SOFTCAP=softcap is not None,
        FILTER=left_out is not None,
        GROUPS=GROUPS.value,
        ROW_BLOCK=config.row_block,
        NORMALISED=values.dtype == torch.float16,
        **block,
        num_warps=4,
    )


def row_gradients(
    values: Tensor,  # [N, D] of the inputs' dtype
    coefficients: Tensor,  # [2, N] float32
    weight: Tensor,  # [V, D]
    rows: Tensor,  # [N] int64
    labels: Tensor,  # [N]
    count: Tensor,  # [1] int32
    d_losses: Tensor,  # [N] float32, in the order of hidden
    d_log_sums: Tensor | None,  # [N] float32
    d_hidden: Tensor,  # [N, D], filled
) -> None:
    """One launch."""
    tokens, features = values.shape
    block = rows_and_columns(values.device)
    if tokens:
        launch(
            _gradient_kernel,
            (ceil_div(tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
            (
                values,
                *coefficients.unbind(),
                weight,
                rows,
                labels,
                count,
                d_losses,
                d_log_sums,
                d_hidden,
                tokens,
                features,
                weight.stride(0),
                d_losses.stride(0),
                0 if d_log_sums is None else d_log_sums.stride(0),
            ),
            HAS_D_LSE=d_log_sums is not None,
            **block,
            num_warps=4,
        )
