"""Gradients of hidden states, weight, bias and adapter from the kept tiles, in one persistent launch.

The kernel walks the plan's strips. For each it computes the kept tiles' logit gradients into a workspace, waits for all
programs, and multiplies them with the weight and the hidden states: sums run over tiles in a fixed order in registers,
so there are no locks, no atomics on gradients, and the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.backward_tiles import (
    bias_gradient_tile,
    hidden_gradient_tile,
    logit_gradient_pair,
    scale_gradient_tile,
    weight_gradient_tile,
)
from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Gradients, Operands, Places
from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import ADAPTER_STAGES, grid_barrier
from torchtune_lce.kernels.tuning import Config, ceil_div, programs, rank_block


@triton.jit(do_not_specialize=["row_blocks_total", "first_slot_factor"])
def _backward_kernel(
    hidden,
    hidden_rows,
    hidden_columns,
    weight,
    weight_rows,
    weight_columns,
    bias,
    scales,
    low,
    up,
    rows,
    labels,
    count,
    row_total,
    d_nll,
    d_lse,
    gradients,
    gradient_rows,
    gradient_columns,
    masses,
    scale_sums,
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
    d_scale,
    counters,
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
    log2_scale,
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_LOW: tl.constexpr,
    NEED_UP: tl.constexpr,
    NEED_SCALE: tl.constexpr,
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
    `counters`, zero, are the programs that have arrived at the barrier, and the items of each strip that are taken.
    """
    program = tl.program_id(0)
    workers = tl.num_programs(0)
    tokens_total = tl.load(count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    # Work items of a column: the chunks of its weight gradient, those of `up`, then its bias gradient and its scale's.
    weight_chunks = 0
    if NEED_WEIGHT:
        weight_chunks = chunks
    column_chunks = weight_chunks
    if NEED_UP:
        column_chunks += tl.cdiv(rank, RANK_BLOCK)
    bias_chunk = column_chunks
    if NEED_BIAS:
        column_chunks += 1
    scale_chunk = column_chunks
    if NEED_SCALE:
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
        first_pair = 0
        if DENSE:
            end_pair = row_blocks * tl.cdiv(end_column - first_column, WIDTH // TILE)
        else:
            first_pair = tl.load(first_pairs + first_column)
            end_pair = tl.load(first_pairs + end_column)
        for pair in range(first_pair + program, end_pair, workers):
            logit_gradient_pair(
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
                log2_scale,
                HAS_BIAS,
                HAS_LOW_RANK,
                HAS_SCALE,
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
        grid_barrier(counters, arrived, GRADIENT_TMA)
        column_items = (end_column - first_column) * column_chunks
        items = column_items + row_blocks * row_chunks
        item = program
        while item < items:
            if item < column_items:
                column = first_column + item // column_chunks
                chunk = item % column_chunks
                if NEED_WEIGHT:
                    if chunk < weight_chunks:
                        weight_gradient_tile(
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
                            None,
                        )
                if NEED_UP:
                    if (chunk >= weight_chunks) & (chunk < bias_chunk):
                        weight_gradient_tile(
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
                            ADAPTER_STAGES,
                        )
                if NEED_BIAS:
                    if chunk == bias_chunk:
                        bias_gradient_tile(
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
                if NEED_SCALE:
                    if chunk == scale_chunk:
                        scale_gradient_tile(
                            entries,
                            column_slots,
                            column_lengths,
                            scale_sums,
                            d_scale,
                            column,
                            first_id,
                            row_blocks_total,
                            entries_total,
                            TILE,
                        )
            else:
                row_block = (item - column_items) // row_chunks
                chunk = (item - column_items) % row_chunks
                begin = tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + first_column)
                end = tl.load(rows_before + row_block.to(tl.int64) * (columns + 1) + end_column)
                if NEED_HIDDEN:
                    if chunk < hidden_chunks:
                        hidden_gradient_tile(
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
                            None,
                        )
                if NEED_LOW:
                    if chunk >= hidden_chunks:
                        hidden_gradient_tile(
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
                            ADAPTER_STAGES,
                        )
            # Items differ in length, so whoever is done takes the next one: who computes it changes no bit of it.
            item = workers + tl.atomic_add(counters + 1 + strip, 1, sem="relaxed", scope="gpu")
        arrived += workers
        grid_barrier(counters, arrived, GRADIENT_TMA)


def run_backward(
    plan: Plan,
    operands: Operands,
    in_order: Tensor | None,  # [M, D]: hidden[rows], for the copy engine
    may_be_in_order: bool,  # whether it is that only where the plan has strips in order
    places: Places,
    tail: tuple[Tensor, Tensor | None] | None,  # tail_direction, added to the gradients of hidden and low
    strip_tiles: int,
    wanted: Gradients,
    config: Config,
) -> None:
    """Launches the backward for the places of ``rows``; reads nothing back to the host."""
    hidden, weight = operands.hidden, operands.weight
    device, features = hidden.device, hidden.shape[1]
    workspace = hidden.new_empty((strip_tiles, config.row_block, config.entry_tile))
    sums_high = sums_low = None
    if wanted.hidden is not None and wanted.hidden.element_size() == 2:
        sums_high = wanted.hidden.view(torch.int16)
        sums_low = sums_high.new_empty((places.rows.numel(), features))
    scale_sums = None
    if wanted.scale is not None:
        scale_sums = wanted.scale.new_empty((strip_tiles, config.entry_tile))
    of_tail = nothing = (None,) * 3
    masses = None
    if tail is not None:
        new_empty = places.row_total.new_empty
        masses = new_empty((strip_tiles, config.row_block))
        of_tail = new_empty(places.rows.numel()), *tail
    by_row = None, None
    counters = iter(plan.counters)

    def gradient_blocks(gradients: Tensor) -> tuple:
        if not config.tma or gradients.element_size() != 2:
            return by_row
        flat = gradients.view(-1, config.entry_tile)
        return in_blocks(flat, config.block_k, config.entry_tile), in_blocks(flat, config.row_block, config.block_k)

    def run(
        strips: Tensor,
        gradients: Tensor,
        first_slot_factor: int,
        hidden_blocks: tuple,
        weight_blocks: tuple,
        dense: bool,
    ) -> None:
        launch(
            _backward_kernel,
            (programs(device),),
            (
                hidden,
                *hidden_blocks,
                weight,
                *weight_blocks,
                operands.bias,
                operands.scale,
                operands.low,
                operands.up,
                places.rows,
                places.labels,
                places.count,
                places.row_total,
                places.d_nll,
                places.d_lse,
                gradients,
                *gradient_blocks(gradients),
                None if dense else masses,
                scale_sums,
                *(nothing if dense else of_tail),
                wanted.hidden,
                sums_high,
                sums_low,
                wanted.weight,
                wanted.bias,
                wanted.low,
                wanted.up,
                wanted.scale,
                next(counters),
                plan.entries,
                None if dense else plan.ids,
                plan.first_id,
                None if dense else plan.pairs,
                None if dense else plan.first_pair,
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
                operands.rank,
                ceil_div(places.rows.numel(), config.row_block),
                plan.columns_length.numel(),
                *operands.row_strides,
                operands.softcap or 1.0,
                operands.log2_scale,
            ),
            # Starts only when all of the grid fits, as its barrier needs.
            launch_cooperative_grid=True,
            **operands.flags,
            HAS_D_LSE=places.d_lse is not None,
            HAS_TAIL=tail is not None and not dense,
            NEED_HIDDEN=wanted.hidden is not None,
            NEED_WEIGHT=wanted.weight is not None,
            NEED_BIAS=wanted.bias is not None,
            NEED_LOW=wanted.low is not None,
            NEED_UP=wanted.up is not None,
            NEED_SCALE=wanted.scale is not None,
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
            RANK_BLOCK=rank_block(operands.rank),
            BLOCK_K=config.block_k,
            EVEN_D=features % config.block_d == 0 and features % config.features == 0,
            PRECISION=config.precision,
            num_warps=config.warps,
            num_stages=config.backward_stages,
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
        run(plan.sparse_strips, workspace, 0, by_row if may_be_in_order else hidden_blocks, by_row, dense=False)
    dense = [(plan.dense_strips, plan.dense_strips_by_row, workspace, 0)]
    if output_tiles(wanted, config):
        # Rows of the weight's gradient that are not written yet hold the logit gradients of the strips before them.
        output = wanted.weight.view(-1)[: output_tiles(wanted, config) * _tile_numel(config)]
        dense.insert(0, (plan.output_strips, plan.output_strips_by_row, output, features))
    for strips, strips_by_row, gradients, factor in dense:
        run(strips, gradients, factor, hidden_blocks, weight_blocks, dense=True)
        if may_be_in_order:
            run(strips_by_row, gradients, factor, by_row, weight_blocks, dense=True)


def _tile_numel(config: Config) -> int:
    return config.row_block * config.entry_tile


def output_tiles(wanted: Gradients, config: Config) -> int:
    """How many tiles of logit gradients have room in the weight's gradient; none where each has sums beside it."""
    return 0 if wanted.weight is None or wanted.scale is not None else wanted.weight.numel() // _tile_numel(config)
