"""u' += E W of a strip: over all of its entries, or of each row block over its active columns alone.

A threshold on single entries says nothing about their sum: where the softmax is flat, as in an untrained model, all of
it lies in entries below any threshold. So the mass of what is not active is summed too, and where a row block's mean of
what is dropped, through this strip, would pass ``DROPPED_MASS_LIMIT``, the row block keeps the strip whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.active_columns import Dropped
from torchtune_lce.kernels.division import ENTRIES_A_SLOT, chunks, fill, product_precision, product_rounds
from torchtune_lce.kernels.exponentials import Blocks, Strip
from torchtune_lce.kernels.operands import Piece
from torchtune_lce.kernels.overflow import OVERFLOWS
from torchtune_lce.kernels.primitives import LOG2_E_SINGLE, multiply_add, tile_coordinates
from torchtune_lce.kernels.tuning import LAUNCH, Config, programs

# How full our tiles must make the card for our own kernel, which takes the tokens in use alone. Below it cuBLAS, which
# parts the sums too, is faster, though it multiplies ignored tokens as well.
LEAST_FILL = 0.8


# Trained models leave a few hundredths of the softmax below finfo(bfloat16).eps / 32; a flat softmax leaves all of it.
DROPPED_MASS_LIMIT = tl.constexpr(0.25)
TILES_A_STEP = tl.constexpr(64)


@triton.jit
def _row_totals(
    sums,
    dropped_sums,
    totals_before,
    targets,
    references,
    place,
    used,
    tokens,
    first_tile,
    tiles,
    ROW_BLOCK: tl.constexpr,
):
    """Through this strip T + S', and what is dropped if all that is not active is; what was; which rows count."""
    present = place < used
    later = place < tl.where(first_tile > 0, used, 0)
    target = tl.load(targets + place, mask=present, other=0.0)
    reference = tl.load(references + place, mask=present, other=0.0)
    own = tl.exp2(multiply_add(target, LOG2_E_SINGLE, reference * -LOG2_E_SINGLE))
    total = tl.where(first_tile > 0, tl.load(totals_before + place, mask=later, other=0.0), own)
    before = tl.load(totals_before + tokens + place, mask=later, other=0.0)
    dropped = before
    in_step = tl.arange(0, TILES_A_STEP)
    for start in range(0, tiles, TILES_A_STEP):
        tile = start + in_step
        mask = (tile < tiles)[:, None] & present[None, :]
        at = tile.to(tl.int64)[:, None] * tokens + place[None, :]
        total += tl.sum(tl.load(sums + first_tile * tokens.to(tl.int64) + at, mask=mask, other=0.0), 0)
        dropped += tl.sum(tl.load(dropped_sums + at, mask=mask, other=0.0), 0)
    # False for a NaN.
    return total, dropped, before, present & (total < OVERFLOWS) & (total > 0)


@triton.jit(do_not_specialize=["first_place", "tokens", "first_tile", "tiles"])
def _product_kernel(
    strip,
    strip_blocks,
    weight,
    weight_blocks,
    packed,
    columns,
    active,
    sums,
    dropped_sums,
    targets,
    references,
    totals_before,
    totals_after,
    strip_is_whole,
    kept,
    totals,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_stride,
    slots,
    first_tile,
    tiles,
    FILTER: tl.constexpr,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """totals [tokens, D] += strip [tokens, tiles * ENTRIES] @ weight[first_tile * ENTRIES:]; the first strip sets them.

    With FILTER over the packed columns, unless the row block keeps the strip whole; then also its sums through this
    strip, and how much it kept.
    """
    used = tl.minimum(tl.load(count) - first_place, tokens)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    first_entry = first_tile * ENTRIES
    depth = tiles * ENTRIES
    HALF: tl.constexpr = FEATURES // 2
    for index in tl.range(tl.program_id(0), row_blocks * chunks, tl.num_programs(0)):
        row_block, chunk = tile_coordinates(index, row_blocks, chunks, GROUP)
        place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        present = place < used
        in_step = tl.arange(0, BLOCK_K)
        d = chunk * FEATURES + tl.arange(0, FEATURES)
        total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
        whole_depth = depth
        if FILTER:
            listed = tl.load(active + row_block)
            row_total, dropped, before, counts = _row_totals(
                sums,
                dropped_sums,
                totals_before,
                targets,
                references,
                place,
                used,
                tokens,
                first_tile,
                tiles,
                ROW_BLOCK,
            )
            rows = tl.sum(counts.to(tl.float32), 0)
            scale = tl.where(counts, 1 / tl.where(counts, row_total, 1.0), 0.0)
            share = tl.sum(tl.where(counts, dropped * scale, 0.0), 0)
            # This strip alone may leave out its part of the entries so far: all of a flat softmax is kept.
            here = tl.sum(tl.where(counts, (dropped - before) * scale, 0.0), 0)
            part = depth.to(tl.float32) / (first_entry + depth)
            flat = (share > DROPPED_MASS_LIMIT * rows) | (here > DROPPED_MASS_LIMIT * part * rows)
            is_whole = tl.where(flat | (listed > slots), 1, 0)
            whole_depth = depth * is_whole
            listed = listed * (1 - is_whole)
            write = place < tl.where(chunk == 0, used, 0)
            tl.store(totals_after + place, row_total, mask=write)
            tl.store(totals_after + tokens + place, tl.where(is_whole > 0, before, dropped), mask=write)
            tl.store(strip_is_whole + row_block, is_whole, mask=chunk == 0)
            # Past the vocabulary a strip has nothing.
            all_here = tl.minimum(depth, entries_total - first_entry) * is_whole
            tl.store(kept + row_block, tl.load(kept + row_block) + listed + all_here, mask=chunk == 0)
            own_columns = columns + row_block.to(tl.int64) * slots
            own_packed = packed + row_block.to(tl.int64) * slots * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[None, :]
            for start in range(0, listed, BLOCK_K):
                slot = start + in_step
                column = tl.load(own_columns + slot, mask=slot < listed, other=0)
                e = tl.load(
                    own_packed + slot.to(tl.int64)[:, None] * ROW_BLOCK, mask=(slot < listed)[:, None], other=0.0
                )
                at = weight + (first_entry + column).to(tl.int64)[:, None] * weight_stride + d[None, :]
                w = tl.load(at, mask=(d < features)[None, :], other=0.0)
                total = tl.dot(e.T, w.to(e.dtype), total, input_precision=PRECISION)
        if TMA:
            for start in range(0, whole_depth, BLOCK_K):
                e = strip_blocks.load([row_block * ROW_BLOCK, start])
                w = weight_blocks.load([first_entry + start, chunk * FEATURES])
                total = tl.dot(e, w.to(e.dtype), total, input_precision=PRECISION)
        else:
            strip_rows = strip + place.to(tl.int64)[:, None] * strip_stride + in_step[None, :]
            for start in range(0, whole_depth, BLOCK_K):
                entry = first_entry + start + in_step
                e = tl.load(strip_rows + start, mask=present[:, None], other=0.0)
                at = weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :]
                w = tl.load(at, mask=(entry < entries_total)[:, None] & (d < features)[None, :], other=0.0)
                total = tl.dot(e, w.to(e.dtype), total, input_precision=PRECISION)
        # In halves, so that fewer registers hold old and new sums at once.
        summed = (place < tl.where(first_entry > 0, used, 0))[:, None]
        left, right = total.reshape(ROW_BLOCK, 2, HALF).permute(0, 2, 1).split()
        column = chunk * FEATURES + tl.arange(0, HALF)
        own = totals + place.to(tl.int64)[:, None] * features + column[None, :]
        exists = (column < features)[None, :]
        left += tl.load(own, mask=summed & exists, other=0.0)
        tl.store(own, left, mask=present[:, None] & exists)
        exists = (column + HALF < features)[None, :]
        right += tl.load(own + HALF, mask=summed & exists, other=0.0)
        tl.store(own + HALF, right, mask=present[:, None] & exists)


def step(row_blocks: int, features: int, dtype: torch.dtype, workers: int, config: Config) -> tuple[int, int]:
    """Entries of a step of the product, and columns of D that a program sums."""
    chunk = min(chunks(dtype, config), key=lambda chunk: product_rounds(row_blocks, features, chunk, workers, config))
    return 32 if dtype == torch.float16 else config.block_k, chunk


def add_product(
    piece: Piece,
    strip: Strip,
    blocks: Blocks,
    tile_sums: Tensor,  # [tiles, M] float32
    dropped: Dropped | None,  # running, is_whole and kept are filled
    totals: Tensor,  # [M, D] float32: u', set by the first strip
    number: int,  # of the strip
    first: int,  # tile of the vocabulary
    tiles: int,
    config: Config,
) -> None:
    """One launch."""
    weight, states = piece.operands.weight, piece.states
    vocabulary, features = weight.shape
    row_blocks = triton.cdiv(piece.tokens, config.row_block)
    workers = programs(states.device)
    is_library = strip.values.dtype == torch.bfloat16 and strip.values.is_cuda and dropped is None
    if is_library and fill(row_blocks, features, workers, config) < LEAST_FILL:
        entry, end = first * config.forward_entries, min((first + tiles) * config.forward_entries, vocabulary)
        factors = strip.values[: piece.tokens, : end - entry], weight[entry:end]
        own = totals[: piece.tokens]
        if first == 0:
            torch.mm(*factors, out_dtype=torch.float32, out=own)
        else:
            torch.addmm(own, *factors, out_dtype=torch.float32, out=own)
        return
    block_k, chunk = step(row_blocks, features, states.dtype, workers, config)
    _product_kernel[(min(workers, row_blocks * triton.cdiv(features, chunk)),)](
        strip.values,
        blocks.strip_rows,
        weight,
        blocks.weight_rows,
        strip.packed,
        strip.columns,
        strip.active,
        tile_sums,
        strip.dropped_sums,
        piece.targets,
        piece.references,
        dropped and dropped.running[(number - 1) % 2],
        dropped and dropped.running[number % 2],
        dropped and dropped.is_whole[number],
        dropped and dropped.kept,
        totals,
        piece.count,
        piece.first,
        piece.tokens,
        vocabulary,
        features,
        weight.stride(0),
        strip.values.stride(0),
        strip.values.shape[1] // ENTRIES_A_SLOT,
        first,
        tiles,
        FILTER=dropped is not None,
        TMA=blocks.states is not None,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        FEATURES=chunk,
        BLOCK_K=block_k,
        GROUP=config.group,
        PRECISION=product_precision(states.dtype, config),
        num_warps=config.warps,
        num_stages=config.backward_stages,
        **LAUNCH,
    )
