"""Packs the active columns of strips: the values of an entry for the tokens of a row block, one after the other.

They wait there, those of several strips, for a second product that reads nothing else: each product reads and writes
all of u'. What is dropped is summed by column as well, for a sample of tokens and of tiles: see dropped_mean.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.division import GROUPS, Sample
from torchtune_lce.kernels.exponentials import Strip
from torchtune_lce.kernels.keep_rule import decide
from torchtune_lce.kernels.launching import Repeated
from torchtune_lce.kernels.operands import Piece
from torchtune_lce.kernels.overflow import OVERFLOWS
from torchtune_lce.kernels.primitives import WORD_BITS, bits_set
from torchtune_lce.kernels.tuning import Config, ceil_div

# Of a tile, the tokens of one such part of a row block are sampled.
SAMPLED_PARTS = tl.constexpr(4)
TILES_A_PROGRAM = 4


@dataclass(frozen=True)
class Dropped:
    """What the strips of a piece of M tokens leave out."""

    sample: Sample
    # [2, 2, M] float32, by parity of the strip: sums of E of all entries through it, and of those that were dropped.
    running: Tensor
    columns: Tensor  # [GROUPS, sampled entries] float32: sums over sampled tokens of E c / floor, of inactive entries
    masses: Tensor  # [GROUPS, sampled tiles] float32: the same of E, over the entries of a tile
    is_whole: Tensor  # [strips, row blocks] int32: 1 where a row block keeps a strip whole, active or not
    means: Tensor  # [parts, GROUPS, D] float32: their sum over parts is what a unit of dropped mass adds to u'
    kept: Tensor  # [row blocks] int32: columns kept of all strips; 0 of row blocks without tokens in use
    mass: Tensor  # [M] float32: sums of E that were dropped, through the last strip

    @staticmethod
    def empty(piece: Piece, sample: Sample, kept: Tensor, strip: Strip, config: Config) -> Dropped:
        vocabulary, features = piece.operands.weight.shape

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return kept.new_empty(shape, dtype=dtype)

        running = empty(2, 2, piece.tokens)
        strips = len(strip.parts(ceil_div(vocabulary, config.forward_entries)))
        return Dropped(
            sample,
            running,
            empty(GROUPS.value, sample.tiles * config.forward_entries),
            empty(GROUPS.value, sample.tiles),
            empty(strips, kept.numel(), dtype=torch.int32),
            empty(sample.parts(features, kept.device, config), GROUPS.value, features),
            kept,
            running[(strips - 1) % 2, 1],
        )


@triton.jit
def sampled_block(nth, group, blocks_a_group, used, ROW_BLOCK: tl.constexpr):
    """Which row block of a group the nth sampled tile is looked at for, and how many turns of that one came before.

    All that have tokens in use, in turn: what one keeps whole says nothing of what the others drop.
    """
    first = group * blocks_a_group
    blocks = tl.maximum(tl.minimum(tl.cdiv(used, ROW_BLOCK) - first, blocks_a_group), 1)
    return first + nth % blocks, nth // blocks


@triton.jit(
    do_not_specialize=[
        "first_place",
        "tokens",
        "row_blocks",
        "first_sampled",
        "blocks_a_group",
        "sampled_tiles",
        "number",
        "first_tile",
        "tiles",
    ]
)
def _pack_kernel(
    words,
    strip,
    dropped_sums,
    floors,
    packed,
    packed_entries,
    sums,
    targets,
    references,
    running,
    waiting,
    due,
    strip_is_whole,
    kept,
    dropped_columns,
    dropped_masses,
    count,
    first_place,
    tokens,
    entries_total,
    words_stride,
    strip_stride,
    slots,
    row_blocks,
    first_sampled,
    sample_every,
    blocks_a_group,
    sampled_tiles,
    log2_scale,
    number,
    first_tile,
    tiles,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS_A_STEP: tl.constexpr,
):
    """Of a row block and TILES tiles: their active columns, behind those that wait, as far as there are slots.

    And of sampled tiles the sums of what is not active, over some of the tokens: see :func:`sampled_block`. A row
    block's last program decides what it keeps, beside the others.
    """
    row_block = tl.program_id(0)
    first = tl.program_id(1) * TILES
    used = tl.minimum(tl.load(count) - first_place, tokens)
    in_use = row_block * ROW_BLOCK < used
    if in_use & (first >= tiles):
        decide(
            words + row_block.to(tl.int64) * words_stride,
            sums,
            dropped_sums,
            targets,
            references,
            running,
            waiting,
            due,
            strip_is_whole,
            kept,
            row_block,
            row_blocks,
            used,
            tokens,
            entries_total,
            slots,
            log2_scale,
            number,
            first_tile,
            tiles,
            ROW_BLOCK,
            ENTRIES,
        )
    # Of a row block without tokens in use no bit is set anywhere.
    in_use = in_use & (first < tiles)
    WORDS: tl.constexpr = ENTRIES // WORD_BITS
    SPAN: tl.constexpr = TILES * ENTRIES
    own_words = words + row_block.to(tl.int64) * words_stride
    in_span = tl.arange(0, SPAN)
    before = tl.where(in_use, first * WORDS, 0)
    set_before = tl.zeros((SPAN,), tl.int32)
    for start in range(0, before, SPAN):
        set_before += bits_set(tl.load(own_words + start + in_span, mask=start + in_span < before, other=0))
    waiting_here = tl.load(waiting + number % 2 * 2 * row_blocks + row_block, mask=number > 0, other=0)
    first_slot = waiting_here + tl.sum(set_before, 0)
    exists = in_span < tl.where(in_use, (tiles - first) * ENTRIES, 0)
    at = (first + in_span // ENTRIES) * WORDS + in_span % WORDS
    is_active = (tl.load(own_words + at, mask=exists, other=0) >> (in_span % ENTRIES // WORDS)) & 1
    slot = first_slot + tl.cumsum(is_active, 0) - 1
    own_entries = packed_entries + row_block.to(tl.int64) * slots
    first_entry = first_tile * ENTRIES
    tl.store(own_entries + slot, first_entry + first * ENTRIES + in_span, mask=(is_active > 0) & (slot < slots))
    end = first_slot + tl.sum(is_active, 0)

    # What some threads have listed, others read.
    tl.debug_barrier()
    in_step = tl.arange(0, SLOTS_A_STEP)
    in_block = tl.arange(0, ROW_BLOCK)
    own_packed = packed + row_block.to(tl.int64) * slots * ROW_BLOCK + in_block[None, :]
    own_columns = strip + row_block * ROW_BLOCK + in_block[None, :]
    for start in range(first_slot, tl.minimum(end, slots), SLOTS_A_STEP):
        slot_here = start + in_step
        listed = slot_here < tl.minimum(end, slots)
        column = tl.load(own_entries + slot_here, mask=listed, other=0) - first_entry
        # Of tokens that are not in use there may be anything: it stays in their rows.
        values = tl.load(own_columns + column.to(tl.int64)[:, None] * strip_stride, mask=listed[:, None], other=0.0)
        tl.store(own_packed + slot_here.to(tl.int64)[:, None] * ROW_BLOCK, values, mask=listed[:, None])

    group = row_block // blocks_a_group
    PART: tl.constexpr = ROW_BLOCK // SAMPLED_PARTS
    parts = tl.cdiv(tl.minimum(used - row_block * ROW_BLOCK, ROW_BLOCK), PART)
    in_tile = tl.arange(0, ENTRIES)
    # The first sampled tile from `first` on.
    passed = tl.maximum(first_tile + first - first_sampled + sample_every - 1, 0) // sample_every
    next_tile = first_sampled + passed * sample_every - first_tile
    last = tl.where(in_use, tl.minimum(first + TILES, tiles), 0)
    for tile in range(next_tile, last, sample_every):
        nth = (first_tile + tile - first_sampled) // sample_every
        block, turn = sampled_block(nth, group, blocks_a_group, used, ROW_BLOCK)
        if block == row_block:
            sampled = row_block * ROW_BLOCK + turn % parts * PART + tl.arange(0, PART)
            floor = tl.load(floors + sampled, mask=sampled < used, other=0.0)
            counts = (floor > 0) & (floor < OVERFLOWS)
            scale = tl.where(counts, 1 / tl.where(counts, floor, 1.0), 0.0)
            word_at = tile * WORDS + in_tile % WORDS
            is_left = ((tl.load(own_words + word_at) >> (in_tile // WORDS)) & 1) == 0
            e_at = strip + (tile * ENTRIES + in_tile).to(tl.int64)[None, :] * strip_stride + sampled[:, None]
            e = tl.load(e_at, mask=(sampled < used)[:, None] & is_left[None, :], other=0.0).to(tl.float32)
            by_column = tl.sum(tl.where(e < OVERFLOWS, e * scale[:, None], 0.0), 0)
            at_group = group.to(tl.int64) * sampled_tiles + nth
            tl.store(dropped_columns + at_group * ENTRIES + in_tile, by_column)
            mass = tl.load(dropped_sums + tile * tokens.to(tl.int64) + sampled, mask=sampled < used, other=0.0)
            tl.store(dropped_masses + at_group, tl.sum(tl.where(mass < OVERFLOWS, mass * scale, 0.0), 0))


def pack_active(
    piece: Piece,
    strip: Strip,  # packed, entries, waiting and due are filled
    tile_sums: Tensor,  # [tiles, M] float32
    dropped: Dropped,  # all but means are filled
    config: Config,
) -> Callable[[int, int, int], None]:
    """What launches it for a strip: its number, its first tile of the vocabulary, and how many tiles it has."""
    sample = dropped.sample
    row_blocks = ceil_div(piece.tokens, config.row_block)
    kernel = Repeated(
        _pack_kernel,
        (
            strip.words,
            strip.values,
            strip.dropped_sums,
            piece.floors,
            strip.packed,
            strip.entries,
            tile_sums,
            piece.targets,
            piece.references,
            dropped.running,
            strip.waiting,
            strip.due,
            dropped.is_whole,
            dropped.kept,
            dropped.columns,
            dropped.masses,
            piece.count,
            piece.first,
            piece.tokens,
            piece.operands.weight.shape[0],
            strip.words.stride(0),
            strip.values.stride(0),
            strip.entries.stride(0),
            strip.waiting.stride(1),
            sample.first,
            sample.every,
            sample.blocks_a_group,
            sample.tiles,
            piece.operands.log2_scale,
        ),
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        TILES=TILES_A_PROGRAM,
        SLOTS_A_STEP=32,
        num_warps=4,
    )

    def launch(number: int, first: int, tiles: int) -> None:
        kernel((row_blocks, ceil_div(tiles, TILES_A_PROGRAM) + 1), number, first, tiles)

    return launch
