"""Device functions of the backward: a strip's logit gradients, and what of each gradient a program sums at once."""

import triton
import triton.language as tl

from torchtune_lce.kernels.primitives import (
    LOG2_E,
    add_low_rank,
    load_halves,
    softcapped,
    store_halves,
    tile_coordinates,
)


@triton.jit
def logit_gradient_pair(
    hidden,
    hidden_rows,
    weight,
    weight_rows,
    bias,
    scales,
    low,
    up,
    rows,
    labels,
    row_total,
    d_nll,
    d_lse,
    entries,
    ids,
    pairs,
    gradients,
    masses,
    scale_sums,
    pair,
    first_pair,
    first_column,
    end_column,
    first_slot,
    first_id,
    places_total,
    row_blocks_total,
    tokens_total,
    entries_total,
    features,
    rank,
    hidden_stride,
    weight_stride,
    low_stride,
    up_stride,
    softcap,
    log2_scale,
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DENSE: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(softmax * (d_nll + d_lse) - onehot * d_nll) * softcap' * scale, rounded to the input dtype only after the
    difference. Unless None also sums over the tile's tokens, of what is scaled times the gradient by its scaled value.

    WIDTH entries: one tile, or two of the same row block next to each other.
    """
    in_pair = tl.arange(0, WIDTH)
    in_tile = in_pair % TILE
    width = TILE
    if DENSE:
        # Every tile is kept, in the order of the vocabulary: which one this is needs no list. A few row blocks go
        # over the strip together, so that what they read stays in the L2 cache.
        row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
        SIDE: tl.constexpr = WIDTH // TILE
        row_block, pair_column = tile_coordinates(
            pair - first_pair, row_blocks, tl.cdiv(end_column - first_column, SIDE), GROUP
        )
        left_column = first_column + pair_column * SIDE
        left_slot = first_slot + pair_column * SIDE * row_blocks + row_block
        right_slot = left_slot + row_blocks
        column = left_column + in_pair // TILE
        slot = left_slot + in_pair // TILE * row_blocks
        width = tl.minimum(end_column - left_column, SIDE) * TILE
    else:
        left = tl.load(pairs + pair)
        row_block = left % row_blocks_total
        left_column = left // row_blocks_total
        column = left_column
        left_slot = tl.load(ids + left) - first_id
        slot = left_slot
        right_slot = left_slot
        if WIDTH > TILE:
            right = tl.load(pairs + places_total + pair)
            width = tl.where(right >= 0, WIDTH, TILE)
            right = tl.maximum(right, 0)
            right_slot = tl.load(ids + right) - first_id
            column = tl.where(in_pair < TILE, left_column, right // row_blocks_total)
            slot = tl.where(in_pair < TILE, left_slot, right_slot)
    place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    used = place < tokens_total
    # Entries past the vocabulary read its last one; their softmax is zero too.
    any_entry = column * TILE + in_tile
    if not DENSE:
        any_entry = tl.load(entries + any_entry)
    entry = tl.minimum(any_entry, entries_total - 1)
    depth = tl.arange(0, BLOCK_D)
    if not HIDDEN_TMA:
        # Places past the end read a token in use; their softmax is zero below.
        token = tl.load(rows + tl.minimum(place, tokens_total - 1))
        hidden_at = hidden + token[:, None] * hidden_stride + depth[None, :]
    if not WEIGHT_TMA:
        weight_at = weight + entry.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    logits = tl.zeros((ROW_BLOCK, WIDTH), tl.float32)
    if HAS_LOW_RANK:
        low_rows = tl.load(rows + tl.minimum(place, tokens_total - 1))
        logits = add_low_rank(
            logits,
            low,
            low_rows,
            used,
            up,
            entry,
            any_entry < entries_total,
            rank,
            low_stride,
            up_stride,
            PRECISION,
        )
    for start in range(0, features, BLOCK_D):
        if HIDDEN_TMA:
            a = hidden_rows.load([row_block * ROW_BLOCK, start])
        elif EVEN_D:
            a = tl.load(hidden_at + start)
        else:
            a = tl.load(hidden_at + start, mask=(start + depth < features)[None, :], other=0.0)
        if WEIGHT_TMA:
            b = weight_rows.load([left_column * TILE, start]).T
        elif EVEN_D:
            b = tl.load(weight_at + start)
        else:
            b = tl.load(weight_at + start, mask=(start + depth < features)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + entry).to(tl.float32)[None, :]
    unscaled = logits
    if HAS_SCALE:
        scale = tl.load(scales + entry)
        logits *= scale[None, :]
    if HAS_SOFTCAP:
        logits = softcapped(logits, softcap)
    upstream = tl.load(d_nll + place, mask=used, other=0.0)
    upstream_softmax = upstream
    if HAS_D_LSE:
        upstream_softmax += tl.load(d_lse + place, mask=used, other=0.0)
    peak = tl.load(row_total + 2 * place, mask=used, other=float("inf"))
    log_sum = tl.load(row_total + 2 * place + 1, mask=used, other=0.0) * LOG2_E
    softmax = tl.exp2((logits - peak[:, None]) * log2_scale - log_sum[:, None])
    softmax = tl.where((any_entry < entries_total)[None, :], softmax, 0.0)
    if HAS_TAIL:
        tile = tl.arange(0, WIDTH // TILE)
        tile_slot = tl.where(tile == 0, left_slot, right_slot)
        mass = tl.sum(tl.reshape(softmax, (ROW_BLOCK, WIDTH // TILE, TILE)), 2)
        at = masses + tile_slot.to(tl.int64)[None, :] * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
        tl.store(at, mass, mask=(tile * TILE < width)[None, :])
    is_target = tl.load(labels + place, mask=used, other=-1).to(tl.int32)[:, None] == any_entry[None, :]
    gradient = softmax * upstream_softmax[:, None] - tl.where(is_target, upstream[:, None], 0.0)
    if HAS_SOFTCAP:
        gradient *= 1 - (logits / softcap) * (logits / softcap)
    if HAS_SCALE:
        if scale_sums is not None:
            # Past the tokens in use there is no gradient, though what is scaled may be anything.
            by_scale = tl.sum(tl.where(used[:, None], gradient * unscaled, 0.0), 0)
            tl.store(scale_sums + slot.to(tl.int64) * TILE + in_tile, by_scale, mask=in_pair < width)
        gradient *= scale[None, :]
    out = gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile
    out = out[None, :] + tl.arange(0, ROW_BLOCK)[:, None] * TILE
    tl.store(out, gradient.to(gradients.dtype.element_ty), mask=(in_pair < width)[None, :])


@triton.jit
def weight_gradient_tile(
    hidden,
    hidden_columns,
    rows,
    entries,
    others,
    slots,
    length,
    gradients,
    gradient_rows,
    d_weight,
    column,
    chunk,
    first_id,
    row_blocks,
    tokens_total,
    entries_total,
    features,
    hidden_stride,
    HIDDEN_TMA: tl.constexpr,
    GRADIENT_TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_weight[entries of the column, chunk of features] = sum over the column's kept tiles of gradient^T @ hidden.

    STAGES of the loop's pipeline: None for the launch's own, and ADAPTER_STAGES for an adapter's matrix.
    """
    STEPS: tl.constexpr = ROW_BLOCK // BLOCK_K
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    within = tl.arange(0, BLOCK_K)
    others += column.to(tl.int64) * row_blocks
    slots += column.to(tl.int64) * row_blocks
    total = tl.zeros((TILE, FEATURES), tl.float32)
    steps = tl.load(length + column) * STEPS
    # Where a step's operands lie is read one step ahead: loads through an index of the same step cannot be pipelined.
    first_place = tl.load(others, mask=steps > 0, other=0) * ROW_BLOCK
    slot = tl.load(slots, mask=steps > 0, other=first_id) - first_id
    token = tl.load(rows + tl.minimum(first_place + within, tokens_total - 1), mask=within < steps * BLOCK_K, other=0)
    for step in tl.range(0, steps, num_stages=STAGES):
        token_in_tile = step % STEPS * BLOCK_K + within
        if GRADIENT_TMA:
            gradient = gradient_rows.load([slot * ROW_BLOCK + step % STEPS * BLOCK_K, 0])
        else:
            at = slot.to(tl.int64) * (ROW_BLOCK * TILE) + token_in_tile[:, None] * TILE
            gradient = tl.load(gradients + at + tl.arange(0, TILE)[None, :])
        # Places past the end read a token in use: their gradients are zero.
        if HIDDEN_TMA:
            h = hidden_columns.load([first_place, chunk * FEATURES])
        elif EVEN_D:
            h = tl.load(hidden + token[:, None] * hidden_stride + d[None, :])
        else:
            h = tl.load(hidden + token[:, None] * hidden_stride + d[None, :], mask=(d < features)[None, :], other=0.0)
        total = tl.dot(tl.trans(gradient), h, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        first_place = tl.load(others + ahead // STEPS) * ROW_BLOCK + ahead % STEPS * BLOCK_K
        slot = tl.load(slots + ahead // STEPS) - first_id
        if not HIDDEN_TMA:
            token = tl.load(rows + tl.minimum(first_place + within, tokens_total - 1))
    entry = tl.load(entries + column * TILE + tl.arange(0, TILE))
    tl.store(
        d_weight + entry.to(tl.int64)[:, None] * features + d[None, :],
        total.to(d_weight.dtype.element_ty),
        mask=(entry < entries_total)[:, None] & (d < features)[None, :],
    )


@triton.jit
def bias_gradient_tile(
    entries,
    slots,
    length,
    gradients,
    d_bias,
    column,
    first_id,
    row_blocks,
    entries_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """d_bias[entries of the column] = sum of the column's kept tiles over their tokens.

    Not in the loop of the weight's gradient: where a tile is summed and multiplied, Triton 3.6 gives its copies one
    buffer too few for a product still in flight.
    """
    within = tl.arange(0, TILE)
    slots += column.to(tl.int64) * row_blocks
    total = tl.zeros((TILE,), tl.float32)
    for index in range(0, tl.load(length + column)):
        slot = tl.load(slots + index) - first_id
        tile = gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE)
        gradient = tl.load(tile + tl.arange(0, ROW_BLOCK)[:, None] * TILE + within[None, :])
        total += tl.sum(gradient.to(tl.float32), 0)
    entry = tl.load(entries + column * TILE + within)
    tl.store(d_bias + entry, total.to(d_bias.dtype.element_ty), mask=entry < entries_total)


@triton.jit
def scale_gradient_tile(
    entries,
    slots,
    length,
    scale_sums,
    d_scale,
    column,
    first_id,
    row_blocks,
    entries_total,
    TILE: tl.constexpr,
):
    """d_scale[entries of the column] = sum of the column's kept tiles."""
    within = tl.arange(0, TILE)
    slots += column.to(tl.int64) * row_blocks
    total = tl.zeros((TILE,), tl.float32)
    for index in range(0, tl.load(length + column)):
        slot = tl.load(slots + index) - first_id
        total += tl.load(scale_sums + slot.to(tl.int64) * TILE + within)
    entry = tl.load(entries + column * TILE + within)
    tl.store(d_scale + entry, total, mask=entry < entries_total)


@triton.jit
def hidden_gradient_tile(
    weight,
    weight_columns,
    rows,
    entries,
    others,
    slots,
    begin,
    end,
    gradients,
    gradient_columns,
    masses,
    mass_before,
    tail,
    d_nll,
    d_lse,
    d_hidden,
    sums_high,
    sums_low,
    row_block,
    chunk,
    first_id,
    is_first,
    is_last,
    keeps_mass,
    columns,
    tokens_total,
    entries_total,
    features,
    weight_stride,
    HAS_D_LSE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    GRADIENT_TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds gradient @ weight over this strip's tiles of a row block to the running sum, which the last strip rounds.
    STAGES are those of :func:`weight_gradient_tile`.

    An output of 16 bits holds the upper halves of its float32 sums until then; their lower halves are a workspace. With
    HAS_TAIL the last strip adds the mean of what was dropped: `tail` times the softmax mass that no kept tile holds.
    """
    STEPS: tl.constexpr = TILE // BLOCK_K
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    in_tile = tl.arange(0, ROW_BLOCK)
    place = row_block * ROW_BLOCK + in_tile
    used = place < tokens_total
    others += row_block.to(tl.int64) * columns + begin
    slots += row_block.to(tl.int64) * columns + begin
    total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
    if HAS_TAIL:
        missing = tl.zeros((ROW_BLOCK,), tl.float32)
        mass = tl.zeros((ROW_BLOCK,), tl.float32)
        for first in range(0, end - begin, 16):
            index = first + tl.arange(0, 16)
            present = index < end - begin
            slots_here = tl.load(slots + index, mask=present, other=first_id) - first_id
            at = masses + slots_here[:, None].to(tl.int64) * ROW_BLOCK + in_tile[None, :]
            mass += tl.sum(tl.load(at, mask=present[:, None], other=0.0), 0)
        # One item keeps the sum between strips; in the last strip all need it, and nothing writes to it.
        if is_last:
            if is_first == 0:
                mass += tl.load(mass_before + place, mask=used, other=0.0)
            upstream = tl.load(d_nll + place, mask=used, other=0.0)
            if HAS_D_LSE:
                upstream += tl.load(d_lse + place, mask=used, other=0.0)
            missing = upstream * (1 - mass)
        else:
            if keeps_mass:
                if is_first == 0:
                    mass += tl.load(mass_before + place, mask=used, other=0.0)
                tl.store(mass_before + place, mass, mask=used)
        # An outer product by the tensor cores: by hand it would take a register a column.
        dtype: tl.constexpr = gradients.dtype.element_ty
        alone = tl.arange(0, 16) == 0
        left = tl.where(alone[None, :], missing[:, None], 0.0).to(dtype)
        right = tl.where(alone[:, None], tl.load(tail + d, mask=d < features, other=0.0)[None, :], 0.0).to(dtype)
        # Exact in float32 too: it is one step alone.
        total = tl.dot(left, right, total, input_precision="ieee")
    steps = (end - begin) * STEPS
    # One step ahead, as in the weight's gradient.
    column = tl.load(others, mask=steps > 0, other=0)
    first_entry = column * TILE
    entry = tl.load(entries + first_entry + tl.arange(0, BLOCK_K))
    slot = tl.load(slots, mask=steps > 0, other=first_id) - first_id
    for step in tl.range(0, steps, num_stages=STAGES):
        entry_in_tile = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        if GRADIENT_TMA:
            gradient = gradient_columns.load([slot * ROW_BLOCK, step % STEPS * BLOCK_K])
        else:
            at = slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile[:, None] * TILE
            gradient = tl.load(gradients + at + entry_in_tile[None, :])
        if WEIGHT_TMA:
            w = weight_columns.load([first_entry, chunk * FEATURES])
        else:
            inside = (entry < entries_total)[:, None]
            if not EVEN_D:
                inside = inside & (d < features)[None, :]
            w = tl.load(weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :], mask=inside, other=0.0)
        total = tl.dot(gradient, w, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        first_entry = tl.load(others + ahead // STEPS) * TILE + ahead % STEPS * BLOCK_K
        slot = tl.load(slots + ahead // STEPS) - first_id
        if not WEIGHT_TMA:
            entry = tl.load(entries + first_entry + tl.arange(0, BLOCK_K))
    mask = used[:, None] & (d < features)[None, :]
    token = tl.load(rows + place, mask=used, other=0)
    out = token[:, None] * features + d[None, :]
    if d_hidden.dtype.element_ty == tl.float32:
        if is_first == 0:
            total += tl.load(d_hidden + out, mask=mask, other=0.0)
        tl.store(d_hidden + out, total, mask=mask)
    else:
        low = sums_low + place.to(tl.int64)[:, None] * features + d[None, :]
        if is_first == 0:
            total += load_halves(sums_high + out, low, mask)
        if is_last == 0:
            store_halves(sums_high + out, low, total, mask)
        else:
            tl.store(d_hidden + out, total.to(d_hidden.dtype.element_ty), mask=mask)
