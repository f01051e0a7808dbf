"""Rows whose sums pass any bound are done again, measured from their largest logit.

A row comes here if its target's logit is far below the others, by 66 and more once scaled, and the sample that
reference_logits.py looks at did not show it; if its logits are as large as a mask's; or if infinities made a difference
that is no number. Both kernels are always launched, since the host does not know, and leave at once where nothing is to
do. A program makes the logits again for each chunk of features that it sums: simple, and slow where many rows need it.
"""

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Held, Piece
from torchtune_lce.kernels.primitives import rounded_to_tf32, softcap_slope, softcapped, times_log2
from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# Below it neither the sums of weight rows times E nor the inverse of a row's sum leaves float32.
OVERFLOWS = tl.constexpr(2.0**96)
# Past it a reference as an exponent of 2 is rounded by more than exponentials can make up for.
HUGE = tl.constexpr(2.0**26)
# Most shares of the vocabulary that a row's maximum is looked for in.
MOST_SHARES = 32


@triton.jit
def overflown(row_sum, target, reference, log2_scale):
    """Written so that a NaN is; but where the target's logit is one, so is the loss, whatever is done."""
    return (((row_sum < OVERFLOWS) & (tl.abs(reference * log2_scale) < HUGE)) == 0) & (target == target)


@triton.jit
def _done_again(targets, references, row_sums, place, present, log2_scale):
    target = tl.load(targets + place, mask=present, other=0.0)
    reference = tl.load(references + place, mask=present, other=0.0)
    return present & overflown(tl.load(row_sums + place, mask=present, other=0.0), target, reference, log2_scale)


@triton.jit
def _logit_tile(
    states,
    weight,
    bias,
    place,
    present,
    entries,
    entries_total,
    features,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of places by entries, in the steps over D of the other kernels; -inf past the vocabulary."""
    depth = tl.arange(0, BLOCK_D)
    exists = entries < entries_total
    state_rows = states + place.to(tl.int64)[:, None] * features
    weight_rows = weight + entries.to(tl.int64)[None, :] * weight_stride
    logits = tl.zeros((TOKENS, ENTRIES), tl.float32)
    for start in range(0, features, BLOCK_D):
        d = start + depth
        a = tl.load(state_rows + d[None, :], mask=present[:, None] & (d < features)[None, :], other=0.0)
        b = tl.load(weight_rows + d[:, None], mask=exists[None, :] & (d < features)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + entries, mask=exists, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = softcapped(logits, softcap)
    return tl.where(exists[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["first_place", "tokens", "shares"])
def _maximum_kernel(
    states,
    weight,
    bias,
    targets,
    references,
    row_sums,
    maxima,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    softcap,
    log2_scale,
    shares,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """maxima[share, place]: the largest logit of overflown rows in a share of the vocabulary's tiles."""
    share = tl.program_id(1)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = place < tl.minimum(tl.load(count) - first_place, tokens)
    again = _done_again(targets, references, row_sums, place, present, log2_scale)
    tiles = tl.where(tl.max(again.to(tl.int32), 0) > 0, tl.cdiv(entries_total, ENTRIES), 0)
    largest = tl.full((TOKENS,), float("-inf"), tl.float32)
    for tile in range(share, tiles, shares):
        logits = _logit_tile(
            states,
            weight,
            bias,
            place,
            present,
            tile * ENTRIES + tl.arange(0, ENTRIES),
            entries_total,
            features,
            weight_stride,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            TOKENS,
            ENTRIES,
            BLOCK_D,
            PRECISION,
        )
        largest = tl.maximum(largest, tl.max(logits, 1))
    tl.store(maxima + share.to(tl.int64) * tokens + place, largest, mask=again)


@triton.jit
def _store_held(held: Held, powers, entries, place, stored):
    own = held.strip + (entries - held.first).to(tl.int64)[None, :] * held.stride + place[:, None]
    mask = stored[:, None] & ((entries >= held.first) & (entries < held.end))[None, :]
    tl.store(own, powers.to(held.strip.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_place", "tokens", "shares"])
def _redo_kernel(
    states,
    weight,
    bias,
    labels,
    targets,
    references,
    row_sums,
    maxima,
    redone,
    totals,
    held: Held,
    in_gradient: Held,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    softcap,
    log2_scale,
    shares,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_EXPONENTS: tl.constexpr,
    FOR_TF32: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCT_PRECISION: tl.constexpr,
):
    """Of overflown rows: redone[0] their largest logits, redone[1] their sums from those on, a chunk of totals, and
    what is held of them, in either memory, unless that is None.

    WITH_EXPONENTS redone[2] too, the sums of E times its exponent of 2.
    """
    chunk = tl.program_id(1)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = place < tl.minimum(tl.load(count) - first_place, tokens)
    again = _done_again(targets, references, row_sums, place, present, log2_scale)
    first_chunk = again & (place < tl.where(chunk == 0, tokens, 0))
    any_rows = tl.max(again.to(tl.int32), 0) > 0
    largest = tl.full((TOKENS,), float("-inf"), tl.float32)
    for share in range(0, tl.where(any_rows, shares, 0)):
        part = tl.load(maxima + share * tokens.to(tl.int64) + place, mask=again, other=0.0)
        largest = tl.maximum(largest, part)
    label = tl.load(labels + place, mask=present, other=0).to(tl.int32)
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    sum_again = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    total = tl.zeros((TOKENS, FEATURES), tl.float32)
    for tile in range(0, tl.where(any_rows, tl.cdiv(entries_total, ENTRIES), 0)):
        entries = tile * ENTRIES + tl.arange(0, ENTRIES)
        logits = _logit_tile(
            states,
            weight,
            bias,
            place,
            present,
            entries,
            entries_total,
            features,
            weight_stride,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            TOKENS,
            ENTRIES,
            BLOCK_D,
            PRECISION,
        )
        # The difference first: the least finite number as an exponent of 2 is -inf.
        powers = tl.exp2((logits - largest[:, None]) * log2_scale)
        left_out = (entries[None, :] == label[:, None]) | (entries >= entries_total)[None, :]
        powers = tl.where(left_out, 0.0, powers)
        sum_again += tl.sum(powers, 1)
        if WITH_EXPONENTS:
            weighted += tl.sum(times_log2(powers), 1)
        if HAS_SOFTCAP:
            # Past the vocabulary a logit is -inf.
            powers = tl.where(left_out, 0.0, powers * softcap_slope(logits, softcap))
        if FOR_TF32:
            powers = rounded_to_tf32(powers)
        if held is not None:
            _store_held(held, powers, entries, place, first_chunk)
        if in_gradient is not None:
            _store_held(in_gradient, powers, entries, place, first_chunk)
        at = weight + entries.to(tl.int64)[:, None] * weight_stride + d[None, :]
        w = tl.load(at, mask=(entries < entries_total)[:, None] & (d < features)[None, :], other=0.0)
        # To the dtype of a strip: bfloat16 for bfloat16, float32 for the others.
        if w.dtype == tl.bfloat16:
            total = tl.dot(powers.to(tl.bfloat16), w, total)
        else:
            total = tl.dot(powers, w.to(tl.float32), total, input_precision=PRODUCT_PRECISION)
    of_totals = totals + place.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(of_totals, total, mask=again[:, None] & (d < features)[None, :])
    tl.store(redone + place, largest, mask=first_chunk)
    tl.store(redone + tokens + place, sum_again, mask=first_chunk)
    if WITH_EXPONENTS:
        tl.store(redone + 2 * tokens.to(tl.int64) + place, weighted, mask=first_chunk)


def redo_overflown(
    piece: Piece,
    row_sums: Tensor,  # [M] float32: what says which rows
    maxima: Tensor,  # float32, a workspace: of M each, as many as there is room for, up to MOST_SHARES
    redone: Tensor,  # [2 or 3, M] float32: filled with references and sums of those rows, see _redo_kernel
    totals: Tensor,  # [M, D] float32: filled at those rows
    held: Held | None,  # filled at those places
    in_gradient: Held | None,  # likewise
    product_precision: str,
    config: Config,
) -> None:
    """Two launches; read nothing back to the host."""
    operands, states = piece.operands, piece.states
    weight = operands.weight
    tokens, features = states.shape
    row_blocks = ceil_div(tokens, config.sample)
    shares = min(MOST_SHARES, maxima.numel() // tokens, ceil_div(programs(states.device), row_blocks))
    logits = {
        "HAS_BIAS": operands.bias is not None,
        "HAS_SOFTCAP": operands.softcap is not None,
        "TOKENS": config.sample,
        "ENTRIES": config.sample,
        "BLOCK_D": config.block_d,
        "PRECISION": config.precision,
        "num_warps": 4,
        "num_stages": config.forward_stages,
    }
    sizes = (piece.count, piece.first, tokens, weight.shape[0], features, weight.stride(0))
    scales = (operands.softcap or 1.0, operands.log2_scale)
    launch(
        _maximum_kernel,
        (row_blocks, shares),
        (
            states,
            weight,
            operands.bias,
            piece.targets,
            piece.references,
            row_sums,
            maxima,
            *sizes,
            *scales,
            shares,
        ),
        **logits,
    )
    launch(
        _redo_kernel,
        (row_blocks, ceil_div(features, config.entry_tile)),
        (
            states,
            weight,
            operands.bias,
            piece.labels,
            piece.targets,
            piece.references,
            row_sums,
            maxima,
            redone,
            totals,
            held,
            in_gradient,
            *sizes,
            *scales,
            shares,
        ),
        WITH_EXPONENTS=redone.shape[0] > 2,
        FOR_TF32=product_precision == "tf32" and states.element_size() == 2,
        FEATURES=config.entry_tile,
        PRODUCT_PRECISION=product_precision,
        **logits,
    )
