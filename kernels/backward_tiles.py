"""Device functions of the backward: a strip's logit gradients, and what of each gradient a program sums at once."""

from typing import NamedTuple

import triton
import triton.language as tl

from torchtune_lce.kernels.operands import OperandsArgument, Places, Workspace
from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import (
    LOG2_E,
    add_low_rank,
    load_halves,
    softcap_slope,
    softcapped,
    store_halves,
    tile_coordinates,
)


class Strip(NamedTuple):
    """Of the strip that is walked; made in the kernel."""

    first_column: tl.tensor
    end_column: tl.tensor
    first_slot: tl.tensor  # of its logit gradients
    first_id: tl.tensor  # slots of tiles are their ids less this one
    is_first: tl.tensor
    is_last: tl.tensor


class Factor(NamedTuple):
    """A matrix that logit gradients are multiplied with, and what of the product is wanted; made in the kernel."""

    matrix: tl.tensor  # [rows, width]
    blocks: tl.tensor | None  # of the matrix, where the copy engine loads it
    stride: tl.tensor  # of rows
    width: tl.tensor
    gradient: tl.tensor  # [rows of the other, width], filled


@triton.jit
def logit_gradient_pair(
    operands: OperandsArgument,
    hidden_rows,
    weight_rows,
    places: Places,
    plan: Plan,
    workspace: Workspace,
    strip: Strip,
    pair,
    row_blocks_total,
    tokens_total,
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
    DENSE: tl.constexpr = plan.pairs is None
    if DENSE:
        # Every tile is kept, in the order of the vocabulary: which one this is needs no list. A few row blocks go
        # over the strip together, so that what they read stays in the L2 cache.
        row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
        SIDE: tl.constexpr = WIDTH // TILE
        pair_columns = tl.cdiv(strip.end_column - strip.first_column, SIDE)
        row_block, pair_column = tile_coordinates(pair, row_blocks, pair_columns, GROUP)
        left_column = strip.first_column + pair_column * SIDE
        left_slot = strip.first_slot + pair_column * SIDE * row_blocks + row_block
        right_slot = left_slot + row_blocks
        column = left_column + in_pair // TILE
        slot = left_slot + in_pair // TILE * row_blocks
        width = tl.minimum(strip.end_column - left_column, SIDE) * TILE
    else:
        left = tl.load(plan.pairs + pair)
        row_block = left % row_blocks_total
        left_column = left // row_blocks_total
        column = left_column
        left_slot = tl.load(plan.ids + left) - strip.first_id
        slot = left_slot
        right_slot = left_slot
        if WIDTH > TILE:
            right = tl.load(plan.pairs + plan.columns_total * row_blocks_total + pair)
            width = tl.where(right >= 0, WIDTH, TILE)
            right = tl.maximum(right, 0)
            right_slot = tl.load(plan.ids + right) - strip.first_id
            column = tl.where(in_pair < TILE, left_column, right // row_blocks_total)
            slot = tl.where(in_pair < TILE, left_slot, right_slot)
    place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    used = place < tokens_total
    # Entries past the vocabulary read its last one; their softmax is zero too.
    any_entry = column * TILE + in_tile
    if not DENSE:
        any_entry = tl.load(plan.entries + any_entry)
    entry = tl.minimum(any_entry, operands.entries_total - 1)
    depth = tl.arange(0, BLOCK_D)
    if hidden_rows is None:
        # Places past the end read a token in use; their softmax is zero below.
        token = tl.load(places.rows + tl.minimum(place, tokens_total - 1))
        hidden_at = operands.hidden + token[:, None] * operands.hidden_stride + depth[None, :]
    if weight_rows is None:
        weight_at = operands.weight + entry.to(tl.int64)[None, :] * operands.weight_stride + depth[:, None]
    logits = tl.zeros((ROW_BLOCK, WIDTH), tl.float32)
    if operands.low is not None:
        low_rows = tl.load(places.rows + tl.minimum(place, tokens_total - 1))
        inside = any_entry < operands.entries_total
        logits = add_low_rank(logits, operands, low_rows, used, entry, inside, PRECISION)
    for start in range(0, operands.features, BLOCK_D):
        if hidden_rows is not None:
            a = hidden_rows.load([row_block * ROW_BLOCK, start])
        elif EVEN_D:
            a = tl.load(hidden_at + start)
        else:
            a = tl.load(hidden_at + start, mask=(start + depth < operands.features)[None, :], other=0.0)
        if weight_rows is not None:
            b = weight_rows.load([left_column * TILE, start]).T
        elif EVEN_D:
            b = tl.load(weight_at + start)
        else:
            b = tl.load(weight_at + start, mask=(start + depth < operands.features)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    if operands.bias is not None:
        logits += tl.load(operands.bias + entry).to(tl.float32)[None, :]
    unscaled = logits
    if operands.scale is not None:
        scale = tl.load(operands.scale + entry)
        logits *= scale[None, :]
    if operands.softcap is not None:
        logits = softcapped(logits, operands.softcap)
    upstream = tl.load(places.d_nll + place, mask=used, other=0.0)
    upstream_softmax = upstream
    if places.d_lse is not None:
        upstream_softmax += tl.load(places.d_lse + place, mask=used, other=0.0)
    peak = tl.load(places.row_total + 2 * place, mask=used, other=float("inf"))
    log_sum = tl.load(places.row_total + 2 * place + 1, mask=used, other=0.0) * LOG2_E
    softmax = tl.exp2((logits - peak[:, None]) * operands.log2_scale - log_sum[:, None])
    softmax = tl.where((any_entry < operands.entries_total)[None, :], softmax, 0.0)
    if workspace.masses is not None:
        tile = tl.arange(0, WIDTH // TILE)
        tile_slot = tl.where(tile == 0, left_slot, right_slot)
        mass = tl.sum(tl.reshape(softmax, (ROW_BLOCK, WIDTH // TILE, TILE)), 2)
        at = workspace.masses + tile_slot.to(tl.int64)[None, :] * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
        tl.store(at, mass, mask=(tile * TILE < width)[None, :])
    is_target = tl.load(places.labels + place, mask=used, other=-1).to(tl.int32)[:, None] == any_entry[None, :]
    gradient = softmax * upstream_softmax[:, None] - tl.where(is_target, upstream[:, None], 0.0)
    if operands.softcap is not None:
        gradient *= softcap_slope(logits, operands.softcap)
    if operands.scale is not None:
        if workspace.scale_sums is not None:
            # Past the tokens in use there is no gradient, though what is scaled may be anything.
            by_scale = tl.sum(tl.where(used[:, None], gradient * unscaled, 0.0), 0)
            tl.store(workspace.scale_sums + slot.to(tl.int64) * TILE + in_tile, by_scale, mask=in_pair < width)
        gradient *= scale[None, :]
    out = workspace.gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile
    out = out[None, :] + tl.arange(0, ROW_BLOCK)[:, None] * TILE
    tl.store(out, gradient.to(workspace.gradients.dtype.element_ty), mask=(in_pair < width)[None, :])


@triton.jit
def weight_gradient_tile(
    factor: Factor,
    entries_total,
    places: Places,
    plan: Plan,
    workspace: Workspace,
    gradient_rows,
    strip: Strip,
    column,
    chunk,
    row_blocks_total,
    tokens_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gradient[entries of the column, chunk of features] = sum over the column's kept tiles of their own^T @ factor,
    which are hidden states, or the adapter's `low`.

    STAGES of the loop's pipeline: None for the launch's own, and ADAPTER_STAGES for an adapter's matrix.
    """
    STEPS: tl.constexpr = ROW_BLOCK // BLOCK_K
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    within = tl.arange(0, BLOCK_K)
    others = plan.columns.other + column.to(tl.int64) * row_blocks_total
    slots = plan.columns.slot + column.to(tl.int64) * row_blocks_total
    total = tl.zeros((TILE, FEATURES), tl.float32)
    steps = tl.load(plan.columns_length + column) * STEPS
    # Where a step's operands lie is read one step ahead: loads through an index of the same step cannot be pipelined.
    first_place = tl.load(others, mask=steps > 0, other=0) * ROW_BLOCK
    slot = tl.load(slots, mask=steps > 0, other=strip.first_id) - strip.first_id
    row = places.rows + tl.minimum(first_place + within, tokens_total - 1)
    token = tl.load(row, mask=within < steps * BLOCK_K, other=0)
    for step in tl.range(0, steps, num_stages=STAGES):
        token_in_tile = step % STEPS * BLOCK_K + within
        if gradient_rows is not None:
            gradient = gradient_rows.load([slot * ROW_BLOCK + step % STEPS * BLOCK_K, 0])
        else:
            at = slot.to(tl.int64) * (ROW_BLOCK * TILE) + token_in_tile[:, None] * TILE
            gradient = tl.load(workspace.gradients + at + tl.arange(0, TILE)[None, :])
        # Places past the end read a token in use: their gradients are zero.
        if factor.blocks is not None:
            h = factor.blocks.load([first_place, chunk * FEATURES])
        elif EVEN_D:
            h = tl.load(factor.matrix + token[:, None] * factor.stride + d[None, :])
        else:
            at = factor.matrix + token[:, None] * factor.stride + d[None, :]
            h = tl.load(at, mask=(d < factor.width)[None, :], other=0.0)
        total = tl.dot(tl.trans(gradient), h, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        first_place = tl.load(others + ahead // STEPS) * ROW_BLOCK + ahead % STEPS * BLOCK_K
        slot = tl.load(slots + ahead // STEPS) - strip.first_id
        if factor.blocks is None:
            token = tl.load(places.rows + tl.minimum(first_place + within, tokens_total - 1))
    entry = tl.load(plan.entries + column * TILE + tl.arange(0, TILE))
    tl.store(
        factor.gradient + entry.to(tl.int64)[:, None] * factor.width + d[None, :],
        total.to(factor.gradient.dtype.element_ty),
        mask=(entry < entries_total)[:, None] & (d < factor.width)[None, :],
    )


@triton.jit
def bias_gradient_tile(
    d_bias,
    entries_total,
    plan: Plan,
    workspace: Workspace,
    strip: Strip,
    column,
    row_blocks_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """d_bias[entries of the column] = sum of the column's kept tiles over their tokens.

    Not in the loop of the weight's gradient: where a tile is summed and multiplied, Triton 3.6 gives its copies one
    buffer too few for a product still in flight.
    """
    within = tl.arange(0, TILE)
    slots = plan.columns.slot + column.to(tl.int64) * row_blocks_total
    total = tl.zeros((TILE,), tl.float32)
    for index in range(0, tl.load(plan.columns_length + column)):
        slot = tl.load(slots + index) - strip.first_id
        tile = workspace.gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE)
        gradient = tl.load(tile + tl.arange(0, ROW_BLOCK)[:, None] * TILE + within[None, :])
        total += tl.sum(gradient.to(tl.float32), 0)
    entry = tl.load(plan.entries + column * TILE + within)
    tl.store(d_bias + entry, total.to(d_bias.dtype.element_ty), mask=entry < entries_total)


@triton.jit
def scale_gradient_tile(
    d_scale,
    entries_total,
    plan: Plan,
    workspace: Workspace,
    strip: Strip,
    column,
    row_blocks_total,
    TILE: tl.constexpr,
):
    """d_scale[entries of the column] = sum of the column's kept tiles."""
    within = tl.arange(0, TILE)
    slots = plan.columns.slot + column.to(tl.int64) * row_blocks_total
    total = tl.zeros((TILE,), tl.float32)
    for index in range(0, tl.load(plan.columns_length + column)):
        slot = tl.load(slots + index) - strip.first_id
        total += tl.load(workspace.scale_sums + slot.to(tl.int64) * TILE + within)
    entry = tl.load(plan.entries + column * TILE + within)
    tl.store(d_scale + entry, total, mask=entry < entries_total)


@triton.jit
def hidden_gradient_tile(
    factor: Factor,
    tail,
    entries_total,
    places: Places,
    plan: Plan,
    workspace: Workspace,
    gradient_columns,
    strip: Strip,
    begin,
    end,
    row_block,
    chunk,
    keeps_mass,
    tokens_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds gradient @ factor, which is the weight or the adapter's `up`, over this strip's tiles of a row block, from
    `begin` to `end` of all of its own, to the running sum, which the last strip rounds. STAGES are those of
    :func:`weight_gradient_tile`.

    An output of 16 bits holds the upper halves of its float32 sums until then; their lower halves are a workspace.
    Where there are masses the last strip adds the mean of what was dropped: `tail` times the softmax mass that no kept
    tile holds.
    """
    STEPS: tl.constexpr = TILE // BLOCK_K
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    in_tile = tl.arange(0, ROW_BLOCK)
    place = row_block * ROW_BLOCK + in_tile
    used = place < tokens_total
    others = plan.rows.other + row_block.to(tl.int64) * plan.columns_total + begin
    slots = plan.rows.slot + row_block.to(tl.int64) * plan.columns_total + begin
    total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
    if workspace.masses is not None:
        missing = tl.zeros((ROW_BLOCK,), tl.float32)
        mass = tl.zeros((ROW_BLOCK,), tl.float32)
        for first in range(0, end - begin, 16):
            index = first + tl.arange(0, 16)
            present = index < end - begin
            slots_here = tl.load(slots + index, mask=present, other=strip.first_id) - strip.first_id
            at = workspace.masses + slots_here[:, None].to(tl.int64) * ROW_BLOCK + in_tile[None, :]
            mass += tl.sum(tl.load(at, mask=present[:, None], other=0.0), 0)
        # One item keeps the sum between strips; in the last strip all need it, and nothing writes to it.
        if strip.is_last:
            if strip.is_first == 0:
                mass += tl.load(workspace.mass_before + place, mask=used, other=0.0)
            upstream = tl.load(places.d_nll + place, mask=used, other=0.0)
            if places.d_lse is not None:
                upstream += tl.load(places.d_lse + place, mask=used, other=0.0)
            missing = upstream * (1 - mass)
        else:
            if keeps_mass:
                if strip.is_first == 0:
                    mass += tl.load(workspace.mass_before + place, mask=used, other=0.0)
                tl.store(workspace.mass_before + place, mass, mask=used)
        # An outer product by the tensor cores: by hand it would take a register a column.
        dtype: tl.constexpr = workspace.gradients.dtype.element_ty
        alone = tl.arange(0, 16) == 0
        left = tl.where(alone[None, :], missing[:, None], 0.0).to(dtype)
        right = tl.where(alone[:, None], tl.load(tail + d, mask=d < factor.width, other=0.0)[None, :], 0.0).to(dtype)
        # Exact in float32 too: it is one step alone.
        total = tl.dot(left, right, total, input_precision="ieee")
    steps = (end - begin) * STEPS
    # One step ahead, as in the weight's gradient.
    column = tl.load(others, mask=steps > 0, other=0)
    first_entry = column * TILE
    entry = tl.load(plan.entries + first_entry + tl.arange(0, BLOCK_K))
    slot = tl.load(slots, mask=steps > 0, other=strip.first_id) - strip.first_id
    for step in tl.range(0, steps, num_stages=STAGES):
        entry_in_tile = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        if gradient_columns is not None:
            gradient = gradient_columns.load([slot * ROW_BLOCK, step % STEPS * BLOCK_K])
        else:
            at = slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile[:, None] * TILE
            gradient = tl.load(workspace.gradients + at + entry_in_tile[None, :])
        if factor.blocks is not None:
            w = factor.blocks.load([first_entry, chunk * FEATURES])
        else:
            inside = (entry < entries_total)[:, None]
            if not EVEN_D:
                inside = inside & (d < factor.width)[None, :]
            at = factor.matrix + entry.to(tl.int64)[:, None] * factor.stride + d[None, :]
            w = tl.load(at, mask=inside, other=0.0)
        total = tl.dot(gradient, w, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        first_entry = tl.load(others + ahead // STEPS) * TILE + ahead % STEPS * BLOCK_K
        slot = tl.load(slots + ahead // STEPS) - strip.first_id
        if factor.blocks is None:
            entry = tl.load(plan.entries + first_entry + tl.arange(0, BLOCK_K))
    mask = used[:, None] & (d < factor.width)[None, :]
    token = tl.load(places.rows + place, mask=used, other=0)
    out = token[:, None] * factor.width + d[None, :]
    if factor.gradient.dtype.element_ty == tl.float32:
        if strip.is_first == 0:
            total += tl.load(factor.gradient + out, mask=mask, other=0.0)
        tl.store(factor.gradient + out, total, mask=mask)
    else:
        low = workspace.sums_low + place.to(tl.int64)[:, None] * factor.width + d[None, :]
        if strip.is_first == 0:
            total += load_halves(workspace.sums_high + out, low, mask)
        if strip.is_last == 0:
            store_halves(workspace.sums_high + out, low, total, mask)
        else:
            tl.store(factor.gradient + out, total.to(factor.gradient.dtype.element_ty), mask=mask)
