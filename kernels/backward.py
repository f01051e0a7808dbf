"""Gradients of hidden states, weight, bias and adapter from the kept tiles, in persistent launches.

The kernel walks the plan's strips, those of a kind in a launch. For each it computes the kept tiles' logit gradients
into a workspace, waits for all programs, and multiplies them with the weight and the hidden states: sums run over tiles
in a fixed order in registers, so there are no locks, no atomics on gradients, and the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.backward_tiles import (
    Factor,
    Strip,
    bias_gradient_tile,
    hidden_gradient_tile,
    logit_gradient_pair,
    scale_gradient_tile,
    weight_gradient_tile,
)
from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Gradients, Operands, OperandsArgument, Places, Tail, Workspace
from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import ADAPTER_STAGES, grid_barrier
from torchtune_lce.kernels.tuning import Config, ceil_div, programs, rank_block


@triton.jit(do_not_specialize=["row_blocks_total", "first_slot_factor"])
def _backward_kernel(
    operands: OperandsArgument,
    hidden_rows,
    hidden_columns,
    weight_rows,
    weight_columns,
    places: Places,
    plan: Plan,
    strips,
    counters,
    workspace: Workspace,
    gradient_rows,
    gradient_columns,
    tail: Tail,
    wanted: Gradients,
    row_blocks_total,
    first_slot_factor,
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

    A strip's logit gradients begin in the workspace's at slot ceil(end_column * first_slot_factor / ROW_BLOCK). The
    factor is 0 in a workspace of their own, and D in the weight's gradient, where that is past the strip's own rows.
    `counters`, zero, are the programs that have arrived at the barrier, and the items of each strip that are taken.
    Descriptors, two of a matrix for blocks of two shapes, are None where pointers load it.
    """
    program = tl.program_id(0)
    workers = tl.num_programs(0)
    tokens_total = tl.load(places.count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    entries_total = operands.entries_total
    DENSE: tl.constexpr = plan.pairs is None
    COPY_ENGINE: tl.constexpr = gradient_rows is not None
    chunks = tl.cdiv(operands.features, FEATURES)
    # Work items of a column: the chunks of its weight gradient, those of `up`, then its bias gradient and its scale's.
    weight_chunks = 0
    if wanted.weight is not None:
        weight_chunks = chunks
    column_chunks = weight_chunks
    if wanted.up is not None:
        column_chunks += tl.cdiv(operands.rank, RANK_BLOCK)
    bias_chunk = column_chunks
    if wanted.bias is not None:
        column_chunks += 1
    scale_chunk = column_chunks
    if wanted.scale is not None:
        column_chunks += 1
    # Of a row block: the chunks of its hidden states' gradient, then those of `low`.
    hidden_chunks = 0
    if wanted.hidden is not None:
        hidden_chunks = chunks
    row_chunks = hidden_chunks
    if wanted.low is not None:
        row_chunks += tl.cdiv(operands.rank, RANK_BLOCK)
    last_strip = tl.load(strips + 2) - 1
    arrived = 0
    for number in range(tl.load(strips), tl.load(strips + 1)):
        first_column = tl.load(plan.strip_first + number)
        end_column = tl.load(plan.strip_first + number + 1)
        first_slot = tl.cdiv(end_column * first_slot_factor, ROW_BLOCK)
        first_id = tl.load(plan.first_id + first_column) - first_slot
        strip = Strip(first_column, end_column, first_slot, first_id, number == 0, number == last_strip)
        first_pair = 0
        if DENSE:
            end_pair = row_blocks * tl.cdiv(end_column - first_column, WIDTH // TILE)
        else:
            first_pair = tl.load(plan.first_pair + first_column)
            end_pair = tl.load(plan.first_pair + end_column)
        for pair in range(first_pair + program, end_pair, workers):
            logit_gradient_pair(
                operands,
                hidden_rows,
                weight_rows,
                places,
                plan,
                workspace,
                strip,
                pair,
                row_blocks_total,
                tokens_total,
                ROW_BLOCK,
                TILE,
                WIDTH,
                GROUP,
                BLOCK_D,
                EVEN_D,
                PRECISION,
            )
        arrived += workers
        grid_barrier(counters, arrived, COPY_ENGINE)
        column_items = (end_column - first_column) * column_chunks
        items = column_items + row_blocks * row_chunks
        item = program
        while item < items:
            if item < column_items:
                column = first_column + item // column_chunks
                chunk = item % column_chunks
                if wanted.weight is not None:
                    if chunk < weight_chunks:
                        weight_gradient_tile(
                            Factor(
                                operands.hidden,
                                hidden_columns,
                                operands.hidden_stride,
                                operands.features,
                                wanted.weight,
                            ),
                            entries_total,
                            places,
                            plan,
                            workspace,
                            gradient_rows,
                            strip,
                            column,
                            chunk,
                            row_blocks_total,
                            tokens_total,
                            ROW_BLOCK,
                            TILE,
                            FEATURES,
                            BLOCK_K,
                            EVEN_D,
                            PRECISION,
                            None,
                        )
                if wanted.up is not None:
                    if (chunk >= weight_chunks) & (chunk < bias_chunk):
                        weight_gradient_tile(
                            Factor(operands.low, None, operands.low_stride, operands.rank, wanted.up),
                            entries_total,
                            places,
                            plan,
                            workspace,
                            gradient_rows,
                            strip,
                            column,
                            chunk - weight_chunks,
                            row_blocks_total,
                            tokens_total,
                            ROW_BLOCK,
                            TILE,
                            RANK_BLOCK,
                            BLOCK_K,
                            False,
                            PRECISION,
                            ADAPTER_STAGES,
                        )
                if wanted.bias is not None:
                    if chunk == bias_chunk:
                        bias_gradient_tile(
                            wanted.bias,
                            entries_total,
                            plan,
                            workspace,
                            strip,
                            column,
                            row_blocks_total,
                            ROW_BLOCK,
                            TILE,
                        )
                if wanted.scale is not None:
                    if chunk == scale_chunk:
                        scale_gradient_tile(
                            wanted.scale, entries_total, plan, workspace, strip, column, row_blocks_total, TILE
                        )
            else:
                row_block = (item - column_items) // row_chunks
                chunk = (item - column_items) % row_chunks
                rows_before = plan.rows_before + row_block.to(tl.int64) * (plan.columns_total + 1)
                begin = tl.load(rows_before + first_column)
                end = tl.load(rows_before + end_column)
                if wanted.hidden is not None:
                    if chunk < hidden_chunks:
                        hidden_gradient_tile(
                            Factor(
                                operands.weight,
                                weight_columns,
                                operands.weight_stride,
                                operands.features,
                                wanted.hidden,
                            ),
                            tail.hidden,
                            entries_total,
                            places,
                            plan,
                            workspace,
                            gradient_columns,
                            strip,
                            begin,
                            end,
                            row_block,
                            chunk,
                            chunk == 0,
                            tokens_total,
                            ROW_BLOCK,
                            TILE,
                            FEATURES,
                            BLOCK_K,
                            EVEN_D,
                            PRECISION,
                            None,
                        )
                if wanted.low is not None:
                    if chunk >= hidden_chunks:
                        hidden_gradient_tile(
                            Factor(operands.up, None, operands.up_stride, operands.rank, wanted.low),
                            tail.low,
                            entries_total,
                            places,
                            plan,
                            workspace,
                            gradient_columns,
                            strip,
                            begin,
                            end,
                            row_block,
                            chunk - hidden_chunks,
                            # Where hidden states have a gradient too, an item of theirs does.
                            (hidden_chunks == 0) & (chunk == 0),
                            tokens_total,
                            ROW_BLOCK,
                            TILE,
                            RANK_BLOCK,
                            BLOCK_K,
                            False,
                            PRECISION,
                            ADAPTER_STAGES,
                        )
            # Items differ in length, so whoever is done takes the next one: who computes it changes no bit of it.
            item = workers + tl.atomic_add(counters + 1 + number, 1, sem="relaxed", scope="gpu")
        arrived += workers
        grid_barrier(counters, arrived, COPY_ENGINE)


def run_backward(
    plan: Plan,
    operands: Operands,
    in_order: Tensor | None,  # [M, D]: hidden[rows], for the copy engine
    may_be_in_order: bool,  # whether it is that only where the plan has strips in order
    places: Places,
    tail: Tail,
    strip_tiles: int,
    wanted: Gradients,
    config: Config,
) -> None:
    """Launches the backward for the places of ``rows``; reads nothing back to the host."""
    hidden, weight = operands.hidden, operands.weight
    device, features = hidden.device, hidden.shape[1]
    workspace = _workspace(operands, places, tail, strip_tiles, wanted, config)
    by_row = None, None
    counters = iter(plan.counters.unbind())

    def gradient_blocks(gradients: Tensor) -> tuple:
        if not config.tma or gradients.element_size() != 2:
            return by_row
        flat = gradients.view(-1, config.entry_tile)
        return in_blocks(flat, config.block_k, config.entry_tile), in_blocks(flat, config.row_block, config.block_k)

    own_blocks = gradient_blocks(workspace.gradients)

    def run(
        plan: Plan,
        strips: Tensor,
        workspace: Workspace,
        blocks: tuple,  # of its gradients
        tail: Tail,
        first_slot_factor: int,
        hidden_blocks: tuple,
        weight_blocks: tuple,
    ) -> None:
        launch(
            _backward_kernel,
            (programs(device),),
            (
                operands.argument,
                *hidden_blocks,
                *weight_blocks,
                places,
                plan,
                strips,
                next(counters),
                workspace,
                *blocks,
                tail,
                wanted,
                ceil_div(places.rows.numel(), config.row_block),
                first_slot_factor,
            ),
            # Starts only when all of the grid fits, as its barrier needs.
            launch_cooperative_grid=True,
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
        hidden_rows = by_row if may_be_in_order else hidden_blocks
        run(plan, plan.sparse_strips, workspace, own_blocks, tail, 0, hidden_rows, by_row)
    own = workspace._replace(masses=None, mass_before=None)
    plan, no_tail = plan.dense, Tail(None, None)
    dense = [(plan.dense_strips, plan.dense_strips_by_row, own, own_blocks, 0)]
    if output_tiles(wanted, config):
        # Rows of the weight's gradient that are not written yet hold the logit gradients of the strips before them.
        output = wanted.weight.view(-1)[: output_tiles(wanted, config) * _tile_numel(config)]
        inside, blocks = own._replace(gradients=output), gradient_blocks(output)
        dense.insert(0, (plan.output_strips, plan.output_strips_by_row, inside, blocks, features))
    for strips, strips_by_row, workspace, blocks, factor in dense:
        run(plan, strips, workspace, blocks, no_tail, factor, hidden_blocks, weight_blocks)
        if may_be_in_order:
            run(plan, strips_by_row, workspace, blocks, no_tail, factor, by_row, weight_blocks)


def _workspace(
    operands: Operands, places: Places, tail: Tail, strip_tiles: int, wanted: Gradients, config: Config
) -> Workspace:
    hidden, new_empty = operands.hidden, places.row_total.new_empty  # of float32
    tokens = places.rows.numel()
    masses = mass_before = scale_sums = sums_high = sums_low = None
    gradients = hidden.new_empty((strip_tiles, config.row_block, config.entry_tile))
    if wanted.hidden is not None and wanted.hidden.element_size() == 2:
        sums_high = wanted.hidden.view(torch.int16)
        sums_low = sums_high.new_empty((tokens, hidden.shape[1]))
    if wanted.scale is not None:
        scale_sums = new_empty((strip_tiles, config.entry_tile))
    if tail.hidden is not None:
        masses, mass_before = new_empty((strip_tiles, config.row_block)), new_empty(tokens)
    return Workspace(gradients, masses, mass_before, scale_sums, sums_high, sums_low)


def _tile_numel(config: Config) -> int:
    return config.row_block * config.entry_tile


def output_tiles(wanted: Gradients, config: Config) -> int:
    """How many tiles of logit gradients have room in the weight's gradient; none where each has sums beside it."""
    return 0 if wanted.weight is None or wanted.scale is not None else wanted.weight.numel() // _tile_numel(config)
