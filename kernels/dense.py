"""Loss and hidden gradient in one walk over the vocabulary, nothing filtered: for a projection that is not trained.

With E = exp(logit - reference), measured a row from its target's logit (reference_logits.py), and S' and u' the sums of
E and of E c w over all entries but the target, c being the softcap's derivative:

    loss = log(1 + S' / T),    gradient of loss and log-sum-exp by hidden = g (u' - S' c_t w_t) / (T + S') + ...

with T = E of the target; row_gradients.py has all of it. So what u' needs of a strip of the vocabulary is known as soon
as the strip's logits are: one kernel leaves E of the strip and its row sums, a second product adds E times the strip's
weight rows to u'. The backward then has no kernel that sees the vocabulary. The workspace holds one strip and u'. Where
it is small, tokens are taken in pieces: with narrow strips the sums would be read and written too often.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.operands import Operands, Piece
from torchtune_lce.kernels.overflow import redo_overflown
from torchtune_lce.kernels.primitives import (
    LOG2_E_SINGLE,
    multiply_add,
    rounded_to_tf32,
    softcap_slope,
    softcapped,
    tile_coordinates,
)
from torchtune_lce.kernels.reference_logits import reference_logits
from torchtune_lce.kernels.row_gradients import finish_rows
from torchtune_lce.kernels.tuning import LAUNCH, Config, programs

# How full our tiles of the second product must make the card for our own kernel, which takes the tokens in use alone.
# Below it cuBLAS, which parts the sums too, is faster, though it multiplies ignored tokens as well.
LEAST_FILL = 0.8


@triton.jit(do_not_specialize=["first_place", "tokens", "first_tile", "tiles"])
def _exponential_kernel(
    states,
    state_blocks,
    weight,
    weight_blocks,
    bias,
    labels,
    references,
    strip,
    strip_blocks,
    sums,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_width,
    first_tile,
    tiles,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    RAGGED: tl.constexpr,
    FOR_TF32: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E of `tiles` tiles of ENTRIES entries from `first_tile` on, and each tile's sum of it a token: sums[tile, place].

    The target's own cell is 0, in both. What is stored is E times the softcap's derivative; sums are of E alone.
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
        reference = tl.load(references + place, mask=present, other=0.0)
        powers = tl.exp2(multiply_add(logits, LOG2_E_SINGLE, (reference * -LOG2_E_SINGLE)[:, None]))
        own = tl.load(labels + place, mask=present, other=0).to(tl.int32) - tile * ENTRIES
        left_out = in_tile[None, :] == own[:, None]
        if RAGGED:
            left_out = left_out | (entries >= entries_total)[None, :]
        powers = tl.where(left_out, 0.0, powers)
        tl.store(sums + tile.to(tl.int64) * tokens + place, tl.sum(powers, 1), mask=present)
        if HAS_SOFTCAP:
            powers *= softcap_slope(logits, softcap)
        if FOR_TF32:
            powers = rounded_to_tf32(powers)
        values = powers.to(strip.dtype.element_ty)
        if TMA and strip.dtype.element_ty != tl.float32:
            strip_blocks.store([row_block * ROW_BLOCK, column * ENTRIES], values)
        else:
            # In halves: reordered for wide stores, all of a tile would not fit beside the operands.
            HALF: tl.constexpr = ENTRIES // 2
            left, right = values.reshape(ROW_BLOCK, 2, HALF).permute(0, 2, 1).split()
            half = column * ENTRIES + tl.arange(0, HALF)
            at = strip + place.to(tl.int64)[:, None] * strip_width + half[None, :]
            tl.store(at, left, mask=present[:, None])
            tl.store(at + HALF, right, mask=present[:, None])


@triton.jit(do_not_specialize=["first_place", "tokens", "first_entry", "depth"])
def _product_kernel(
    strip,
    strip_blocks,
    weight,
    weight_blocks,
    totals,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_width,
    first_entry,
    depth,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """totals [tokens, D] += strip[:, :depth] @ weight[first_entry:]; the first strip sets them."""
    used = tl.minimum(tl.load(count) - first_place, tokens)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    chunks = tl.cdiv(features, FEATURES)
    HALF: tl.constexpr = FEATURES // 2
    for index in tl.range(tl.program_id(0), row_blocks * chunks, tl.num_programs(0), flatten=TMA):
        row_block, chunk = tile_coordinates(index, row_blocks, chunks, GROUP)
        place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        present = place < used
        total = tl.zeros((ROW_BLOCK, FEATURES), tl.float32)
        if TMA:
            for start in range(0, depth, BLOCK_K):
                e = strip_blocks.load([row_block * ROW_BLOCK, start])
                w = weight_blocks.load([first_entry + start, chunk * FEATURES])
                total = tl.dot(e, w.to(e.dtype), total, input_precision=PRECISION)
        else:
            d = chunk * FEATURES + tl.arange(0, FEATURES)
            in_step = tl.arange(0, BLOCK_K)
            strip_rows = strip + place.to(tl.int64)[:, None] * strip_width + in_step[None, :]
            for start in range(0, depth, BLOCK_K):
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


# Tiles are added in their order, from the first on, whatever strips they came in, and how threads share the work must
# not depend on whether a number is a multiple of 16: a token's sum has the same bits in any company.
@triton.jit(do_not_specialize=["first_place", "tokens", "tiles"])
def _row_sum_kernel(sums, row_sums, count, first_place, tokens, tiles, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """row_sums[place] = sum of sums[:, place]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = place < tl.minimum(tl.load(count) - first_place, tokens)
    tile = tl.arange(0, TILES)
    total = tl.zeros((BLOCK,), tl.float32)
    parts = sums + tile.to(tl.int64)[:, None] * tokens + place[None, :]
    for first in range(0, tiles, TILES):
        mask = (first + tile < tiles)[:, None] & present[None, :]
        total += tl.sum(tl.load(parts, mask=mask, other=0.0), 0)
        parts += TILES * tokens.to(tl.int64)
    tl.store(row_sums + place, total, mask=present)


@dataclass(frozen=True)
class Division:
    """How tokens and vocabulary are walked within a workspace."""

    tokens: int  # of a piece, whole row blocks; the last may be shorter
    tiles: int  # of a strip, of config.forward_entries entries; the last strip may have fewer


# What an H100 was measured to lose, in rounds of its 132 programs with a tile of logits each: by a token of a strip for
# sums that are read and written; by a strip, times the features, for two launches; and by tiles of half as many
# features, how many times as long they take, since what they load serves fewer products.
ROUNDS_A_TOKEN, ROUNDS_A_STRIP, HALF_A_CHUNK = 1.6e-4, 800, 1.3


@cache
def divide(
    tokens: int, vocabulary: int, features: int, dtype: torch.dtype, workspace: int, workers: int, config: Config
) -> Division:
    """The division that takes the fewest rounds within ``workspace`` bytes; the smallest one if none fits.

    Among few, since every number of tokens that a training meets is divided.
    """
    tiles = _ceil(vocabulary, config.forward_entries)
    row_blocks = _ceil(tokens, config.row_block)
    best, least = Division(config.row_block, 1), math.inf
    for pieces in itertools.takewhile(row_blocks.__ge__, _numbers_of_pieces()):
        blocks = _ceil(row_blocks, pieces)
        places = min(blocks * config.row_block, tokens)
        room = workspace - places * _bytes_beside(tiles, features)
        widest = min(room // (places * config.forward_entries * strip_dtype(dtype).itemsize), tiles)
        if widest < 1:
            continue
        fewest = _ceil(tiles, widest)
        for strips in range(fewest, min(fewest + 3, tiles) + 1):
            width = _ceil(tiles, strips)
            a_strip = _strip_rounds(blocks, width, features, dtype, workers, config)
            rounds = _ceil(row_blocks, blocks) * _ceil(tiles, width) * a_strip
            if rounds < least:
                best, least = Division(blocks * config.row_block, width), rounds
        if widest == tiles:
            break
    return best


def _numbers_of_pieces() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on."""
    yield 1
    for power in itertools.count(1):
        yield 2**power
        yield 3 * 2 ** (power - 1)


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _bytes_beside(tiles: int, features: int) -> int:
    """Workspace of a token beside its strip: u', the sums of all tiles, S', and where its row is done again."""
    return 4 * (features + max(tiles, 2) + 3)


def _strip_rounds(blocks: int, width: int, features: int, dtype: torch.dtype, workers: int, config: Config) -> float:
    sums = min(_product_rounds(blocks, features, chunk, workers, config) for chunk in _chunks(dtype, config))
    lost = blocks * config.row_block * ROUNDS_A_TOKEN + ROUNDS_A_STRIP / features
    return _ceil(blocks * width, workers) + sums * width + lost


def _product_rounds(blocks: int, features: int, chunk: int, workers: int, config: Config) -> float:
    """Of the second product, a tile of a strip's width."""
    slowness = 1 if chunk == config.features else HALF_A_CHUNK
    return _ceil(blocks * _ceil(features, chunk), workers) * chunk / features * slowness


def _fill(row_blocks: int, features: int, workers: int, config: Config) -> float:
    """Of the programs in the rounds that the second product's tiles take, how many have one."""
    tiles = row_blocks * _ceil(features, config.features)
    return tiles / (_ceil(tiles, workers) * workers)


def _chunks(dtype: torch.dtype, config: Config) -> tuple[int, ...]:
    """How many columns of D a program of the second product may sum at once."""
    if dtype == torch.float16:
        return (config.entry_tile,)  # its operands are float32
    return config.features, config.features // 2


def strip_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of E for inputs of a dtype: float16 has no room for it, and its products are taken in tf32, which holds it."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def product_precision(dtype: torch.dtype, config: Config) -> str:
    return "tf32" if dtype == torch.float16 else config.precision


def dense_rows(
    operands: Operands,  # without an adapter
    targets: Tensor,  # [N], as they came: where one names no entry, its token's results are NaN
    rows: Tensor,  # [N] int64: rows of hidden, those in use first
    labels: Tensor,  # [N], in that order
    count: Tensor,  # [1] int32, rows in use, on the device
    workspace: int,  # bytes
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of hidden's rows losses, references and log-sum-exps less these, [N] float32 each, 0 where not in use; and more.

    A reference that is not finite is 0 there. What :func:`row_gradients` takes: values [N, D] in the dtype of hidden,
    whose memory holds the hidden states in order before, and coefficients [2, N]. Reads nothing back to the host.
    """
    hidden = operands.hidden
    tokens, features = hidden.shape
    values = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    results = [values.new_empty(tokens, dtype=torch.float32) for _ in range(3)]
    coefficients = values.new_empty((2, tokens), dtype=torch.float32)
    if not tokens:
        return *results, values, coefficients
    logits = reference_logits(operands, targets, rows, count, values, config)
    tiles = _ceil(operands.weight.shape[0], config.forward_entries)
    workers = programs(hidden.device)
    division = divide(tokens, operands.weight.shape[0], features, hidden.dtype, workspace, workers, config)
    places, width = min(division.tokens, tokens), division.tiles * config.forward_entries
    totals = values.new_empty((places, features), dtype=torch.float32)
    sums = values.new_empty((max(tiles, 2) + 3) * places, dtype=torch.float32)
    strip = values.new_empty((places, width), dtype=strip_dtype(hidden.dtype))
    for first in range(0, tokens, places):
        here = slice(first, first + places)
        piece = Piece(operands, rows[here], labels[here], count, first, values[here], *logits[:, here])
        row_sums, redone, tile_sums = (
            sums[from_ * piece.tokens : to * piece.tokens] for from_, to in ((0, 1), (1, 3), (3, max(tiles, 2) + 3))
        )
        _walk(piece, totals, strip, tile_sums, division.tiles, config)
        _row_sum_kernel[(_ceil(piece.tokens, 32),)](
            tile_sums, row_sums, count, first, piece.tokens, tiles, TILES=64, BLOCK=32, num_warps=4, **LAUNCH
        )
        redo_overflown(piece, row_sums, tile_sums, redone, totals, product_precision(hidden.dtype, config), config)
        finish_rows(piece, totals, row_sums, redone, results, coefficients[:, here])
    return *results, values, coefficients


def _walk(piece: Piece, totals: Tensor, strip: Tensor, tile_sums: Tensor, strip_tiles: int, config: Config) -> None:
    """Every strip's exponentials and their product with its weight rows: ``tile_sums`` and ``totals`` of a piece."""
    operands, states = piece.operands, piece.states
    weight = operands.weight
    vocabulary, features = weight.shape
    tiles = _ceil(vocabulary, config.forward_entries)
    row_blocks = _ceil(piece.tokens, config.row_block)
    workers = programs(states.device)
    chunk = min(
        _chunks(states.dtype, config),
        key=lambda chunk: _product_rounds(row_blocks, features, chunk, workers, config),
    )
    block_k = 32 if states.dtype == torch.float16 else config.block_k
    filled = _fill(row_blocks, features, workers, config)
    by_library = strip.dtype == torch.bfloat16 and strip.is_cuda and filled < LEAST_FILL
    tma = has_blocks(config, states, weight)
    state_blocks = weight_blocks = weight_columns = strip_blocks = strip_columns = None
    if tma:
        state_blocks = in_blocks(states, config.row_block, config.block_d)
        weight_blocks = in_blocks(weight, config.forward_entries, config.block_d)
        weight_columns = in_blocks(weight, block_k, chunk)
        strip_columns = in_blocks(strip, config.row_block, block_k)
        if strip.element_size() == 2:
            strip_blocks = in_blocks(strip, config.row_block, config.forward_entries)
    for first in range(0, tiles, strip_tiles):
        here = min(strip_tiles, tiles - first)
        entry, end = first * config.forward_entries, (first + here) * config.forward_entries
        _exponential_kernel[(min(workers, row_blocks * here),)](
            states,
            state_blocks,
            weight,
            weight_blocks,
            operands.bias,
            piece.labels,
            piece.references,
            strip,
            strip_blocks,
            tile_sums,
            piece.count,
            piece.first,
            piece.tokens,
            vocabulary,
            features,
            weight.stride(0),
            strip.stride(0),
            first,
            here,
            operands.softcap or 1.0,
            HAS_BIAS=operands.bias is not None,
            HAS_SOFTCAP=operands.softcap is not None,
            TMA=tma,
            RAGGED=end > vocabulary,
            FOR_TF32=states.dtype == torch.float16,
            ROW_BLOCK=config.row_block,
            ENTRIES=config.forward_entries,
            BLOCK_D=config.block_d,
            GROUP=config.group,
            PRECISION=config.precision,
            num_warps=config.warps,
            num_stages=config.forward_stages,
            **LAUNCH,
        )
        if by_library:
            factors = strip[: piece.tokens, : min(end, vocabulary) - entry], weight[entry:end]
            own = totals[: piece.tokens]
            if first == 0:
                torch.mm(*factors, out_dtype=torch.float32, out=own)
            else:
                torch.addmm(own, *factors, out_dtype=torch.float32, out=own)
            continue
        _product_kernel[(min(workers, row_blocks * _ceil(features, chunk)),)](
            strip,
            strip_columns,
            weight,
            weight_columns,
            totals,
            piece.count,
            piece.first,
            piece.tokens,
            vocabulary,
            features,
            weight.stride(0),
            strip.stride(0),
            entry,
            end - entry,
            TMA=tma,
            ROW_BLOCK=config.row_block,
            FEATURES=chunk,
            BLOCK_K=block_k,
            GROUP=config.group,
            PRECISION=product_precision(states.dtype, config),
            num_warps=config.warps,
            num_stages=config.backward_stages,
            **LAUNCH,
        )
