"""What the backward computes, decided on the device: an order of the vocabulary, the kept tiles, and strips of them.

A tile is ``row_block`` tokens by ``entry_tile`` entries that stand next to each other in the order. Sorting entries by
the number of row blocks in which they are active packs the kept ones into few tiles. Nothing here is read by the host,
so every list has room for the worst case.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.forward import WORD_BITS, Activity
from torchtune_lce.kernels.tuning import Config


@dataclass(frozen=True)
class Lines:
    """Kept tiles of each line (a row block, or an entry tile) in ascending order of the other coordinate."""

    other: Tensor  # int32 [lines, longest line]: entry tile (or row block) of the line's i-th kept tile
    slot: Tensor  # int32 [lines, longest line]: its id among all kept tiles


@dataclass(frozen=True)
class Plan:
    """Ids of kept tiles run down one column of row blocks after the other, so a strip of columns is a range of ids."""

    entries: Tensor  # int32 [columns * entry_tile]: the vocabulary in order, V where past its end
    tile: Tensor  # int32 [columns * row blocks]: column * row blocks + row block of each id
    first_id: Tensor  # int32 [columns + 1]: id of each column's first kept tile
    strip_first: Tensor  # int32 [most strips + 1]: first column of each strip
    strips: Tensor  # int32 [1]: strips in use
    rows: Lines  # for the gradient of hidden: tiles of each row block
    rows_before: Tensor  # int32 [columns + 1, row blocks]: how many of them stand before each column
    columns: Lines  # for the gradient of the weight: tiles of each column
    columns_length: Tensor  # int32 [columns]


@triton.jit
def _count_kernel(words, counts, count, words_stride, entries_total, ROW_BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """counts[e] = row blocks in which entry e is active."""
    tile = tl.program_id(0)
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, WORD_BITS)
    words += tile * WORDS + word
    total = tl.zeros((WORD_BITS, WORDS), tl.int32)
    for _ in range(row_blocks):
        total += (tl.load(words)[None, :] >> bit[:, None]) & 1
        words += words_stride
    entries = (tile * WORD_BITS + bit[:, None]) * WORDS + word[None, :]
    tl.store(counts + entries, total, mask=entries < entries_total)


@triton.jit
def _tile_kernel(
    words,
    entries,
    kept,
    count,
    words_stride,
    row_blocks_total,
    entries_total,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """kept[column, row block] = whether any of the column's entries is active there."""
    column = tl.program_id(0)
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    entry = tl.load(entries + column * TILE + tl.arange(0, TILE))
    inside = entry < entries_total
    place = entry % (WORDS * WORD_BITS)
    words += entry // (WORDS * WORD_BITS) * WORDS + place % WORDS
    kept += column.to(tl.int64) * row_blocks_total
    for _ in range(row_blocks):
        active = (tl.load(words, mask=inside, other=0) >> (place // WORDS)) & 1
        tl.store(kept, tl.max(active, 0))
        words += words_stride
        kept += 1


@triton.jit
def _list_kernel(kept, ids, rank, other, slot, row_blocks, columns, total, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Writes each kept tile at its rank within its line."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    keep = mask & (tl.load(kept + index, mask=mask, other=0) != 0)
    column = index // row_blocks
    row_block = index % row_blocks
    if BY_ROW:
        place = row_block * columns + tl.load(rank + index, mask=keep, other=0)
        tl.store(other + place, column.to(tl.int32), mask=keep)
    else:
        place = column * row_blocks + tl.load(rank + index, mask=keep, other=0)
        tl.store(other + place, row_block.to(tl.int32), mask=keep)
    tl.store(slot + place, tl.load(ids + index, mask=keep, other=0), mask=keep)


@triton.jit
def _index_kernel(kept, ids, tile, total, BLOCK: tl.constexpr):
    """tile[ids[i]] = i for every kept i."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    keep = mask & (tl.load(kept + index, mask=mask, other=0) != 0)
    tl.store(tile + tl.load(ids + index, mask=keep, other=0), index.to(tl.int32), mask=keep)


def make_plan(
    activity: Activity | None,
    filter_hidden: bool,
    filter_weight: bool,
    count: Tensor,  # [1] int32: rows in use
    row_blocks: int,
    vocabulary: int,
    strip_tiles: int,
    config: Config,
) -> Plan:
    """``activity`` None, or a gradient that is not filtered, keeps every tile; ``strip_tiles`` >= ``row_blocks``."""
    device = count.device
    columns = triton.cdiv(vocabulary, config.entry_tile)
    entries = torch.full((columns * config.entry_tile,), vocabulary, dtype=torch.int32, device=device)
    entries[:vocabulary] = _order(activity, count, vocabulary, config)

    used = torch.arange(row_blocks, dtype=torch.int32, device=device) * config.row_block < count
    everything = used.to(torch.int32).expand(columns, row_blocks).contiguous()
    kept = everything if activity is None else _kept(activity, entries, count, row_blocks, columns, vocabulary, config)
    for_hidden = kept if filter_hidden else everything
    for_weight = kept if filter_weight else everything
    union = kept if filter_hidden and filter_weight else everything

    ids = union.view(-1).cumsum(0, dtype=torch.int32)
    total = ids[-1:]
    ids = ids - union.view(-1)
    first_id = torch.cat([ids.view(columns, row_blocks)[:, 0], total])
    tile = torch.empty_like(ids)
    grid = (triton.cdiv(ids.numel(), 1024),)
    _index_kernel[grid](union, ids, tile, ids.numel(), BLOCK=1024)

    # A strip starts at the first column whose first id reaches a multiple of `step`: at most `strip_tiles` tiles each.
    step = strip_tiles - row_blocks + 1
    most = columns * row_blocks // step + 1
    starts = torch.arange(most + 1, dtype=torch.int32, device=device) * step
    strips = total // step + 1
    strip_first = torch.searchsorted(first_id[:-1], starts, out_int32=True)
    strip_first[0].zero_()
    # The last strip takes the columns that keep nothing too: their gradient is written as zero.
    strip_first.masked_fill_(torch.arange(most + 1, device=device) >= strips, columns)

    rows_before = torch.zeros((columns + 1, row_blocks), dtype=torch.int32, device=device)
    torch.cumsum(for_hidden, 0, dtype=torch.int32, out=rows_before[1:])
    within = for_weight.cumsum(1, dtype=torch.int32)
    return Plan(
        entries=entries,
        tile=tile,
        first_id=first_id,
        strip_first=strip_first,
        strips=strips,
        rows=_lines(for_hidden, ids, rows_before, by_row=True),
        rows_before=rows_before,
        columns=_lines(for_weight, ids, within - for_weight, by_row=False),
        columns_length=within[:, -1].contiguous(),
    )


def _order(activity: Activity | None, count: Tensor, vocabulary: int, config: Config) -> Tensor:
    """Entries by falling number of active row blocks, equal ones by id."""
    if activity is None:
        return torch.arange(vocabulary, dtype=torch.int32, device=count.device)
    counts = torch.empty(vocabulary, dtype=torch.int32, device=count.device)
    _count_kernel[(triton.cdiv(vocabulary, activity.tile),)](
        activity.words,
        counts,
        count,
        activity.words.stride(0),
        vocabulary,
        ROW_BLOCK=config.row_block,
        WORDS=activity.tile // WORD_BITS.value,
    )
    # 16-bit keys halve the passes of the radix sort; past 32,767 row blocks the order is coarser, not wrong.
    return counts.clamp_(max=32767).to(torch.int16).sort(descending=True, stable=True).indices


def _kept(activity, entries, count, row_blocks, columns, vocabulary, config) -> Tensor:
    kept = torch.zeros((columns, row_blocks), dtype=torch.int32, device=entries.device)
    _tile_kernel[(columns,)](
        activity.words,
        entries,
        kept,
        count,
        activity.words.stride(0),
        row_blocks,
        vocabulary,
        ROW_BLOCK=config.row_block,
        TILE=config.entry_tile,
        WORDS=activity.tile // WORD_BITS.value,
    )
    return kept


def _lines(kept: Tensor, ids: Tensor, rank: Tensor, by_row: bool) -> Lines:
    columns, row_blocks = kept.shape
    other, slot = torch.empty((2, columns * row_blocks), dtype=torch.int32, device=kept.device)
    _list_kernel[(triton.cdiv(kept.numel(), 1024),)](
        kept, ids, rank, other, slot, row_blocks, columns, kept.numel(), BY_ROW=by_row, BLOCK=1024
    )
    return Lines(other, slot)
