"""u' += E W of a strip: over all of its entries, or of each row block over what it keeps (keep_rule.py).

Each product reads and writes all of u'. So active columns wait for those of later strips while there is room for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.division import chunks, fill, product_precision, product_rounds
from torchtune_lce.kernels.exponentials import Blocks, Strip
from torchtune_lce.kernels.launching import Repeated
from torchtune_lce.kernels.operands import Ordered
from torchtune_lce.kernels.primitives import tile_coordinates
from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# How full our tiles must make the card for our own kernel, which takes the tokens in use alone. Below it cuBLAS, which
# parts the sums too, is faster, though it multiplies ignored tokens as well.
LEAST_FILL = 0.8


@triton.jit(do_not_specialize=["first_place", "tokens", "blocks_stride", "number", "first_tile", "tiles"])
def _product_kernel(
    strip,
    strip_blocks,
    weight,
    weight_blocks,
    packed,
    packed_entries,
    due,
    totals,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_stride,
    slots,
    blocks_stride,
    number,
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
    """totals [tokens, D] += strip [tiles * ENTRIES, tokens].T @ weight[first_tile * ENTRIES:]; the first one sets them.

    With FILTER what is `due`: over packed columns, of this strip and those that waited, and over the strip if the row
    block keeps it whole.
    """
    used = tl.minimum(tl.load(count) - first_place, tokens)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    first_entry = first_tile * ENTRIES
    depth = tiles * ENTRIES
    HALF: tl.constexpr = FEATURES // 2
    for index in tl.range(tl.program_id(0), row_blocks * chunks, tl.num_programs(0)):
        row_block, chunk = tile_coordinates(index, row_blocks, chunks, GROUP)
        adds = 1
        if FILTER:
            # Before all else: most launches find nothing due.
            adds = tl.load(due + 2 * blocks_stride + row_block)
        if adds > 0:
            place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
            present = place < used
            in_step = tl.arange(0, BLOCK_K)
            d = chunk * FEATURES + tl.arange(0, FEATURES)
            total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
            whole_depth = depth
            has_before = tl.where(number > 0, 1, 0)
            if FILTER:
                listed = tl.load(due + row_block)
                whole_depth = tl.load(due + blocks_stride + row_block)
                has_before = tl.load(due + 3 * blocks_stride + row_block)
                own_entries = packed_entries + row_block.to(tl.int64) * slots
                own_packed = packed + row_block.to(tl.int64) * slots * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[None, :]
                entry = tl.load(own_entries + in_step, mask=in_step < listed, other=0)
                for start in range(0, listed, BLOCK_K):
                    slot = start + in_step
                    e = tl.load(
                        own_packed + slot.to(tl.int64)[:, None] * ROW_BLOCK, mask=(slot < listed)[:, None], other=0.0
                    )
                    at = weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :]
                    w = tl.load(at, mask=(d < features)[None, :], other=0.0)
                    total = tl.dot(e.T, w.to(e.dtype), total, input_precision=PRECISION)
                    # Known a step ahead: loads that wait for one another are hardly pipelined.
                    entry = tl.load(own_entries + slot + BLOCK_K, mask=slot + BLOCK_K < listed, other=0)
            if TMA:
                for start in range(0, whole_depth, BLOCK_K):
                    e = strip_blocks.load([start, row_block * ROW_BLOCK])
                    w = weight_blocks.load([first_entry + start, chunk * FEATURES])
                    total = tl.dot(e.T, w.to(e.dtype), total, input_precision=PRECISION)
            else:
                columns = strip + place[:, None]
                for start in range(0, whole_depth, BLOCK_K):
                    here = start + in_step
                    e = tl.load(columns + here.to(tl.int64)[None, :] * strip_stride, mask=present[:, None], other=0.0)
                    entry = first_entry + here
                    at = weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :]
                    w = tl.load(at, mask=(entry < entries_total)[:, None] & (d < features)[None, :], other=0.0)
                    total = tl.dot(e, w.to(e.dtype), total, input_precision=PRECISION)
            # In halves, so that fewer registers hold old and new sums at once.
            summed = (place < used * has_before)[:, None]
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
    piece: Ordered,
    strip: Strip,
    blocks: Blocks,
    filters: bool,
    totals: Tensor,  # [M, D] float32: u', set by the first strip
    config: Config,
) -> Callable[[int, int, int], None]:
    """What launches it for a strip: its number, its first tile of the vocabulary, and how many tiles it has."""
    weight, states = piece.operands.weight, piece.states
    vocabulary, features = weight.shape
    row_blocks = ceil_div(piece.tokens, config.row_block)
    workers = programs(states.device)
    is_library = strip.values.dtype == torch.bfloat16 and strip.values.is_cuda and not filters
    if is_library and fill(row_blocks, features, workers, config) < LEAST_FILL:
        return functools.partial(_library_product, piece, strip, totals, config.forward_entries)
    block_k, chunk = step(row_blocks, features, states.dtype, workers, config)
    kernel = Repeated(
        _product_kernel,
        (
            strip.values,
            blocks.columns,
            weight,
            blocks.weight_rows,
            strip.packed,
            strip.entries,
            strip.due,
            totals,
            piece.count,
            piece.first,
            piece.tokens,
            vocabulary,
            features,
            weight.stride(0),
            strip.values.stride(0),
            strip.entries.shape[1] if filters else 0,
            strip.due.shape[1] if filters else 0,
        ),
        FILTER=filters,
        TMA=blocks.states is not None,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        FEATURES=chunk,
        BLOCK_K=block_k,
        GROUP=config.group,
        PRECISION=product_precision(states.dtype, config),
        num_warps=config.warps,
        num_stages=config.backward_stages,
    )
    return functools.partial(kernel, (min(workers, row_blocks * ceil_div(features, chunk)),))


def _library_product(
    piece: Ordered, strip: Strip, totals: Tensor, of_tile: int, _: int, first: int, tiles: int
) -> None:
    """cuBLAS's, of a strip in whole; ``of_tile`` entries are a tile."""
    weight = piece.operands.weight
    entries = weight[first * of_tile : (first + tiles) * of_tile]
    factors = strip.values[: len(entries), : piece.tokens].T, entries
    own = totals[: piece.tokens]
    if first == 0:
        torch.mm(*factors, out_dtype=torch.float32, out=own)
    else:
        torch.addmm(own, *factors, out_dtype=torch.float32, out=own)
