"""How the backward goes over the kept tiles, decided on the device: strips of them, and lists in the order of its sums.

Nothing here is read by the host, so every list has room for the worst case, and its kernels find out by themselves
whether a dense backward is due.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.forward import Activity
from torchtune_lce.kernels.kept_tiles import NOTHING_KEPT, Kept, kept_tiles
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Places
from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# Past this share of kept tiles the rest is computed too: blocks copied in order beat tiles gathered by row.
DENSE_FRACTION = 0.6


class Lines(NamedTuple):
    """Kept tiles of each line (a row block, or an entry tile) in ascending order of the other coordinate."""

    other: Tensor  # int32 [lines, longest line]: entry tile (or row block) of the line's i-th kept tile
    slot: Tensor  # int32 [lines, longest line]: its id among all kept tiles


class Plan(NamedTuple):
    """Ids of kept tiles run down one column of row blocks after the other, so a strip of columns is a range of ids.

    What only launches of sparse strips read is None where the host knows that there are none.
    """

    entries: Tensor  # int32 [columns * entry_tile]: the vocabulary in order, V where past its end
    ranks: Tensor | None  # int32 [columns, row blocks]: see kept_tiles._tile_kernel
    ids: Tensor | None  # int32 [columns * row blocks]: id of each kept tile, at column * row blocks + row block
    first_id: Tensor  # int32 [columns + 1]: id of each column's first kept tile
    pairs: Tensor | None  # int32 [2, columns * row blocks]: places of two tiles of a row block and strip, -1: no second
    first_pair: Tensor | None  # int32 [columns + 1]: pairs whose first tile stands before each column
    strip_first: Tensor  # int32 [most strips + 1]: first column of each strip
    ranges: Tensor  # int32 [5, 4]: strips of launches, see below
    counters: Tensor  # int32 [5, >= 1 + most strips], zero: for as many launches
    rows: Lines  # for the gradient of hidden: tiles of each row block
    rows_before: Tensor  # int32 [row blocks, columns + 1]: how many of them stand before each column
    columns: Lines  # for the gradient of the weight: tiles of each column
    columns_length: Tensor  # int32 [columns]
    columns_total: int

    @property
    def is_dense(self) -> bool:
        """Whether the host knows that it is."""
        return self.ranks is None

    @property
    def dense(self) -> "Plan":
        """For launches of dense strips: without what they do not read, so that one compiled kernel serves all plans."""
        return self._replace(ranks=None, ids=None, pairs=None, first_pair=None)

    # Strips of a launch, int32 [3]: the first, the end, and all strips there are; 0, 0, 0 for none.

    @property
    def sparse_strips(self) -> Tensor:
        """Where not every tile is kept."""
        return self.ranges[0, :3]

    @property
    def output_strips(self) -> Tensor:
        """Where every tile is, in the vocabulary's own order, and the unwritten part of the weight's gradient has room
        for the strip's logit gradients.
        """
        return self.ranges[1, :3]

    @property
    def dense_strips(self) -> Tensor:
        """The others of those."""
        return self.ranges[2, :3]

    # The last two are none where hidden states are not in order, and then these are they.

    @property
    def output_strips_by_row(self) -> Tensor:
        return self.ranges[3, :3]

    @property
    def dense_strips_by_row(self) -> Tensor:
        return self.ranges[4, :3]


@triton.jit
def _store_range(at, first, end, strips):
    tl.store(at, first)
    tl.store(at + 1, end)
    tl.store(at + 2, strips)


@triton.jit(do_not_specialize=["strip_tiles", "output_tiles", "row_blocks_total", "most", "counters_total", "tokens"])
def _strip_kernel(
    lengths,
    count,
    count_in_order,
    first_id,
    strip_first,
    ranges,
    pair_counts,
    counters,
    tiles,
    columns,
    features,
    strip_tiles,
    output_tiles,
    row_blocks_total,
    most,
    counters_total,
    tokens,
    workers,
    dense_fraction,
    FILTERED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ids of the columns' first tiles, of all of them unless FILTERED; cuts the columns into strips: strip_first, and
    ranges[0:5] of four, the ranges of the plan's strips. Adds to `tiles`; zeros pair_counts and counters.

    Hidden states are in order if `count_in_order` is `tokens`, or None.
    """
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    is_dense = row_blocks >= 0
    if lengths is not None:
        kept = tl.zeros((BLOCK,), tl.int32)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            kept += tl.load(lengths + column, mask=column < columns, other=0)
        is_dense = tl.sum(kept, 0).to(tl.float32) > dense_fraction * (columns * row_blocks).to(tl.float32)
    total = 0
    for block in range(0, columns, BLOCK):
        column = block + tl.arange(0, BLOCK)
        exists = column < columns
        length = tl.where(exists, row_blocks, 0)
        if FILTERED:
            length = tl.where(is_dense, length, tl.load(lengths + column, mask=exists, other=0))
        tl.store(first_id + column, total + tl.cumsum(length, 0) - length, mask=exists)
        total += tl.sum(length, 0)
        if pair_counts is not None:
            tl.store(pair_counts + column, 0, mask=exists)
    tl.store(first_id + columns, total)
    tl.store(tiles, tl.load(tiles) + total)
    tl.store(tiles + 1, tl.load(tiles + 1) + columns * row_blocks_total)
    for block in range(0, counters_total, BLOCK):
        index = block + tl.arange(0, BLOCK)
        tl.store(counters + index, 0, mask=index < counters_total)
    tl.debug_barrier()
    row_blocks = tl.maximum(row_blocks, 1)
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
    _store_range(ranges, 0, strips, strips)
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
    by_row = 0
    if count_in_order is not None:
        by_row = (tl.load(count_in_order) != tokens).to(tl.int32)
    in_order = 1 - by_row
    _store_range(ranges + 4, 0, in_output * in_order, strips * in_order)
    _store_range(ranges + 8, in_output * in_order, strips * in_order, strips * in_order)
    _store_range(ranges + 12, 0, in_output * by_row, strips * by_row)
    _store_range(ranges + 16, in_output * by_row, strips * by_row, strips * by_row)


@triton.jit(do_not_specialize=["row_blocks_total", "strip_tiles"])
def _list_kernel(
    ranks,
    lengths,
    order,
    count,
    first_id,
    strip_first,
    ranges,
    entries,
    ids,
    row_others,
    row_slots,
    rows_before,
    column_others,
    column_slots,
    column_lengths,
    seconds,
    pair_counts,
    row_blocks_total,
    columns,
    entries_total,
    strip_tiles,
    FILTER_HIDDEN: tl.constexpr,
    FILTER_WEIGHT: tl.constexpr,
    PAIRED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs write a line of tiles for each row block, the others the columns' and what goes by entry.

    With `seconds`, [column, row block], also its pairs: the other tile of one that begins a pair, -1 where that has no
    other, and -2 for those that begin none. They are counted by column, in pair_counts.
    """
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    strips = tl.load(ranges + 1)
    is_sparse = strips > 0
    FILTERED: tl.constexpr = FILTER_HIDDEN and FILTER_WEIGHT
    row_block = tl.program_id(0)
    if row_block < row_blocks_total:
        before = 0
        others = row_others + row_block.to(tl.int64) * columns
        slots = row_slots + row_block.to(tl.int64) * columns
        starts = rows_before + row_block.to(tl.int64) * (columns + 1)
        columns_here = tl.where(row_block < row_blocks, columns, 0)
        for block in range(0, columns_here, BLOCK):
            column = block + tl.arange(0, BLOCK)
            exists = column < columns
            kept = exists
            rank = tl.zeros((BLOCK,), tl.int32) + row_block
            if FILTER_HIDDEN:
                at = ranks + column.to(tl.int64) * row_blocks_total + row_block
                rank = tl.where(is_sparse, tl.load(at, mask=column < tl.where(is_sparse, columns, 0), other=-1), rank)
                kept = exists & (rank >= 0)
            id = tl.load(first_id + column, mask=exists, other=0) + (rank if FILTERED else row_block)
            place = before + tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)
            tl.store(starts + column, place, mask=exists)
            tl.store(others + place, column, mask=kept)
            tl.store(slots + place, id, mask=kept)
            before += tl.sum(kept.to(tl.int32), 0)
        tl.store(starts + columns, before)
        if seconds is not None:
            tl.debug_barrier()
            for block in range(0, tl.where(is_sparse, columns_here, 0), BLOCK):
                column = block + tl.arange(0, BLOCK)
                exists = column < columns
                begins = exists
                at = column.to(tl.int64) * row_blocks_total + row_block
                if FILTERED:
                    begins = exists & (tl.load(ranks + at, mask=exists, other=-1) >= 0)
                second = tl.full((BLOCK,), -1, tl.int32)
                if PAIRED:
                    # Where _strip_kernel cut.
                    step = strip_tiles - row_blocks_total + 1
                    strip = tl.minimum(tl.load(first_id + column, mask=exists, other=0) // step, strips - 1)
                    start = tl.load(strip_first + strip)
                    end = tl.load(strip_first + strip + 1)
                    place = column
                    if FILTERED:
                        place = tl.load(starts + column, mask=exists, other=0)
                        start = tl.load(starts + start)
                        end = tl.load(starts + end)
                    begins = begins & ((place - start) % 2 == 0)
                    has_second = begins & (place + 1 < end)
                    following = place + 1
                    if FILTERED:
                        following = tl.load(others + place + 1, mask=has_second, other=0)
                    second = tl.where(has_second, following * row_blocks_total + row_block, -1)
                tl.store(seconds + at, tl.where(begins, second, -2), mask=exists)
                tl.atomic_add(pair_counts + column, 1, mask=begins, sem="relaxed")
    else:
        index = (row_block - row_blocks_total).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        column = index // row_blocks_total
        other = (index % row_blocks_total).to(tl.int32)
        kept = (column < columns) & (other < row_blocks)
        id = tl.load(first_id + column, mask=kept, other=0) + other
        place = other
        if FILTER_WEIGHT:
            sparse = kept & (column < tl.where(is_sparse, columns, 0))
            place = tl.where(is_sparse, tl.load(ranks + index, mask=sparse, other=-1), other)
            if FILTERED:
                id += place - other
            kept = kept & (place >= 0)
        if ids is not None:
            tl.store(ids + index, id, mask=(column < columns) & (other < row_blocks))
        line = column * row_blocks_total
        tl.store(column_others + line + place, other, mask=kept)
        tl.store(column_slots + line + place, id, mask=kept)
        exists = index < columns
        length = tl.zeros((BLOCK,), tl.int32) + row_blocks
        if FILTER_WEIGHT:
            sparse = index < tl.where(is_sparse, columns, 0)
            length = tl.where(is_sparse, tl.load(lengths + index, mask=sparse, other=0), length)
        tl.store(column_lengths + index, length, mask=exists)
        entry = tl.minimum(index, entries_total).to(tl.int32)
        if order is not None:
            sparse = index < tl.where(is_sparse, entries_total, 0)
            entry = tl.load(order + index, mask=sparse, other=0).to(tl.int32) + tl.where(sparse, 0, entry)
        tl.store(entries + index, entry, mask=index < columns * TILE)


@triton.jit(do_not_specialize=["columns", "row_blocks_total"])
def _pair_kernel(
    seconds,
    pair_counts,
    count,
    ranges,
    pairs,
    first_pair,
    row_blocks_total,
    columns,
    ROW_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the pairs that begin in this program's columns, which it counts those of the columns before for."""
    # In a dense backward, a strip's pairs are known.
    columns_here = tl.where(tl.load(ranges + 1) > 0, columns, 0)
    row_blocks = tl.cdiv(tl.load(count), ROW_BLOCK)
    first = tl.program_id(0) * COLUMNS
    counted = tl.zeros((BLOCK,), tl.int32)
    for block in range(0, first, BLOCK):
        index = block + tl.arange(0, BLOCK)
        counted += tl.load(pair_counts + index, mask=index < first, other=0)
    before = tl.sum(counted, 0)
    column = first + tl.arange(0, COLUMNS)
    own = tl.load(pair_counts + column, mask=column < columns, other=0)
    # Columns past the last have none: the first of them tells of all pairs.
    tl.store(first_pair + column, before + tl.cumsum(own, 0) - own, mask=column <= columns)
    end = tl.minimum(first + COLUMNS, columns_here).to(tl.int64) * row_blocks_total
    for block in range(first.to(tl.int64) * row_blocks_total, end, BLOCK):
        index = block + tl.arange(0, BLOCK)
        is_used = (index < end) & (index % row_blocks_total < row_blocks)
        second = tl.load(seconds + index, mask=is_used, other=-2)
        begins = second > -2
        place = before + tl.cumsum(begins.to(tl.int32), 0) - begins.to(tl.int32)
        tl.store(pairs + place, index.to(tl.int32), mask=begins)
        tl.store(pairs + columns.to(tl.int64) * row_blocks_total + place, second, mask=begins)
        before += tl.sum(begins.to(tl.int32), 0)


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
    tiles: Tensor,  # [2] int64: kept tiles and all tiles are added to it
    in_order: Places | None = None,
) -> Plan:
    """``activity`` None, or a gradient that is not filtered, keeps every tile.

    The workspace has room for ``strip_tiles`` >= 2 ``row_blocks`` tiles, the whole gradient of the weight for
    ``output_tiles``, 0 if it is not asked for. With ``in_order`` hidden states are only if all those places are in use.
    """
    columns = ceil_div(vocabulary, config.entry_tile)
    kept = None if activity is None else kept_tiles(activity, count, row_blocks, columns, vocabulary, config)
    # A dense strip has, rounded to whole rounds of the programs, no less than half of the pairs that would fit.
    dense_columns = 2 * max(strip_tiles // (2 * row_blocks) // 2, 1)
    most = max(ceil_div(columns * row_blocks, strip_tiles - row_blocks + 1), ceil_div(columns, dense_columns))

    def empty(*shape: int) -> Tensor:
        return count.new_empty(shape)

    plan = Plan(
        entries=empty(columns * config.entry_tile),
        ranks=kept and kept.ranks,
        ids=kept and empty(columns * row_blocks),
        first_id=empty(columns + 1),
        pairs=kept and empty(2, columns * row_blocks),
        first_pair=kept and empty(columns + 1),
        strip_first=empty(most + 1),
        # Rows of whole 16 bytes: kernels are compiled for what is aligned so.
        ranges=empty(5, 4),
        counters=empty(5, ceil_div(most + 1, 4) * 4),
        rows=Lines(empty(columns * row_blocks), empty(columns * row_blocks)),
        rows_before=empty(row_blocks, columns + 1),
        columns=Lines(empty(columns * row_blocks), empty(columns * row_blocks)),
        columns_length=empty(columns),
        columns_total=columns,
    )
    filter_hidden, filter_weight = kept is not None and filter_hidden, kept is not None and filter_weight
    _, _, lengths, seconds, pair_counts = kept or NOTHING_KEPT
    launch(
        _strip_kernel,
        (1,),
        (
            lengths,
            count,
            in_order and in_order.count,
            plan.first_id,
            plan.strip_first,
            plan.ranges,
            pair_counts,
            plan.counters,
            tiles,
            columns,
            features,
            strip_tiles,
            output_tiles,
            row_blocks,
            most,
            plan.counters.numel(),
            in_order.rows.numel() if in_order else 0,
            programs(count.device),
            DENSE_FRACTION,
        ),
        FILTERED=filter_hidden and filter_weight,
        ROW_BLOCK=config.row_block,
        SEARCH=columns.bit_length() + 1,
        BLOCK=1024,
    )
    _list_tiles(plan, kept, filter_hidden, filter_weight, count, row_blocks, vocabulary, strip_tiles, config)
    if kept:
        launch(
            _pair_kernel,
            (ceil_div(columns + 1, 16),),
            (
                seconds,
                pair_counts,
                count,
                plan.ranges,
                plan.pairs,
                plan.first_pair,
                row_blocks,
                columns,
            ),
            ROW_BLOCK=config.row_block,
            COLUMNS=16,
            BLOCK=1024,
        )
    return plan


def _list_tiles(
    plan: Plan,  # filled
    kept: Kept | None,  # seconds and pair_counts filled
    filter_hidden: bool,
    filter_weight: bool,
    count: Tensor,
    row_blocks: int,
    vocabulary: int,
    strip_tiles: int,
    config: Config,
) -> None:
    columns = plan.columns_total
    order, ranks, lengths, seconds, pair_counts = kept or NOTHING_KEPT
    launch(
        _list_kernel,
        (row_blocks + ceil_div(columns * max(row_blocks, config.entry_tile), 1024),),
        (
            ranks,
            lengths,
            order,
            count,
            plan.first_id,
            plan.strip_first,
            plan.ranges,
            plan.entries,
            plan.ids,
            plan.rows.other,
            plan.rows.slot,
            plan.rows_before,
            plan.columns.other,
            plan.columns.slot,
            plan.columns_length,
            seconds,
            pair_counts,
            row_blocks,
            columns,
            vocabulary,
            strip_tiles,
        ),
        # Two tiles side by side make one wide product; with a forward no wider than a tile, one alone.
        PAIRED=config.forward_entries > config.entry_tile,
        FILTER_HIDDEN=filter_hidden,
        FILTER_WEIGHT=filter_weight,
        ROW_BLOCK=config.row_block,
        TILE=config.entry_tile,
        BLOCK=1024,
    )
