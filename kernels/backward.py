"""Gradients of hidden states, weight and bias from the kept tiles, in one persistent launch.

The kernel walks the plan's strips. For each it computes the kept tiles' logit gradients into a workspace, waits for all
programs, and multiplies them with the weight and the hidden states: sums run over tiles in a fixed order in registers,
so there are no locks, no atomics on gradients, and the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import LOG2_E, grid_barrier, softcapped
from torchtune_lce.kernels.tuning import Config, cooperative, programs


@triton.jit
def _logit_gradient_pair(
    hidden,
    weight,
    bias,
    rows,
    labels,
    lse,
    d_nll,
    d_lse,
    entries,
    ids,
    pairs,
    gradients,
    pair,
    first_id,
    places_total,
    row_blocks_total,
    tokens_total,
    entries_total,
    features,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(softmax * (d_nll + d_lse) - onehot * d_nll) * softcap', rounded to the input dtype only after the difference.

    WIDTH entries: one tile, or two of the same row block next to each other.
    """
    left = tl.load(pairs + pair)
    row_block = left % row_blocks_total
    place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    used = place < tokens_total
    # Places past the end read a token in use; their gradients are set to zero below.
    token = tl.load(rows + tl.minimum(place, tokens_total - 1))
    in_pair = tl.arange(0, WIDTH)
    in_tile = in_pair % TILE
    column = left // row_blocks_total
    slot = tl.load(ids + left) - first_id
    present = in_pair < TILE
    if WIDTH > TILE:
        right = tl.load(pairs + places_total + pair)
        present = in_pair < tl.where(right >= 0, WIDTH, TILE)
        right = tl.maximum(right, 0)
        column = tl.where(in_pair < TILE, column, right // row_blocks_total)
        slot = tl.where(in_pair < TILE, slot, tl.load(ids + right) - first_id)
    # Entries past the vocabulary read its last one; the products after this leave them out.
    entry = tl.minimum(tl.load(entries + column * TILE + in_tile), entries_total - 1)
    depth = tl.arange(0, BLOCK_D)
    hidden_rows = hidden + token[:, None] * hidden_stride + depth[None, :]
    weight_rows = weight + entry.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    logits = tl.zeros((ROW_BLOCK, WIDTH), tl.float32)
    for start in range(0, features, BLOCK_D):
        if EVEN_D:
            a = tl.load(hidden_rows + start)
            b = tl.load(weight_rows + start)
        else:
            a = tl.load(hidden_rows + start, mask=(start + depth < features)[None, :], other=0.0)
            b = tl.load(weight_rows + start, mask=(start + depth < features)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + entry).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = softcapped(logits, softcap)
    upstream = tl.load(d_nll + place, mask=used, other=0.0)
    upstream_softmax = upstream
    if HAS_D_LSE:
        upstream_softmax += tl.load(d_lse + place, mask=used, other=0.0)
    base = tl.load(lse + place, mask=used, other=0.0) * LOG2_E
    softmax = tl.exp2(logits * LOG2_E - base[:, None])
    is_target = tl.load(labels + place, mask=used, other=-1).to(tl.int32)[:, None] == entry[None, :]
    gradient = softmax * upstream_softmax[:, None] - tl.where(is_target, upstream[:, None], 0.0)
    if HAS_SOFTCAP:
        gradient *= 1 - (logits / softcap) * (logits / softcap)
    gradient = tl.where(used[:, None], gradient, 0.0)
    out = gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile
    out = out[None, :] + tl.arange(0, ROW_BLOCK)[:, None] * TILE
    tl.store(out, gradient.to(gradients.dtype.element_ty), mask=present[None, :])


@triton.jit
def _weight_gradient_tile(
    hidden,
    rows,
    entries,
    others,
    slots,
    length,
    gradients,
    d_weight,
    d_bias,
    column,
    chunk,
    first_id,
    row_blocks,
    tokens_total,
    entries_total,
    features,
    hidden_stride,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
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
    bias_total = tl.zeros((TILE,), tl.float32)
    steps = tl.load(length + column) * STEPS
    # Where a step's operands lie is read one step ahead: loads through an index of the same step cannot be pipelined.
    place = tl.load(others, mask=steps > 0, other=0) * ROW_BLOCK + within
    token = tl.load(rows + tl.minimum(place, tokens_total - 1), mask=within < steps * BLOCK_K, other=0)
    slot = tl.load(slots, mask=steps > 0, other=first_id) - first_id
    for step in range(0, steps):
        token_in_tile = step % STEPS * BLOCK_K + within
        gradient = tl.load(
            gradients
            + slot.to(tl.int64) * (ROW_BLOCK * TILE)
            + token_in_tile[:, None] * TILE
            + tl.arange(0, TILE)[None, :]
        )
        if NEED_BIAS:
            bias_total += tl.sum(gradient.to(tl.float32), 0)
        if NEED_WEIGHT:
            # Places past the end read a token in use: their gradients are zero.
            if EVEN_D:
                h = tl.load(hidden + token[:, None] * hidden_stride + d[None, :])
            else:
                h = tl.load(
                    hidden + token[:, None] * hidden_stride + d[None, :], mask=(d < features)[None, :], other=0.0
                )
            total = tl.dot(tl.trans(gradient), h, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        place = tl.load(others + ahead // STEPS) * ROW_BLOCK + ahead % STEPS * BLOCK_K + within
        token = tl.load(rows + tl.minimum(place, tokens_total - 1))
        slot = tl.load(slots + ahead // STEPS) - first_id
    entry = tl.load(entries + column * TILE + tl.arange(0, TILE))
    inside = entry < entries_total
    if NEED_WEIGHT:
        tl.store(
            d_weight + entry.to(tl.int64)[:, None] * features + d[None, :],
            total.to(d_weight.dtype.element_ty),
            mask=inside[:, None] & (d < features)[None, :],
        )
    if NEED_BIAS:
        if chunk == 0:
            tl.store(d_bias + entry, bias_total.to(d_bias.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient_tile(
    weight,
    rows,
    entries,
    others,
    slots,
    begin,
    end,
    gradients,
    hidden_sum,
    d_hidden,
    row_block,
    chunk,
    first_id,
    is_first,
    is_last,
    columns,
    tokens_total,
    entries_total,
    features,
    weight_stride,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds gradient @ weight over this strip's tiles of a row block to the running sum; the last strip writes it."""
    STEPS: tl.constexpr = TILE // BLOCK_K
    d = chunk * FEATURES + tl.arange(0, FEATURES)
    in_tile = tl.arange(0, ROW_BLOCK)
    others += row_block.to(tl.int64) * columns + begin
    slots += row_block.to(tl.int64) * columns + begin
    total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
    steps = (end - begin) * STEPS
    # One step ahead, as in the weight's gradient.
    column = tl.load(others, mask=steps > 0, other=0)
    entry = tl.load(entries + column * TILE + tl.arange(0, BLOCK_K))
    slot = tl.load(slots, mask=steps > 0, other=first_id) - first_id
    for step in range(0, steps):
        entry_in_tile = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        gradient = tl.load(
            gradients + slot.to(tl.int64) * (ROW_BLOCK * TILE) + in_tile[:, None] * TILE + entry_in_tile[None, :]
        )
        inside = (entry < entries_total)[:, None]
        if not EVEN_D:
            inside = inside & (d < features)[None, :]
        w = tl.load(weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :], mask=inside, other=0.0)
        total = tl.dot(gradient, w, total, input_precision=PRECISION)
        ahead = tl.minimum(step + 1, steps - 1)
        column = tl.load(others + ahead // STEPS)
        entry = tl.load(entries + column * TILE + ahead % STEPS * BLOCK_K + tl.arange(0, BLOCK_K))
        slot = tl.load(slots + ahead // STEPS) - first_id
    place = row_block * ROW_BLOCK + in_tile
    mask = (place < tokens_total)[:, None] & (d < features)[None, :]
    sums = hidden_sum + place.to(tl.int64)[:, None] * features + d[None, :]
    if is_first == 0:
        total += tl.load(sums, mask=mask, other=0.0)
    if is_last:
        token = tl.load(rows + place, mask=place < tokens_total, other=0)
        out = d_hidden + token[:, None] * features + d[None, :]
        tl.store(out, total.to(d_hidden.dtype.element_ty), mask=mask)
    else:
        tl.store(sums, total, mask=mask)


@triton.jit
def _backward_kernel(
    hidden,
    weight,
    bias,
    rows,
    labels,
    count,
    lse,
    d_nll,
    d_lse,
    gradients,
    hidden_sum,
    d_hidden,
    d_weight,
    d_bias,
    arrivals,
    entries,
    ids,
    first_ids,
    pairs,
    first_pairs,
    strip_first,
    strips,
    row_others,
    row_slots,
    rows_before,
    column_others,
    column_slots,
    column_lengths,
    entries_total,
    features,
    row_blocks_total,
    columns,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    workers = tl.num_programs(0)
    tokens_total = tl.load(count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    column_chunks = 0
    if NEED_BIAS:
        column_chunks = 1
    if NEED_WEIGHT:
        column_chunks = chunks
    last_strip = tl.load(strips) - 1
    arrived = 0
    for strip in range(0, last_strip + 1):
        first_column = tl.load(strip_first + strip)
        end_column = tl.load(strip_first + strip + 1)
        first_id = tl.load(first_ids + first_column)
        for pair in range(tl.load(first_pairs + first_column) + program, tl.load(first_pairs + end_column), workers):
            _logit_gradient_pair(
                hidden,
                weight,
                bias,
                rows,
                labels,
                lse,
                d_nll,
                d_lse,
                entries,
                ids,
                pairs,
                gradients,
                pair,
                first_id,
                columns * row_blocks_total,
                row_blocks_total,
                tokens_total,
                entries_total,
                features,
                hidden_stride,
                weight_stride,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                HAS_D_LSE,
                ROW_BLOCK,
                TILE,
                WIDTH,
                BLOCK_D,
                EVEN_D,
                PRECISION,
            )
        arrived += workers
        grid_barrier(arrivals, arrived)
        column_items = (end_column - first_column) * column_chunks
        items = column_items
        if NEED_HIDDEN:
            items += row_blocks * chunks
        for item in range(program, items, workers):
            if item < column_items:
                if NEED_WEIGHT or NEED_BIAS:
                    _weight_gradient_tile(
                        hidden,
                        rows,
                        entries,
                        column_others,
                        column_slots,
                        column_lengths,
                        gradients,
                        d_weight,
                        d_bias,
                        first_column + item // column_chunks,
                        item % column_chunks,
                        first_id,
                        row_blocks_total,
                        tokens_total,
                        entries_total,
                        features,
                        hidden_stride,
                        NEED_WEIGHT,
                        NEED_BIAS,
                        ROW_BLOCK,
                        TILE,
                        FEATURES,
                        BLOCK_K,
                        EVEN_D,
                        PRECISION,
                    )
            else:
                if NEED_HIDDEN:
                    row_block = (item - column_items) // chunks
                    _hidden_gradient_tile(
                        weight,
                        rows,
                        entries,
                        row_others,
                        row_slots,
                        tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + first_column),
                        tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + end_column),
                        gradients,
                        hidden_sum,
                        d_hidden,
                        row_block,
                        (item - column_items) % chunks,
                        first_id,
                        strip == 0,
                        strip == last_strip,
                        columns,
                        tokens_total,
                        entries_total,
                        features,
                        weight_stride,
                        ROW_BLOCK,
                        TILE,
                        FEATURES,
                        BLOCK_K,
                        EVEN_D,
                        PRECISION,
                    )
        arrived += workers
        grid_barrier(arrivals, arrived)


def run_backward(
    plan: Plan,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    rows: Tensor,  # [M] int64: row of hidden at each place
    labels: Tensor,  # [M]
    count: Tensor,  # [1] int32: places in use
    lse: Tensor,  # [M] float32
    d_nll: Tensor,  # [M] float32
    d_lse: Tensor | None,  # [M] float32
    softcap: float | None,
    strip_tiles: int,
    d_hidden: Tensor | None,  # [N, D], zero; filled at `rows`
    d_weight: Tensor | None,  # [V, D], every row written
    d_bias: Tensor | None,  # [V], every element written
    config: Config,
) -> None:
    """Launches the backward for the places of ``rows``; reads nothing back to the host."""
    device, features = hidden.device, hidden.shape[1]
    row_blocks = triton.cdiv(rows.numel(), config.row_block)
    columns = plan.columns_length.numel()
    gradients = hidden.new_empty((strip_tiles, config.row_block, config.entry_tile))
    hidden_sum = hidden.new_empty((rows.numel(), features), dtype=torch.float32) if d_hidden is not None else None
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    _backward_kernel[(programs(device),)](
        hidden,
        weight,
        bias,
        rows,
        labels,
        count,
        lse,
        d_nll,
        d_lse,
        gradients,
        hidden_sum,
        d_hidden,
        d_weight,
        d_bias,
        arrivals,
        plan.entries,
        plan.ids,
        plan.first_id,
        plan.pairs,
        plan.first_pair,
        plan.strip_first,
        plan.strips,
        plan.rows.other,
        plan.rows.slot,
        plan.rows_before,
        plan.columns.other,
        plan.columns.slot,
        plan.columns_length,
        weight.shape[0],
        features,
        row_blocks,
        columns,
        hidden.stride(0),
        weight.stride(0),
        softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_D_LSE=d_lse is not None,
        NEED_HIDDEN=d_hidden is not None,
        NEED_WEIGHT=d_weight is not None,
        NEED_BIAS=d_bias is not None,
        ROW_BLOCK=config.row_block,
        TILE=config.entry_tile,
        WIDTH=config.forward_entries,
        FEATURES=config.features,
        BLOCK_D=config.block_d,
        BLOCK_K=config.block_k,
        EVEN_D=features % config.block_d == 0 and features % config.features == 0,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.backward_stages,
        **cooperative(device),
    )
