"""Which tiles a backward computes, decided on the device: an order of the vocabulary, and what is active in it.

A tile is ``row_block`` tokens by ``entry_tile`` entries that stand next to each other in the order. Sorting entries by
about how many row blocks they are active in, and then by the first of these, packs the kept ones into few tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.forward import Activity
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.primitives import WORD_BITS
from torchtune_lce.kernels.tuning import Config, ceil_div


class Kept(NamedTuple):
    """Which tiles are kept, see _tile_kernel, and what is found of their pairs, see plan._list_kernel."""

    order: Tensor  # int64 [V]: entries by falling key, see _key_kernel
    ranks: Tensor  # int32 [columns, row blocks]
    lengths: Tensor  # int32 [columns]
    seconds: Tensor  # int32 [columns, row blocks]
    pair_counts: Tensor  # int32 [columns]


NOTHING_KEPT = (None,) * len(Kept._fields)

# Row blocks that a key tells apart.
FIRSTS = tl.constexpr(2048)


@triton.jit
def _key_kernel(words, keys, count, words_stride, entries_total, ROW_BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """keys[e]: by the power of two in the number of row blocks in which entry e is active, then by the first of them.

    Entries of about as many row blocks share tiles; of those with few, the ones with the same. In 16 bits, for half of
    the sort's passes: past 2,048 row blocks the order is coarser, not wrong.
    """
    tile = tl.program_id(0)
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, WORD_BITS)
    words += tile * WORDS + word
    total = tl.zeros((WORD_BITS, WORDS), tl.int32)
    first = tl.zeros((WORD_BITS, WORDS), tl.int32)
    for row_block in range(row_blocks):
        active = (tl.load(words)[None, :] >> bit[:, None]) & 1
        first = tl.where((active > 0) & (total == 0), row_block, first)
        total += active
        words += words_stride
    # The exponent of a float32, from 1 on; 15 at the most.
    power = (tl.minimum(total, 32767).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    first = first * FIRSTS // tl.maximum(row_blocks, FIRSTS)
    key = tl.where(total > 0, power * FIRSTS + (FIRSTS - 1 - first), 0)
    entries = (tile * WORD_BITS + bit[:, None]) * WORDS + word[None, :]
    tl.store(keys + entries, key.to(tl.int16), mask=entries < entries_total)


@triton.jit(do_not_specialize=["row_blocks_total"])
def _tile_kernel(
    words,
    order,
    ranks,
    lengths,
    count,
    words_stride,
    row_blocks_total,
    entries_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ranks[column, row block] = how many tiles of the column stand before it, if any of its entries is active there.

    Else -1; nothing past the row blocks in use. lengths[column] = how many tiles are kept.
    """
    column = tl.program_id(0)
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    index = column * TILE + tl.arange(0, TILE)
    inside = index < entries_total
    entry = tl.load(order + index, mask=inside, other=0).to(tl.int32)
    place = entry % (WORDS * WORD_BITS)
    words += entry // (WORDS * WORD_BITS) * WORDS + place % WORDS
    ranks += column.to(tl.int64) * row_blocks_total
    rank = 0
    for _ in range(row_blocks):
        active = (tl.load(words, mask=inside, other=0) >> (place // WORDS)) & 1
        keeps = tl.max(active, 0)
        tl.store(ranks, tl.where(keeps > 0, rank, -1))
        rank += keeps
        words += words_stride
        ranks += 1
    tl.store(lengths + column, rank)


def kept_tiles(
    activity: Activity,
    count: Tensor,  # [1] int32: rows in use
    row_blocks: int,
    columns: int,
    vocabulary: int,
    config: Config,
) -> Kept:
    """By a sort and two launches; ``seconds`` and ``pair_counts`` are there to be filled."""
    settings = {"ROW_BLOCK": config.row_block, "WORDS": activity.tile // WORD_BITS.value}
    words_stride = activity.words.stride(0)
    keys = count.new_empty(vocabulary, dtype=torch.int16)
    launch(
        _key_kernel,
        (ceil_div(vocabulary, activity.tile),),
        (
            activity.words,
            keys,
            count,
            words_stride,
            vocabulary,
        ),
        **settings,
    )
    order = keys.sort(descending=True, stable=True).indices
    ranks, seconds = (count.new_empty((columns, row_blocks)) for _ in range(2))
    lengths, pair_counts = (count.new_empty(columns) for _ in range(2))
    launch(
        _tile_kernel,
        (columns,),
        (
            activity.words,
            order,
            ranks,
            lengths,
            count,
            words_stride,
            row_blocks,
            vocabulary,
        ),
        TILE=config.entry_tile,
        **settings,
    )
    return Kept(order, ranks, lengths, seconds, pair_counts)
