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
from torchtune_lce.kernels.tuning import LAUNCH, Config, programs

# Past this share of kept tiles the rest is computed too: blocks copied in order beat tiles gathered by row.
DENSE_FRACTION = 0.6


@dataclass(frozen=True)
class Lines:
    """Kept tiles of each line (a row block, or an entry tile) in ascending order of the other coordinate."""

    other: Tensor  # int32 [lines, longest line]: entry tile (or row block) of the line's i-th kept tile
    slot: Tensor  # int32 [lines, longest line]: its id among all kept tiles


@dataclass(frozen=True)
class Plan:
    """Ids of kept tiles run down one column of row blocks after the other, so a strip of columns is a range of ids."""

    entries: Tensor  # int32 [columns * entry_tile]: the vocabulary in order, V where past its end
    kept: Tensor  # int32 [columns, row blocks]: 1 where a tile counts in the gradient of hidden
    ids: Tensor  # int32 [columns * row blocks]: id of each kept tile, at column * row blocks + row block
    first_id: Tensor  # int32 [columns + 1]: id of each column's first kept tile
    pairs: Tensor  # int32 [2, columns * row blocks]: places of two tiles of a row block and strip, -1 for no second
    first_pair: Tensor  # int32 [columns + 1]: pairs whose first tile stands before each column
    strip_first: Tensor  # int32 [most strips + 1]: first column of each strip
    # Strips of a launch, int32 [3]: the first, the end, and all strips there are; 0, 0, 0 for none.
    sparse_strips: Tensor  # where not every tile is kept
    output_strips: Tensor  # where every tile is, in the vocabulary's own order, and the unwritten part of the weight's
    # gradient has room for the strip's logit gradients
    dense_strips: Tensor  # the others of those
    is_dense: bool  # whether the host knows that it is
    rows: Lines  # for the gradient of hidden: tiles of each row block
    rows_before: Tensor  # int32 [row blocks, columns + 1]: how many of them stand before each column
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


@triton.jit(do_not_specialize=["row_blocks_total"])
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


@triton.jit(do_not_specialize=["row_blocks", "total"])
def _list_kernel(kept, ids, rank, other, slot, row_blocks, columns, total, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Writes each kept tile at its rank within its line."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    keep = mask & (tl.load(kept + index, mask=mask, other=0) != 0)
    column = index // row_blocks
    row_block = index % row_blocks
    if BY_ROW:
        place = row_block * columns + tl.load(rank + row_block * (columns + 1) + column, mask=keep, other=0)
        tl.store(other + place, column.to(tl.int32), mask=keep)
    else:
        place = column * row_blocks + tl.load(rank + index, mask=keep, other=0)
        tl.store(other + place, row_block.to(tl.int32), mask=keep)
    tl.store(slot + place, tl.load(ids + index, mask=keep, other=0), mask=keep)


@triton.jit(do_not_specialize=["row_blocks", "total"])
def _pair_kernel(
    leads,
    index_of,
    rank,
    rank_at_end,
    other,
    pairs,
    row_blocks,
    columns,
    total,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each leading tile and the one after it in its row block, unless the strip ends before that."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    mask = mask & (tl.load(leads + index, mask=mask, other=0) != 0)
    pair = tl.load(index_of + index, mask=mask, other=0)
    tl.store(pairs + pair, index.to(tl.int32), mask=mask)
    second = tl.full((BLOCK,), -1, tl.int32)
    if PAIRED:
        row_block = index % row_blocks
        column = index // row_blocks
        following = tl.load(rank + row_block * (columns + 1) + column, mask=mask, other=0) + 1
        has_second = mask & (following < tl.load(rank_at_end + row_block * columns + column, mask=mask, other=0))
        next_column = tl.load(other + row_block * columns + following, mask=has_second, other=0)
        second = tl.where(has_second, next_column * row_blocks + row_block.to(tl.int32), -1)
    tl.store(pairs + total + pair, second, mask=mask)


@triton.jit(do_not_specialize=["strip_tiles", "output_tiles", "row_blocks_total", "most"])
def _strip_kernel(
    first_id,
    dense,
    count,
    strip_first,
    ranges,
    columns,
    features,
    strip_tiles,
    output_tiles,
    row_blocks_total,
    most,
    workers,
    ROW_BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cuts the columns into strips: strip_first, and the ranges of the plan's sparse, output and dense strips."""
    row_blocks = tl.maximum(tl.cdiv(tl.load(count), ROW_BLOCK), 1)
    total = tl.load(first_id + columns)
    is_dense = tl.load(dense) != 0
    # The first column whose first id reaches s steps: then no strip has more than `strip_tiles` tiles.
    step = strip_tiles - row_blocks_total + 1
    strips = tl.maximum(tl.cdiv(total, step), 1)
    if is_dense:
        strips = 0
    for block in range(0, most + 1, BLOCK):
        strip = block + tl.arange(0, BLOCK)
        least = tl.zeros((BLOCK,), tl.int32)
        past = tl.zeros((BLOCK,), tl.int32) + columns
        for _ in range(SEARCH):
            middle = (least + past) // 2
            is_below = (least < past) & (tl.load(first_id + middle) < strip * step)
            least = tl.where(is_below, middle + 1, least)
            past = tl.where(is_below, past, middle)
        # The last strip takes the columns that keep nothing too: their gradient is written as zero.
        tl.store(strip_first + strip, tl.where(strip >= strips, columns, least), mask=strip <= most)
    tl.store(ranges, 0)
    tl.store(ranges + 1, strips)
    tl.store(ranges + 2, strips)
    tl.debug_barrier()
    first = 0
    strips = 0
    in_output = 0
    if is_dense:
        # Columns are all as long as the used row blocks: a strip is a whole number of pairs of columns, and where it
        # can be, of rounds of the persistent programs over its pairs of tiles.
        in_workspace = strip_tiles // (2 * row_blocks)
        while first < columns:
            tl.store(strip_first + strips, first)
            # Rows of the weight's gradient from the strip's end on are still unwritten, features / ROW_BLOCK tiles each
            # column; one tile less, since the first of them starts at a whole number of tiles.
            unwritten = tl.maximum((output_tiles - 1) * ROW_BLOCK - first * features, 0)
            pairs = unwritten // (2 * (row_blocks * ROW_BLOCK + features))
            if pairs > in_workspace:
                in_output += 1
            pairs = tl.maximum(pairs, in_workspace)
            rounds = pairs * row_blocks // workers
            if rounds > 0:
                pairs = tl.maximum(rounds * workers // row_blocks, 1)
            first += 2 * pairs
            strips += 1
    tl.store(ranges + 3, 0)
    tl.store(ranges + 4, in_output)
    tl.store(ranges + 5, strips)
    tl.store(ranges + 6, in_output)
    tl.store(ranges + 7, strips)
    tl.store(ranges + 8, strips)


def make_plan(
    activity: Activity | None,
    filter_hidden: bool,
    filter_weight: bool,
    count: Tensor,  # [1] int32: rows in use
    row_blocks: int,
    vocabulary: int,
    strip_tiles: int,
    output_tiles: int,
    features: int,
    config: Config,
) -> Plan:
    """``activity`` None, or a gradient that is not filtered, keeps every tile.

    The workspace has room for ``strip_tiles`` >= 2 ``row_blocks`` tiles, the whole gradient of the weight for
    ``output_tiles``, 0 if it is not asked for.
    """
    device = count.device
    columns = triton.cdiv(vocabulary, config.entry_tile)
    entries = torch.arange(columns * config.entry_tile, dtype=torch.int32, device=device).clamp_(max=vocabulary)
    used = torch.arange(row_blocks, dtype=torch.int32, device=device) * config.row_block < count
    kept = everything = used.to(torch.int32).expand(columns, row_blocks).contiguous()
    is_dense = activity is None
    dense = torch.full((1,), is_dense, device=device)
    if not is_dense:
        in_order = entries.clone()
        in_order[:vocabulary] = _order(activity, count, vocabulary, config)
        kept = _kept(activity, in_order, count, row_blocks, columns, vocabulary, config)
        dense = kept.sum(dtype=torch.int32) > DENSE_FRACTION * everything.sum(dtype=torch.int32)
        entries = entries.where(dense, in_order)
        kept = everything.where(dense, kept)
    for_hidden = kept if filter_hidden else everything
    for_weight = kept if filter_weight else everything
    union = kept if filter_hidden and filter_weight else everything

    ids = union.view(-1).cumsum(0, dtype=torch.int32)
    total = ids[-1:]
    ids = ids - union.view(-1)
    first_id = torch.cat([ids.view(columns, row_blocks)[:, 0], total])

    strip_first, ranges = _strips(first_id, dense, count, row_blocks, strip_tiles, output_tiles, features, config)
    union_before = _before(union)
    union_rows = _lines(union, ids, union_before, by_row=True)
    pairs, first_pair = _pairs(union, union_before, union_rows, strip_first, config)
    rows_before = union_before if for_hidden is union else _before(for_hidden)
    within = for_weight.cumsum(1, dtype=torch.int32)
    return Plan(
        entries=entries,
        kept=for_hidden,
        ids=ids,
        first_id=first_id,
        pairs=pairs,
        first_pair=first_pair,
        strip_first=strip_first,
        sparse_strips=ranges[0],
        output_strips=ranges[1],
        dense_strips=ranges[2],
        is_dense=is_dense,
        rows=union_rows if for_hidden is union else _lines(for_hidden, ids, rows_before, by_row=True),
        rows_before=rows_before,
        columns=_lines(for_weight, ids, within - for_weight, by_row=False),
        columns_length=within[:, -1].contiguous(),
    )


def _strips(
    first_id: Tensor,
    dense: Tensor,
    count: Tensor,
    row_blocks: int,
    strip_tiles: int,
    output_tiles: int,
    features: int,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """``strip_first`` and the ranges of strips of the three launches."""
    columns = first_id.numel() - 1
    # A dense strip has, rounded to whole rounds of the programs, no less than half of the pairs that would fit.
    dense_columns = 2 * max(strip_tiles // (2 * row_blocks) // 2, 1)
    most = max(triton.cdiv(columns * row_blocks, strip_tiles - row_blocks + 1), triton.cdiv(columns, dense_columns))
    strip_first = torch.empty(most + 1, dtype=torch.int32, device=first_id.device)
    ranges = strip_first.new_empty((3, 3))
    _strip_kernel[(1,)](
        first_id,
        dense,
        count,
        strip_first,
        ranges,
        columns,
        features,
        strip_tiles,
        output_tiles,
        row_blocks,
        most,
        programs(first_id.device),
        ROW_BLOCK=config.row_block,
        SEARCH=columns.bit_length() + 1,
        BLOCK=128,
        **LAUNCH,
    )
    return strip_first, ranges


def _before(kept: Tensor) -> Tensor:
    """[row blocks, columns + 1]: kept tiles of each row block before each column, and in all."""
    padded = torch.nn.functional.pad(kept.T, (0, 1))
    return padded.cumsum(1, dtype=torch.int32).sub_(padded)


def _pairs(union: Tensor, before: Tensor, rows: Lines, strip_first: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Two tiles of a row block side by side make one wide product; with a forward no wider than a tile, one alone."""
    columns, row_blocks = union.shape
    paired = config.forward_entries > config.entry_tile
    strip = torch.searchsorted(strip_first, torch.arange(columns, dtype=torch.int32, device=union.device), right=True)
    at_start, at_end = before[:, strip_first[strip - 1]], before[:, strip_first[strip]]
    leads = union * (1 - (before[:, :-1] - at_start) % 2).T if paired else union
    leads = leads.contiguous()
    index = leads.view(-1).cumsum(0, dtype=torch.int32)
    total = index[-1:]
    index = index - leads.view(-1)
    pairs = torch.empty((2, union.numel()), dtype=torch.int32, device=union.device)
    _pair_kernel[(triton.cdiv(union.numel(), 1024),)](
        leads,
        index,
        before,
        at_end,
        rows.other,
        pairs,
        row_blocks,
        columns,
        union.numel(),
        PAIRED=paired,
        BLOCK=1024,
        **LAUNCH,
    )
    return pairs, torch.cat([index.view(columns, row_blocks)[:, 0], total])


def _order(activity: Activity, count: Tensor, vocabulary: int, config: Config) -> Tensor:
    """Entries by falling number of active row blocks, equal ones by id."""
    counts = torch.empty(vocabulary, dtype=torch.int32, device=count.device)
    _count_kernel[(triton.cdiv(vocabulary, activity.tile),)](
        activity.words,
        counts,
        count,
        activity.words.stride(0),
        vocabulary,
        ROW_BLOCK=config.row_block,
        WORDS=activity.tile // WORD_BITS.value,
        **LAUNCH,
    )
    # 16-bit keys halve the passes of the radix sort; past 32,767 row blocks the order is coarser, not wrong.
    return counts.clamp_(max=32767).to(torch.int16).sort(descending=True, stable=True).indices


def _kept(
    activity: Activity, entries: Tensor, count: Tensor, row_blocks: int, columns: int, vocabulary: int, config: Config
) -> Tensor:
    """int32 [columns, row blocks]: 1 where a used row block has an active entry in the column."""
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
        **LAUNCH,
    )
    return kept


def _lines(kept: Tensor, ids: Tensor, rank: Tensor, by_row: bool) -> Lines:
    columns, row_blocks = kept.shape
    other, slot = torch.empty((2, columns * row_blocks), dtype=torch.int32, device=kept.device)
    _list_kernel[(triton.cdiv(kept.numel(), 1024),)](
        kept, ids, rank, other, slot, row_blocks, columns, kept.numel(), BY_ROW=by_row, BLOCK=1024, **LAUNCH
    )
    return Lines(other, slot)
