"""Gradients of hidden states, weight, bias and adapter from the kept tiles, in one persistent launch.

The kernel walks the plan's strips. For each it computes the kept tiles' logit gradients into a workspace, waits for all
programs, and multiplies them with the weight and the hidden states: sums run over tiles in a fixed order in registers,
so there are no locks, no atomics on gradients, and the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import (
    LOG2_E,
    add_low_rank,
    grid_barrier,
    load_halves,
    softcapped,
    store_halves,
    tile_coordinates,
)
from torchtune_lce.kernels.tuning import Config, cooperative, programs, rank_and_strides, rank_block


@triton.jit
def _logit_gradient_pair(
    hidden,
    hidden_rows,
    weight,
    weight_rows,
    bias,
    low,
    up,
    rows,
    labels,
    lse,
    d_nll,
    d_lse,
    entries,
    ids,
    pairs,
    gradients,
    masses,
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
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
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
    """(softmax * (d_nll + d_lse) - onehot * d_nll) * softcap', rounded to the input dtype only after the difference.

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
    if HAS_SOFTCAP:
        logits = softcapped(logits, softcap)
    upstream = tl.load(d_nll + place, mask=used, other=0.0)
    upstream_softmax = upstream
    if HAS_D_LSE:
        upstream_softmax += tl.load(d_lse + place, mask=used, other=0.0)
    base = tl.load(lse + place, mask=used, other=float("inf")) * LOG2_E
    softmax = tl.exp2(logits * LOG2_E - base[:, None])
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
    out = gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile
    out = out[None, :] + tl.arange(0, ROW_BLOCK)[:, None] * TILE
    tl.store(out, gradient.to(gradients.dtype.element_ty), mask=(in_pair < width)[None, :])


@triton.jit
def _weight_gradient_tile(
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
):
    """d_weight[entries of the column, chunk of features] = sum over the column's kept tiles of gradient^T @ hidden."""
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
    for step in range(0, steps):
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
def _bias_gradient_tile(
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
def _hidden_gradient_tile(
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
):
    """Adds gradient @ weight over this strip's tiles of a row block to the running sum, which the last strip rounds.

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
        # In float32 too: Triton 3.2 cannot compile this one in three parts.
        total = tl.dot(left, right, total, input_precision="ieee")
    steps = (end - begin) * STEPS
    # One step ahead, as in the weight's gradient.
    column = tl.load(others, mask=steps > 0, other=0)
    first_entry = column * TILE
    entry = tl.load(entries + first_entry + tl.arange(0, BLOCK_K))
    slot = tl.load(slots, mask=steps > 0, other=first_id) - first_id
    for step in range(0, steps):
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


@triton.jit(do_not_specialize=["row_blocks_total", "first_slot_factor"])
def _backward_kernel(
    hidden,
    hidden_rows,
    hidden_columns,
    weight,
    weight_rows,
    weight_columns,
    bias,
    low,
    up,
    rows,
    labels,
    count,
    lse,
    d_nll,
    d_lse,
    gradients,
    gradient_rows,
    gradient_columns,
    masses,
    mass_before,
    tail,
    low_tail,
    d_hidden,
    sums_high,
    sums_low,
    d_weight,
    d_bias,
    d_low,
    d_up,
    arrivals,
    taken,
    entries,
    ids,
    first_ids,
    pairs,
    first_pairs,
    strip_first,
    strips,
    first_slot_factor,
    row_others,
    row_slots,
    rows_before,
    column_others,
    column_slots,
    column_lengths,
    entries_total,
    features,
    rank,
    row_blocks_total,
    columns,
    hidden_stride,
    weight_stride,
    low_stride,
    up_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_LOW: tl.constexpr,
    NEED_UP: tl.constexpr,
    DENSE: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    GRADIENT_TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The strips that `strips` names: the first of this launch, its end, and all there are.

    A strip's logit gradients begin in `gradients` at slot ceil(end_column * first_slot_factor / ROW_BLOCK). The
    factor is 0 in the workspace, and `features` in the weight's gradient, where that is past the strip's own rows.
    """
    program = tl.program_id(0)
    workers = tl.num_programs(0)
    tokens_total = tl.load(count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    # Work items of a column: the chunks of its weight gradient, those of `up`, then its bias gradient.
    weight_chunks = 0
    if NEED_WEIGHT:
        weight_chunks = chunks
    column_chunks = weight_chunks
    if NEED_UP:
        column_chunks += tl.cdiv(rank, RANK_BLOCK)
    bias_chunk = column_chunks
    if NEED_BIAS:
        column_chunks += 1
    # Of a row block: the chunks of its hidden states' gradient, then those of `low`.
    hidden_chunks = 0
    if NEED_HIDDEN:
        hidden_chunks = chunks
    row_chunks = hidden_chunks
    if NEED_LOW:
        row_chunks += tl.cdiv(rank, RANK_BLOCK)
    last_strip = tl.load(strips + 2) - 1
    arrived = 0
    for strip in range(tl.load(strips), tl.load(strips + 1)):
        first_column = tl.load(strip_first + strip)
        end_column = tl.load(strip_first + strip + 1)
        first_slot = tl.cdiv(end_column * first_slot_factor, ROW_BLOCK)
        # Slots of tiles are their ids less this one.
        first_id = tl.load(first_ids + first_column) - first_slot
        first_pair = tl.load(first_pairs + first_column)
        for pair in range(first_pair + program, tl.load(first_pairs + end_column), workers):
            _logit_gradient_pair(
                hidden,
                hidden_rows,
                weight,
                weight_rows,
                bias,
                low,
                up,
                rows,
                labels,
                lse,
                d_nll,
                d_lse,
                entries,
                ids,
                pairs,
                gradients,
                masses,
                pair,
                first_pair,
                first_column,
                end_column,
                first_slot,
                first_id,
                columns * row_blocks_total,
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
                HAS_BIAS,
                HAS_LOW_RANK,
                HAS_SOFTCAP,
                HAS_D_LSE,
                HAS_TAIL,
                DENSE,
                HIDDEN_TMA,
                WEIGHT_TMA,
                ROW_BLOCK,
                TILE,
                WIDTH,
                GROUP,
                BLOCK_D,
                EVEN_D,
                PRECISION,
            )
        arrived += workers
        grid_barrier(arrivals, arrived, GRADIENT_TMA)
        column_items = (end_column - first_column) * column_chunks
        items = column_items + row_blocks * row_chunks
        item = program
        while item < items:
            if item < column_items:
                column = first_column + item // column_chunks
                chunk = item % column_chunks
                if NEED_WEIGHT:
                    if chunk < weight_chunks:
                        _weight_gradient_tile(
                            hidden,
                            hidden_columns,
                            rows,
                            entries,
                            column_others,
                            column_slots,
                            column_lengths,
                            gradients,
                            gradient_rows,
                            d_weight,
                            column,
                            chunk,
                            first_id,
                            row_blocks_total,
                            tokens_total,
                            entries_total,
                            features,
                            hidden_stride,
                            HIDDEN_TMA,
                            GRADIENT_TMA,
                            ROW_BLOCK,
                            TILE,
                            FEATURES,
                            BLOCK_K,
                            EVEN_D,
                            PRECISION,
                        )
                if NEED_UP:
                    if (chunk >= weight_chunks) & (chunk < bias_chunk):
                        _weight_gradient_tile(
                            low,
                            None,
                            rows,
                            entries,
                            column_others,
                            column_slots,
                            column_lengths,
                            gradients,
                            gradient_rows,
                            d_up,
                            column,
                            chunk - weight_chunks,
                            first_id,
                            row_blocks_total,
                            tokens_total,
                            entries_total,
                            rank,
                            low_stride,
                            False,
                            GRADIENT_TMA,
                            ROW_BLOCK,
                            TILE,
                            RANK_BLOCK,
                            BLOCK_K,
                            False,
                            PRECISION,
                        )
                if NEED_BIAS:
                    if chunk == bias_chunk:
                        _bias_gradient_tile(
                            entries,
                            column_slots,
                            column_lengths,
                            gradients,
                            d_bias,
                            column,
                            first_id,
                            row_blocks_total,
                            entries_total,
                            ROW_BLOCK,
                            TILE,
                        )
            else:
                row_block = (item - column_items) // row_chunks
                chunk = (item - column_items) % row_chunks
                begin = tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + first_column)
                end = tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + end_column)
                if NEED_HIDDEN:
                    if chunk < hidden_chunks:
                        _hidden_gradient_tile(
                            weight,
                            weight_columns,
                            rows,
                            entries,
                            row_others,
                            row_slots,
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
                            strip == 0,
                            strip == last_strip,
                            chunk == 0,
                            columns,
                            tokens_total,
                            entries_total,
                            features,
                            weight_stride,
                            HAS_D_LSE,
                            HAS_TAIL,
                            WEIGHT_TMA,
                            GRADIENT_TMA,
                            ROW_BLOCK,
                            TILE,
                            FEATURES,
                            BLOCK_K,
                            EVEN_D,
                            PRECISION,
                        )
                if NEED_LOW:
                    if chunk >= hidden_chunks:
                        _hidden_gradient_tile(
                            up,
                            None,
                            rows,
                            entries,
                            row_others,
                            row_slots,
                            begin,
                            end,
                            gradients,
                            gradient_columns,
                            masses,
                            mass_before,
                            low_tail,
                            d_nll,
                            d_lse,
                            d_low,
                            None,
                            None,
                            row_block,
                            chunk - hidden_chunks,
                            first_id,
                            strip == 0,
                            strip == last_strip,
                            # Where hidden states have a gradient too, an item of theirs does.
                            (hidden_chunks == 0) & (chunk == 0),
                            columns,
                            tokens_total,
                            entries_total,
                            rank,
                            up_stride,
                            HAS_D_LSE,
                            HAS_TAIL,
                            False,
                            GRADIENT_TMA,
                            ROW_BLOCK,
                            TILE,
                            RANK_BLOCK,
                            BLOCK_K,
                            False,
                            PRECISION,
                        )
            # Items differ in length, so whoever is done takes the next one: who computes it changes no bit of it.
            item = workers + tl.atomic_add(taken + strip, 1, sem="relaxed", scope="gpu")
        arrived += workers
        grid_barrier(arrivals, arrived, GRADIENT_TMA)


def run_backward(
    plan: Plan,
    hidden: Tensor,  # [N, D]
    in_order: Tensor | None,  # [M, D]: hidden[rows], for the copy engine
    is_in_order: Tensor | None,  # [1] bool: whether it is that, where the host does not know
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    low: Tensor | None,  # [N, r]
    up: Tensor | None,  # [V, r], with low
    rows: Tensor,  # [M] int64: row of hidden at each place
    labels: Tensor,  # [M]
    count: Tensor,  # [1] int32: places in use
    lse: Tensor,  # [M] float32
    d_nll: Tensor,  # [M] float32
    d_lse: Tensor | None,  # [M] float32
    tail: tuple[Tensor, Tensor | None] | None,  # tail_direction, added to the gradients of hidden and low
    softcap: float | None,
    strip_tiles: int,
    d_hidden: Tensor | None,  # [N, D], zero; filled at `rows`
    d_weight: Tensor | None,  # [V, D], every row written
    d_bias: Tensor | None,  # [V], every element written
    d_low: Tensor | None,  # [N, r] float32, zero; filled at `rows`
    d_up: Tensor | None,  # [V, r], every row written
    config: Config,
) -> None:
    """Launches the backward for the places of ``rows``; reads nothing back to the host."""
    device, features = hidden.device, hidden.shape[1]
    workspace = hidden.new_empty((strip_tiles, config.row_block, config.entry_tile))
    sums_high = sums_low = None
    if d_hidden is not None and d_hidden.element_size() == 2:
        sums_high = d_hidden.view(torch.int16)
        sums_low = sums_high.new_empty((rows.numel(), features))
    masses = mass_before = None
    if tail is not None:
        masses = lse.new_empty((strip_tiles, config.row_block))
        mass_before = lse.new_empty(rows.numel())
    rank, *adapter_strides = rank_and_strides(low, up)
    by_row = None, None

    def gradient_blocks(gradients: Tensor) -> tuple:
        if not config.tma or gradients.element_size() != 2:
            return by_row
        flat = gradients.view(-1, config.entry_tile)
        return in_blocks(flat, config.block_k, config.entry_tile), in_blocks(flat, config.row_block, config.block_k)

    def launch(
        strips: Tensor,
        gradients: Tensor,
        first_slot_factor: int,
        hidden_blocks: tuple,
        weight_blocks: tuple,
        dense: bool,
    ) -> None:
        counters = torch.zeros(plan.strip_first.numel(), dtype=torch.int32, device=device)
        _backward_kernel[(programs(device),)](
            hidden,
            *hidden_blocks,
            weight,
            *weight_blocks,
            bias,
            low,
            up,
            rows,
            labels,
            count,
            lse,
            d_nll,
            d_lse,
            gradients,
            *gradient_blocks(gradients),
            masses,
            mass_before,
            *(tail or (None, None)),
            d_hidden,
            sums_high,
            sums_low,
            d_weight,
            d_bias,
            d_low,
            d_up,
            counters[:1],
            counters[1:],
            plan.entries,
            plan.ids,
            plan.first_id,
            plan.pairs,
            plan.first_pair,
            plan.strip_first,
            strips,
            first_slot_factor,
            plan.rows.other,
            plan.rows.slot,
            plan.rows_before,
            plan.columns.other,
            plan.columns.slot,
            plan.columns_length,
            weight.shape[0],
            features,
            rank,
            triton.cdiv(rows.numel(), config.row_block),
            plan.columns_length.numel(),
            hidden.stride(0),
            weight.stride(0),
            *adapter_strides,
            softcap or 1.0,
            HAS_BIAS=bias is not None,
            HAS_LOW_RANK=low is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_D_LSE=d_lse is not None,
            HAS_TAIL=tail is not None and not dense,
            NEED_HIDDEN=d_hidden is not None,
            NEED_WEIGHT=d_weight is not None,
            NEED_BIAS=d_bias is not None,
            NEED_LOW=d_low is not None,
            NEED_UP=d_up is not None,
            DENSE=dense,
            HIDDEN_TMA=hidden_blocks[0] is not None,
            WEIGHT_TMA=weight_blocks[0] is not None,
            GRADIENT_TMA=config.tma and gradients.element_size() == 2,
            ROW_BLOCK=config.row_block,
            TILE=config.entry_tile,
            WIDTH=config.forward_entries,
            GROUP=config.group,
            FEATURES=config.features,
            BLOCK_D=config.block_d,
            RANK_BLOCK=rank_block(rank),
            BLOCK_K=config.block_k,
            EVEN_D=features % config.block_d == 0 and features % config.features == 0,
            PRECISION=config.precision,
            num_warps=config.warps,
            num_stages=config.backward_stages,
            **cooperative(device),
        )

    hidden_blocks = weight_blocks = by_row
    if in_order is not None:
        hidden_blocks = (
            in_blocks(in_order, config.row_block, config.block_d),
            in_blocks(in_order, config.block_k, config.features),
        )
    if has_blocks(config, weight):
        weight_blocks = (
            in_blocks(weight, config.forward_entries, config.block_d),
            in_blocks(weight, config.block_k, config.features),
        )
    # The plan leaves launches without strips where the host does not know.
    if not plan.is_dense:
        launch(plan.sparse_strips, workspace, 0, hidden_blocks if is_in_order is None else by_row, by_row, dense=False)
    dense = [(plan.dense_strips, workspace, 0)]
    if output_tiles(d_weight, config):
        # Rows of the weight's gradient that are not written yet hold the logit gradients of the strips before them.
        output = d_weight.view(-1)[: output_tiles(d_weight, config) * _tile_numel(config)]
        dense.insert(0, (plan.output_strips, output, features))
    for strips, gradients, factor in dense:
        if is_in_order is None:
            launch(strips, gradients, factor, hidden_blocks, weight_blocks, dense=True)
        else:
            launch(strips * is_in_order, gradients, factor, hidden_blocks, weight_blocks, dense=True)
            launch(strips * ~is_in_order, gradients, factor, by_row, weight_blocks, dense=True)


def _tile_numel(config: Config) -> int:
    return config.row_block * config.entry_tile


def output_tiles(d_weight: Tensor | None, config: Config) -> int:
    """How many tiles of logit gradients have room in the weight's gradient."""
    return 0 if d_weight is None else d_weight.numel() // _tile_numel(config)
