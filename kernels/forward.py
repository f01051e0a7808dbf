"""Log-sum-exp and target logit of every token from the same products, and which softmax entries the gradients need.

The vocabulary is walked in phases of growing width. A phase's kernel leaves, a token and vocabulary tile, the largest
logit and the sum of exponentials measured from it: one number for both would be rounded at the size of the logits.
:func:`_merge_kernel` folds them, in order, into the running ones. What matters is decided against the running values of
the phases before, a lower bound of the final ones: the record can keep more than the threshold asks for, never less.

A threshold on single entries says nothing about their sum: where the softmax is flat, as in an untrained model, all of
it lies in entries below any threshold. So the mass of the inactive entries is summed too, and a row block in which it
is more than ``DROPPED_MASS_LIMIT`` of the tokens' mean is kept whole: all its entries are marked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.launching import Repeated, launch
from torchtune_lce.kernels.operands import Operands, OperandsArgument
from torchtune_lce.kernels.primitives import (
    DROPPED_MASS_LIMIT,
    WORD_BITS,
    add_low_rank,
    bitwise_or,
    softcapped,
    tile_coordinates,
    times_log2,
)
from torchtune_lce.kernels.tuning import Config, ceil_div, config_for, programs

# Of a phase: twice as many as an H100 has multiprocessors. Each phase is two launches, and begins and ends with a card
# that is partly idle; more tiles would take workspace.
MOST_TILES = 264


@dataclass(frozen=True)
class Activity:
    """Which parts of the softmax the gradients need.

    ``words`` is int32 [row blocks, words], a bit for each (row block, entry): some token of the block may give the
    entry filter_eps or more. Entry e of a tile of W = tile / 32 words is bit e // W of the tile's word e % W, the order
    in which one thread of the forward holds its columns. ``dropped_mass`` is float32 [tokens]: the softmax mass of the
    entries that this leaves out.
    """

    words: Tensor
    dropped_mass: Tensor | None  # the backward does without
    tile: int

    def of(self, row_blocks: slice, tokens: slice) -> "Activity":
        """The part of it for some row blocks, which are these tokens."""
        dropped_mass = self.dropped_mass if self.dropped_mass is None else self.dropped_mass[tokens]
        return Activity(self.words[row_blocks], dropped_mass, self.tile)


@triton.jit
def _tile_statistics(
    logits,  # [tokens, ENTRIES] float32 accumulator
    operands: OperandsArgument,
    tokens,
    tokens_total,
    entry_tile,
    running,
    statistics,
    words,
    words_stride,
    tokens_stride,
    row_block,
    first_tile,
    log2_eps,
    RECORD: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Stores one tile's peak and sum of exponentials and, with RECORD, its activity bits and the sum they leave out.

    Then, with ENTROPY, the sum of exponentials times their exponents of 2, and with MEAN that of the logits, over V.
    """
    token_mask = tokens < tokens_total
    entries = entry_tile * ENTRIES + tl.arange(0, ENTRIES)
    inside = entries < operands.entries_total
    if operands.bias is not None:
        logits += tl.load(operands.bias + entries, mask=inside, other=0.0).to(tl.float32)[None, :]
    if operands.scale is not None:
        logits *= tl.load(operands.scale + entries, mask=inside, other=0.0)[None, :]
    if operands.softcap is not None:
        logits = softcapped(logits, operands.softcap)
    if MEAN:
        # Of capped ones, which past the vocabulary are 0.
        own_mean = statistics + (2 + RECORD + ENTROPY) * tokens_stride + tokens
        tl.store(own_mean, tl.sum(logits, 1) * (1.0 / operands.entries_total), mask=token_mask)
    if RAGGED:
        logits = tl.where(inside[None, :], logits, float("-inf"))

    peak = tl.max(logits, 1)
    tl.store(statistics + tokens, peak, mask=token_mask)
    # A row of -inf alone must not become -inf - -inf.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    # The difference first: it is exact where it is small, and the least finite number as an exponent of 2 is -inf.
    powers = tl.exp2((logits - peak[:, None]) * operands.log2_scale)
    total = tl.sum(powers, 1)
    if ENTROPY:
        # Not of the exponents themselves: for those beside their powers there are no registers.
        weighted = tl.sum(times_log2(powers), 1)
        tl.store(statistics + (2 + RECORD) * tokens_stride + tokens, weighted, mask=token_mask)

    if RECORD:
        # Before the first phase nothing is known, and every entry of a token may matter.
        known = tokens < tl.where(first_tile > 0, tokens_total, 0)
        known_peak = tl.load(running + tokens, mask=known, other=0.0)
        known_peak = tl.where(token_mask, tl.where(known, known_peak, float("-inf")), float("inf"))
        bound = tl.exp2((known_peak - peak) * operands.log2_scale + log2_eps)
        bound *= tl.load(running + tokens_stride + tokens, mask=known, other=1.0)
        # `<` and not `>=`: a NaN must be kept, so that it reaches the gradients.
        below = powers < bound[:, None]
        WORDS: tl.constexpr = ENTRIES // WORD_BITS
        bits = tl.where(
            tl.reshape(below, (ROW_BLOCK, WORD_BITS, WORDS)), 0, 1 << tl.arange(0, WORD_BITS)[None, :, None]
        )
        words += row_block.to(tl.int64) * words_stride + entry_tile * WORDS
        tl.store(words + tl.arange(0, WORDS), tl.reduce(tl.sum(bits, 1), 0, bitwise_or))
        dropped = tl.sum(tl.where(below, powers, 0.0), 1)
        tl.store(statistics + 2 * tokens_stride + tokens, dropped, mask=token_mask)
    tl.store(statistics + tokens_stride + tokens, total, mask=token_mask)


@triton.jit
def _mark_flat_row_block(
    running,
    words,
    dropped_mass,
    row_block,
    tokens,
    tokens_total,
    tokens_stride,
    words_stride,
    LIMIT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Stores the dropped mass of `tokens`, some of the row block, 0 past the count.

    Where its mean over the row block passes LIMIT, marks every entry instead, and drops nothing.
    """
    in_block = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    used = in_block < tokens_total
    total = tl.load(running + tokens_stride + in_block, mask=used, other=1.0)
    dropped = tl.load(running + 2 * tokens_stride + in_block, mask=used, other=0.0)
    excess = tl.sum(tl.where(used, dropped / total - LIMIT, 0.0), 0)
    # Written so that a NaN keeps everything.
    drops = tl.where(excess <= 0, tokens_total, 0)
    own = words + row_block.to(tl.int64) * words_stride
    for first in range(0, tl.where(excess <= 0, 0, words_stride), WORDS):
        word = first + tl.arange(0, WORDS)
        tl.store(own + word, -1, mask=word < words_stride)
    total = tl.load(running + tokens_stride + tokens, mask=tokens < drops, other=1.0)
    dropped = tl.load(running + 2 * tokens_stride + tokens, mask=tokens < drops, other=0.0)
    tl.store(dropped_mass + tokens, dropped / total, mask=tokens < tokens_stride)


@triton.jit(do_not_specialize=["tokens_stride"])
def _target_kernel(
    operands: OperandsArgument,
    labels,
    count,
    running,
    row_total,
    target_logit,
    mean_exponent,
    mean_logit,
    words,
    dropped_mass,
    tokens_stride,
    words_stride,
    RECORD: tl.constexpr,
    LIMIT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Target logits: the diagonal of hidden times the targets' weight rows, in the steps over D of the other kernels.

    So it is the logit that went into the log-sum-exp. Looking for it in every tile there cost a quarter of the forward.
    Beside it row_total: the peak and the log of the sum that the phases came to. With RECORD marks each target active
    in its row block whatever its softmax, since its gradient has the - 1 of the one-hot, and all of a flat row block.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tokens_total = tl.load(count)
    mask = tokens < tokens_total
    label = tl.load(labels + tokens, mask=mask, other=0)
    depth = tl.arange(0, BLOCK_D)
    hidden_rows = operands.hidden + tokens.to(tl.int64)[:, None] * operands.hidden_stride
    weight_rows = operands.weight + label.to(tl.int64)[None, :] * operands.weight_stride
    logits = tl.zeros((TOKENS, TOKENS), tl.float32)
    if operands.low is not None:
        logits = add_low_rank(logits, operands, tokens, mask, label, mask, PRECISION)
    for start in range(0, operands.features, BLOCK_D):
        d = start + depth
        exists = d < operands.features
        a = tl.load(hidden_rows + d[None, :], mask=mask[:, None] & exists[None, :], other=0.0)
        b = tl.load(weight_rows + d[:, None], mask=mask[None, :] & exists[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    own = tl.arange(0, TOKENS)[:, None] == tl.arange(0, TOKENS)[None, :]
    target = tl.sum(tl.where(own, logits, 0.0), 1)
    if operands.bias is not None:
        target += tl.load(operands.bias + label, mask=mask, other=0.0).to(tl.float32)
    if operands.scale is not None:
        target *= tl.load(operands.scale + label, mask=mask, other=0.0)
    if operands.softcap is not None:
        target = softcapped(target, operands.softcap)
    tl.store(target_logit + tokens, target, mask=mask)
    tl.store(row_total + 2 * tokens, tl.load(running + tokens, mask=mask, other=0.0), mask=mask)
    total = tl.load(running + tokens_stride + tokens, mask=mask, other=1.0)
    tl.store(row_total + 2 * tokens + 1, tl.log(total), mask=mask)
    if mean_exponent is not None:
        weighted = tl.load(running + (2 + RECORD) * tokens_stride + tokens, mask=mask, other=0.0)
        tl.store(mean_exponent + tokens, weighted / total, mask=mask)
    if mean_logit is not None:
        own_mean = running + (2 + RECORD + (mean_exponent is not None)) * tokens_stride + tokens
        tl.store(mean_logit + tokens, tl.load(own_mean, mask=mask, other=0.0), mask=mask)
    if RECORD:
        _mark_flat_row_block(
            running,
            words,
            dropped_mass,
            tl.program_id(0) * TOKENS // ROW_BLOCK,
            tokens,
            tokens_total,
            tokens_stride,
            words_stride,
            LIMIT,
            ROW_BLOCK,
            1024,
        )
        WORDS: tl.constexpr = ENTRIES // WORD_BITS
        word = label // ENTRIES * WORDS + label % WORDS
        bit = (label % ENTRIES // WORDS).to(tl.int32)
        tl.atomic_or(words + (tokens // ROW_BLOCK).to(tl.int64) * words_stride + word, 1 << bit, mask=mask)


# What differs from phase to phase and from batch to batch is no reason to compile anew.
@triton.jit(do_not_specialize=["tokens_stride", "first_tile", "tiles"])
def _pointer_kernel(
    operands: OperandsArgument,
    count,
    running,
    statistics,
    words,
    tokens_stride,
    words_stride,
    log2_eps,
    first_tile,
    tiles,
    RECORD: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens_total = tl.load(count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    for index in range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0)):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        entry_tile = first_tile + column
        tokens = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        token_mask = tokens < tokens_total
        entries = entry_tile * ENTRIES + tl.arange(0, ENTRIES)
        inside = entries < operands.entries_total
        depth = tl.arange(0, BLOCK_D)
        hidden_rows = operands.hidden + tokens.to(tl.int64)[:, None] * operands.hidden_stride
        weight_rows = operands.weight + entries.to(tl.int64)[None, :] * operands.weight_stride
        logits = tl.zeros((ROW_BLOCK, ENTRIES), tl.float32)
        if operands.low is not None:
            logits = add_low_rank(logits, operands, tokens, token_mask, entries, inside, PRECISION)
        for start in range(0, operands.features, BLOCK_D):
            d = start + depth
            exists = d < operands.features
            a = tl.load(hidden_rows + d[None, :], mask=token_mask[:, None] & exists[None, :], other=0.0)
            b = tl.load(weight_rows + d[:, None], mask=inside[None, :] & exists[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
        _tile_statistics(
            logits,
            operands,
            tokens,
            tokens_total,
            entry_tile,
            running,
            statistics + column.to(tl.int64) * tokens_stride * (2 + RECORD + ENTROPY + MEAN),
            words,
            words_stride,
            tokens_stride,
            row_block,
            first_tile,
            log2_eps,
            RECORD,
            ENTROPY,
            MEAN,
            RAGGED,
            ROW_BLOCK,
            ENTRIES,
        )


@triton.jit(do_not_specialize=["tokens_stride", "first_tile", "tiles"])
def _descriptor_kernel(
    operands: OperandsArgument,
    hidden_blocks,
    weight_blocks,
    count,
    running,
    statistics,
    words,
    tokens_stride,
    words_stride,
    log2_eps,
    first_tile,
    tiles,
    RECORD: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`_pointer_kernel` with hidden states and weight as descriptors too: the copy engine loads the tiles.

    Flattening the loop over tiles lets the loads of the next tile start while this one's statistics are computed; a
    second loop in it, over an adapter's rank, cannot be flattened.
    """
    tokens_total = tl.load(count)
    row_blocks = tl.cdiv(tokens_total, ROW_BLOCK)
    FLATTEN: tl.constexpr = operands.low is None
    for index in tl.range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        entry_tile = first_tile + column
        tokens = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        logits = tl.zeros((ROW_BLOCK, ENTRIES), tl.float32)
        if operands.low is not None:
            entries = entry_tile * ENTRIES + tl.arange(0, ENTRIES)
            inside = entries < operands.entries_total
            logits = add_low_rank(logits, operands, tokens, tokens < tokens_total, entries, inside, PRECISION)
        for start in range(0, operands.features, BLOCK_D):
            a = hidden_blocks.load([row_block * ROW_BLOCK, start])
            b = weight_blocks.load([entry_tile * ENTRIES, start])
            logits = tl.dot(a, b.T, logits, input_precision=PRECISION)
        _tile_statistics(
            logits,
            operands,
            tokens,
            tokens_total,
            entry_tile,
            running,
            statistics + column.to(tl.int64) * tokens_stride * (2 + RECORD + ENTROPY + MEAN),
            words,
            words_stride,
            tokens_stride,
            row_block,
            first_tile,
            log2_eps,
            RECORD,
            ENTROPY,
            MEAN,
            RAGGED,
            ROW_BLOCK,
            ENTRIES,
        )


# Whether the counts are multiples of 16 must not change how threads share the sums: a token's bits would depend on the
# number of tokens.
@triton.jit(do_not_specialize=["tokens_stride", "first_tile", "tiles"])
def _merge_kernel(
    statistics,
    running,
    count,
    tokens_stride,
    log2_scale,
    first_tile,
    tiles,
    RECORD: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds statistics[0:tiles, :, i] to running[:, i]: peak, sum, dropped sum, the sum times exponents and the
    logits' mean, in the order of the vocabulary.

    The first phase begins them, with nothing summed yet.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens_total = tl.load(count)
    mask = index < tokens_total
    known = index < tl.where(first_tile > 0, tokens_total, 0)
    own = running + index
    peak = tl.load(own, mask=known, other=float("-inf"))
    total = tl.load(own + tokens_stride, mask=known, other=0.0)
    dropped = tl.zeros((BLOCK,), tl.float32)
    if RECORD:
        dropped = tl.load(own + 2 * tokens_stride, mask=known, other=0.0)
    weighted = tl.zeros((BLOCK,), tl.float32)
    if ENTROPY:
        weighted = tl.load(own + (2 + RECORD) * tokens_stride, mask=known, other=0.0)
    tile = tl.arange(0, TILES)
    mean = tl.zeros((BLOCK,), tl.float32)
    if MEAN:
        mean = tl.load(own + (2 + RECORD + ENTROPY) * tokens_stride, mask=known, other=0.0)
    tile_stride = tokens_stride * (2 + RECORD + ENTROPY + MEAN)
    parts = statistics + tile[:, None].to(tl.int64) * tile_stride + index[None, :]
    for first in range(0, tiles, TILES):
        present = (first + tile < tiles)[:, None] & mask[None, :]
        part = tl.load(parts, mask=present, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(part, 0))
        # A NaN passes the maxima by and reaches the totals; -inf alone must not become -inf - -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        lower, moved = (peak - base) * log2_scale, (part - base[None, :]) * log2_scale
        shrunk, share = tl.exp2(lower), tl.exp2(moved)
        part_total = tl.load(parts + tokens_stride, mask=present, other=0.0)
        if ENTROPY:
            # Measured from another logit, all exponents move by as much.
            own_part = tl.load(parts + (2 + RECORD) * tokens_stride, mask=present, other=0.0)
            own_part += tl.where(share > 0, moved * part_total, 0.0)
            weighted = (weighted + tl.where(shrunk > 0, lower * total, 0.0)) * shrunk + tl.sum(share * own_part, 0)
        total = total * shrunk + tl.sum(share * part_total, 0)
        if RECORD:
            left_out = tl.load(parts + 2 * tokens_stride, mask=present, other=0.0)
            dropped = dropped * shrunk + tl.sum(share * left_out, 0)
        if MEAN:
            mean += tl.sum(tl.load(parts + (2 + RECORD + ENTROPY) * tokens_stride, mask=present, other=0.0), 0)
        parts += TILES * tile_stride
        peak = higher
    tl.store(own, peak, mask=mask)
    tl.store(own + tokens_stride, total, mask=mask)
    if RECORD:
        tl.store(own + 2 * tokens_stride, dropped, mask=mask)
    if ENTROPY:
        tl.store(own + (2 + RECORD) * tokens_stride, weighted, mask=mask)
    if MEAN:
        tl.store(own + (2 + RECORD + ENTROPY) * tokens_stride, mean, mask=mask)


def phases(vocabulary: int, tile: int) -> list[tuple[int, int]]:
    """(first tile, tiles) of each phase: narrow ones first, so that most tiles meet a running value close to the final.

    All this is a function of the vocabulary alone: a token's sums are taken in the same order whatever else is in the
    batch.
    """
    result, first, width = [], 0, 2
    tiles = ceil_div(vocabulary, tile)
    while first < tiles:
        # The wide ones are alike.
        alike = ceil_div(tiles - first, MOST_TILES) if width == MOST_TILES else 1
        here = min(width, ceil_div(tiles - first, alike))
        result.append((first, here))
        first += here
        width = min(width * 8, MOST_TILES)
    return result


def lse_and_target_logit(
    operands: Operands,  # the rows in use first
    labels: Tensor,  # [N] integer
    count: Tensor,  # [1] int32, rows in use, on the device
    activity: Activity | None,  # filled for these rows
    log2_eps: float,
    row_total: Tensor,  # [N, 2] float32, filled: the peak and the log of the sum measured from it
    target_logit: Tensor,  # [N] float32, filled
    mean_exponent: Tensor | None,  # [N] float32, filled: under the softmax the mean of (logit - peak) * log2_scale
    mean_logit: Tensor | None,  # [N] float32, filled: over all entries alike
) -> None:
    """Launches the forward for one piece of tokens; reads nothing back to the host. Fills nothing past the count."""
    hidden, weight = operands.hidden, operands.weight
    config = config_for(hidden.device, hidden.dtype)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    plan = phases(vocabulary, config.forward_entries)
    with_entropy, with_mean = mean_exponent is not None, mean_logit is not None
    # Of each token: its largest logit, its sum, that of its inactive entries, that times exponents, and the mean of its
    # logits, where wanted.
    running = hidden.new_empty((2 + (activity is not None) + with_entropy + with_mean, tokens), dtype=torch.float32)
    statistics = hidden.new_empty((max(width for _, width in plan), *running.shape), dtype=torch.float32)
    kernel, blocks = _kernel_for(hidden, weight, config)
    tile_statistics = Repeated(
        kernel,
        (
            operands.argument,
            *blocks,
            count,
            running,
            statistics,
            activity.words if activity else None,
            tokens,
            activity.words.stride(0) if activity else 0,
            log2_eps,
        ),
        RECORD=activity is not None,
        ENTROPY=with_entropy,
        MEAN=with_mean,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        BLOCK_D=config.block_d,
        GROUP=config.group,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.forward_stages,
    )
    merge = Repeated(
        _merge_kernel,
        (statistics, running, count, tokens, operands.log2_scale),
        RECORD=activity is not None,
        ENTROPY=with_entropy,
        MEAN=with_mean,
        TILES=32,
        BLOCK=32,
    )
    workers, row_blocks = programs(hidden.device), ceil_div(tokens, config.row_block)
    for first_tile, width in plan:
        grid = (min(workers, row_blocks * width),)
        ragged = (first_tile + width) * config.forward_entries > vocabulary
        tile_statistics(grid, first_tile, width, RAGGED=ragged)
        merge((ceil_div(tokens, 32),), first_tile, width)
    # After the phases, which write whole words.
    launch(
        _target_kernel,
        (ceil_div(tokens, config.sample),),
        (
            operands.argument,
            labels,
            count,
            running,
            row_total,
            target_logit,
            mean_exponent,
            mean_logit,
            activity.words if activity else None,
            activity.dropped_mass if activity else None,
            tokens,
            activity.words.stride(0) if activity else 0,
        ),
        RECORD=activity is not None,
        LIMIT=DROPPED_MASS_LIMIT.value,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        TOKENS=config.sample,
        BLOCK_D=config.block_d,
        PRECISION=config.precision,
        num_warps=4,
        num_stages=config.forward_stages,
    )


def _kernel_for(hidden: Tensor, weight: Tensor, config: Config) -> tuple:
    """The kernel and its descriptors."""
    if not has_blocks(config, hidden, weight):
        return _pointer_kernel, ()
    return _descriptor_kernel, (
        in_blocks(hidden, config.row_block, config.block_d),
        in_blocks(weight, config.forward_entries, config.block_d),
    )
