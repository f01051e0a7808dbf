"""A strip of the vocabulary: exponentials of its logits, measured from each token's reference, and their sums.

With a filter an entry is active in a row block if some of its tokens gives it ``filter_eps`` or more of what is known
of its softmax's denominator, a lower bound: from the sample before any strip, and the strips before this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.division import first_tiles, strip_dtype
from torchtune_lce.kernels.launching import Repeated
from torchtune_lce.kernels.operands import Ordered, Piece
from torchtune_lce.kernels.primitives import (
    WORD_BITS,
    bitwise_or,
    multiply_add,
    rounded_to_tf32,
    softcap_slope,
    softcapped,
    tile_coordinates,
    times_log2,
)
from torchtune_lce.kernels.tuning import Config, ceil_div, programs


@triton.jit
def strip_logits(
    states,
    state_blocks,
    weight,
    weight_blocks,
    bias,
    row_block,
    tile,
    used,
    entries_total,
    features,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a row block of `states` [M, features], places below `used`, by a tile of entries; float32."""
    place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    present = place < used
    entries = tile * ENTRIES + tl.arange(0, ENTRIES)
    logits = tl.zeros((ROW_BLOCK, ENTRIES), tl.float32)
    if TMA:
        for start in range(0, features, BLOCK_D):
            a = state_blocks.load([row_block * ROW_BLOCK, start])
            b = weight_blocks.load([tile * ENTRIES, start])
            logits = tl.dot(a, b.T, logits, input_precision=PRECISION)
    else:
        depth = tl.arange(0, BLOCK_D)
        state_rows = states + place.to(tl.int64)[:, None] * features
        weight_rows = weight + entries.to(tl.int64)[None, :] * weight_stride
        exists = (entries < entries_total)[None, :]
        for start in range(0, features, BLOCK_D):
            d = start + depth
            a = tl.load(state_rows + d[None, :], mask=present[:, None] & (d < features)[None, :], other=0.0)
            b = tl.load(weight_rows + d[:, None], mask=exists & (d < features)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + entries, mask=entries < entries_total, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = softcapped(logits, softcap)
    return logits


@triton.jit
def store_by_entry(
    values,
    strip,
    strip_blocks,
    strip_stride,
    first_column,
    first_place,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A tile of places by entries to rows `first_column` on of the strip, places `first_place` on."""
    if strip_blocks is not None:
        strip_blocks.store([first_column, first_place], values.T)
    else:
        # Whole row blocks, as the copy engine stores them: columns are copied so. In halves: reordered for wide
        # stores, all of a tile would not fit beside the operands.
        HALF: tl.constexpr = ENTRIES // 2
        left, right = values.reshape(ROW_BLOCK, 2, HALF).permute(0, 2, 1).split()
        half = first_column + tl.arange(0, HALF)
        at = strip + half.to(tl.int64)[None, :] * strip_stride + (first_place + tl.arange(0, ROW_BLOCK))[:, None]
        tl.store(at, left)
        tl.store(at + HALF * strip_stride, right)


class Sums(NamedTuple):
    """By tile and place, or by place, float32; a walk over strips fills them."""

    powers: Tensor  # of E
    exponents: Tensor | None  # of E times its exponent of 2
    capped: Tensor | None  # of all entries' capped logits, over V

    @staticmethod
    def of(kinds: Tensor, with_entropy: bool, with_mean: bool) -> Sums:
        """``kinds``: one after the other, those that are wanted."""
        return Sums(kinds[0], kinds[1] if with_entropy else None, kinds[-1] if with_mean else None)


@triton.jit(do_not_specialize=["first_place", "tokens", "number", "first_tile", "tiles"])
def _exponential_kernel(
    states,
    state_blocks,
    weight,
    weight_blocks,
    bias,
    labels,
    references,
    floors,
    running,
    strip,
    strip_blocks,
    sums: Sums,
    dropped_sums,
    words,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_stride,
    words_stride,
    softcap,
    log2_scale,
    eps,
    number,
    first_tile,
    tiles,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FILTER: tl.constexpr,
    TMA: tl.constexpr,
    RAGGED: tl.constexpr,
    FOR_TF32: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E of `tiles` tiles of ENTRIES entries from `first_tile` on, and each tile's sums a token, [tile, place].

    The target's own cell is 0 in sums of E. What is stored, by entry, is E times the softcap's derivative; sums
    are of E alone. With FILTER also a bit for each row block and entry, 1 where active, and each tile's sums over the
    entries that are not.
    Entry e of a tile of W words is bit e // W of its word e % W, the order in which one thread holds its columns.
    """
    used = tl.minimum(tl.load(count) - first_place, tokens)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    for index in tl.range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0), flatten=TMA):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        tile = first_tile + column
        place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        present = place < used
        in_tile = tl.arange(0, ENTRIES)
        entries = tile * ENTRIES + in_tile
        logits = strip_logits(
            states,
            state_blocks,
            weight,
            weight_blocks,
            bias,
            row_block,
            tile,
            used,
            entries_total,
            features,
            weight_stride,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            TMA,
            ROW_BLOCK,
            ENTRIES,
            BLOCK_D,
            PRECISION,
        )
        if sums.capped is not None:
            # First, while nothing else is held. Past the vocabulary they are 0.
            of_tile = tl.sum(logits, 1) * (1.0 / entries_total)
            tl.store(sums.capped + tile.to(tl.int64) * tokens + place, of_tile, mask=present)
        # Of what is held nothing is multiplied past the places in use but zeros, whatever a bias says.
        reference = tl.load(references + place, mask=present, other=float("inf"))
        powers = tl.exp2(multiply_add(logits, log2_scale, (reference * -log2_scale)[:, None]))
        own = tl.load(labels + place, mask=present, other=0).to(tl.int32) - tile * ENTRIES
        left_out = in_tile[None, :] == own[:, None]
        if RAGGED:
            left_out = left_out | (entries >= entries_total)[None, :]
        powers = tl.where(left_out, 0.0, powers)
        at_tile = tile.to(tl.int64) * tokens + place
        tl.store(sums.powers + at_tile, tl.sum(powers, 1), mask=present)
        if sums.exponents is not None:
            # Not of the exponents themselves: for those beside their powers there are no registers.
            tl.store(sums.exponents + at_tile, tl.sum(times_log2(powers), 1), mask=present)
        if FILTER:
            WORDS: tl.constexpr = ENTRIES // WORD_BITS
            least = tl.load(floors + place, mask=present, other=float("inf"))
            known = running + ((number + 1) % 2).to(tl.int64) * 2 * tokens + place
            before = tl.load(known, mask=place < tl.where(number > 0, used, 0), other=0.0)
            # A NaN stays one, and has no vote.
            least = tl.where(before > least, before, least) * eps
            votes = tl.reshape(powers > least[:, None], (ROW_BLOCK, WORD_BITS, WORDS))
            in_word = tl.arange(0, WORD_BITS)
            word = tl.reduce(tl.sum(tl.where(votes, 1 << in_word[None, :, None], 0), 1), 0, bitwise_or)
            own_words = words + row_block.to(tl.int64) * words_stride + column * WORDS
            tl.store(own_words + tl.arange(0, WORDS), word)
            is_active = (word[None, None, :] >> in_word[None, :, None]) & 1
            left = tl.where(is_active > 0, 0.0, tl.reshape(powers, (ROW_BLOCK, WORD_BITS, WORDS)))
            dropped = tl.sum(tl.sum(left, 1), 1)
            tl.store(dropped_sums + column.to(tl.int64) * tokens + place, dropped, mask=present)
        if HAS_SOFTCAP:
            powers *= softcap_slope(logits, softcap)
        if FOR_TF32:
            powers = rounded_to_tf32(powers)
        values = powers.to(strip.dtype.element_ty)
        store_by_entry(
            values,
            strip,
            strip_blocks,
            strip_stride,
            column * ENTRIES,
            row_block * ROW_BLOCK,
            ROW_BLOCK,
            ENTRIES,
        )


@dataclass(frozen=True)
class Strip:
    """Memory of the widest strip of M places; with a filter also which entries of it are active, and their columns.

    A column is the values of an entry for the tokens of a row block: one run of memory, M being whole row blocks. Those
    of active entries are copied to where they wait for a product with those of later strips. Where there is no room for
    a strip's, the row block keeps it whole.
    """

    tiles: int
    # Of the first strip: fewer with a filter, since it knows least of the denominators, and where the last one is held.
    first_tiles: int
    values: Tensor  # [entries, M] of strip_dtype: E times the softcap's derivative
    words: Tensor | None  # [row blocks, entries / 32] int32: a bit an entry, as _exponential_kernel orders them
    dropped_sums: Tensor | None  # [tiles, M] float32: sums of E over a tile's entries that are not active
    packed: Tensor | None  # [row blocks, slots, tokens of a row block]: active columns of ``values``, in their order
    entries: Tensor | None  # [row blocks, slots] int32: whose columns those are
    waiting: Tensor | None  # [2, 2, row blocks] int32, by parity of the strip: how many wait; whether u' has any
    # [4, row blocks] int32, of this strip: columns to multiply, entries to, whether u' is written, and whether it was.
    due: Tensor | None

    @staticmethod
    def empty(places: int, tiles: int, slots: int | None, hidden: Tensor, config: Config) -> Strip:
        """``slots`` None: nothing is filtered."""
        entries = tiles * config.forward_entries
        row_blocks = ceil_div(places, config.row_block)
        values = hidden.new_empty((entries, row_blocks * config.row_block), dtype=strip_dtype(hidden.dtype))
        if slots is None:
            return Strip(tiles, tiles, values, *[None] * 6)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return hidden.new_empty(shape, dtype=dtype)

        return Strip(
            tiles,
            first_tiles(tiles, filters=True),
            values,
            # Rows of whole 64 bytes: kernels are compiled for a stride that is a multiple of 16 or for one that is not.
            empty(row_blocks, ceil_div(entries // WORD_BITS.value, 16) * 16, dtype=torch.int32),
            empty(tiles, places, dtype=torch.float32),
            empty(row_blocks, slots, config.row_block, dtype=values.dtype),
            empty(row_blocks, slots, dtype=torch.int32),
            empty(2, 2, row_blocks, dtype=torch.int32),
            empty(4, row_blocks, dtype=torch.int32),
        )

    @staticmethod
    def held(values: Tensor, of_tiles: int, config: Config) -> Strip:
        """Nothing is filtered, and the last strip ``of_tiles``, a whole one, stays in ``values``."""
        tiles = values.shape[0] // config.forward_entries
        return Strip(tiles, (of_tiles - 1) % tiles + 1, values, *[None] * 6)

    def parts(self, tiles: int) -> list[tuple[int, int]]:
        """(first tile, tiles) of each strip of so many."""
        starts = [0, *range(self.first_tiles, tiles, self.tiles)]
        return [(start, end - start) for start, end in itertools.pairwise([*starts, tiles])]


@dataclass(frozen=True)
class Blocks:
    """Descriptors of a piece's states, of the weight and of the strip, None where the copy engine cannot read them.

    ``weight`` and ``stored`` are a tile of the forward's, ``weight_rows`` and ``columns`` a step of the second
    product's; the copy engine stores 16 bits alone.
    """

    states: object | None = None
    weight: object | None = None
    stored: object | None = None
    weight_rows: object | None = None
    columns: object | None = None

    @staticmethod
    def of_logits(states: Tensor, weight: Tensor, config: Config) -> Blocks:
        if not has_blocks(config, states, weight):
            return Blocks()
        return Blocks(
            in_blocks(states, config.row_block, config.block_d),
            in_blocks(weight, config.forward_entries, config.block_d),
        )

    @staticmethod
    def of(piece: Ordered, strip: Strip, depth: int, features: int, config: Config) -> Blocks:
        """``depth`` and ``features`` of a step of the second product."""
        weight = piece.operands.weight
        blocks = Blocks.of_logits(piece.states, weight, config)
        if blocks.states is None:
            return blocks
        stored = None
        if strip.values.element_size() == 2 and config.stores_transposed:
            stored = in_blocks(strip.values, config.forward_entries, config.row_block)
        return Blocks(
            blocks.states,
            blocks.weight,
            stored,
            in_blocks(weight, depth, features),
            in_blocks(strip.values, depth, config.row_block),
        )


def strip_exponentials(
    piece: Piece,
    strip: Strip,  # filled
    blocks: Blocks,
    tile_sums: Sums,  # filled for the strip's tiles
    running: Tensor | None,  # [2, 2, M] float32: with a filter, see :class:`Dropped`
    eps: float | None,
    config: Config,
) -> Callable[[int, int, int], None]:
    """What launches it for a strip: its number, its first tile of the vocabulary, and how many tiles it has."""
    operands, states = piece.operands, piece.states
    vocabulary, features = operands.weight.shape
    row_blocks = ceil_div(piece.tokens, config.row_block)
    kernel = Repeated(
        _exponential_kernel,
        (
            states,
            blocks.states,
            operands.weight,
            blocks.weight,
            operands.bias,
            piece.labels,
            piece.references,
            piece.floors,
            running,
            strip.values,
            blocks.stored,
            tile_sums,
            strip.dropped_sums,
            strip.words,
            piece.count,
            piece.first,
            piece.tokens,
            vocabulary,
            features,
            operands.weight.stride(0),
            strip.values.stride(0),
            strip.words.stride(0) if eps is not None else 0,
            operands.softcap or 1.0,
            operands.log2_scale,
            eps or 0.0,
        ),
        HAS_BIAS=operands.bias is not None,
        HAS_SOFTCAP=operands.softcap is not None,
        FILTER=eps is not None,
        TMA=blocks.states is not None,
        FOR_TF32=states.dtype == torch.float16,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        BLOCK_D=config.block_d,
        GROUP=config.group,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.forward_stages,
    )

    workers = programs(states.device)

    def launch(number: int, first: int, tiles: int) -> None:
        ragged = (first + tiles) * config.forward_entries > vocabulary
        kernel((min(workers, row_blocks * tiles),), number, first, tiles, RAGGED=ragged)

    return launch
