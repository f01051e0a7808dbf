"""The mean of what filtering drops: a token's dropped entries point, to first order, all the same way.

A dropped tail adds sum_v p_v w_v to the gradient of a hidden state. Its entries are many and small, so the sum is close
to their whole mass times one direction, which the tokens share: the mean weight row of the dropped entries, weighted by
their probability. On real hidden states that direction holds 0.96 to 0.99 of the squared error that dropping leaves
(docs/kernel-notes.md). It is estimated from a few tokens and columns; each token's dropped mass is exact, one less the
sum of its kept softmax, so that its logit gradients sum to what they would unfiltered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Operands, OperandsArgument, Places, Tail
from torchtune_lce.kernels.plan import Plan
from torchtune_lce.kernels.primitives import LOG2_E, RANK_DEPTH, add_low_rank, softcap_slope, softcapped
from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# Of so many entries the mean weight row differs from that of all by a hundredth of a row's length.
SAMPLED_ENTRIES = 2**14
# Columns in a row are looked at for so many different tokens each: in a long batch few row blocks may drop anything.
TURNS = 32


@triton.jit(do_not_specialize=["row_blocks_total", "every"])
def _tail_kernel(
    operands: OperandsArgument,
    places: Places,
    entries,
    ranks,
    sparse_strips,
    sums,
    columns,
    every,
    row_blocks_total,
    SAMPLE: tl.constexpr,
    TURNS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of this program's columns, one in `every`, and each for SAMPLE tokens spread over those in use: the dropped rows
    of weight, then those of `up`, by probability, and their mass. Nothing is written without sparse strips.
    """
    program = tl.program_id(0)
    tokens_total = tl.load(places.count)
    depth = tl.arange(0, BLOCK_D)
    features = operands.features
    width = features
    if operands.low is not None:
        width += operands.rank
    sums += program.to(tl.int64) * (width + 1)
    # Summed to one number last: Triton 3.6 cannot compile it here for sm100.
    mass = tl.zeros((TILE,), tl.float32)
    # Without sparse strips nothing is dropped.
    sampled = tl.where(tl.load(sparse_strips + 1) > 0, tl.cdiv(columns, every), 0)
    for number in range(program, sampled, tl.num_programs(0)):
        column = number * every
        step = tl.arange(0, SAMPLE).to(tl.int64) * TURNS + number % TURNS
        place = (step * tokens_total // (SAMPLE * TURNS)).to(tl.int32)
        used = place < tokens_total
        token = tl.load(places.rows + place, mask=used, other=0)
        peak = tl.load(places.row_total + 2 * place, mask=used, other=float("inf"))
        log_sum = tl.load(places.row_total + 2 * place + 1, mask=used, other=0.0) * LOG2_E
        hidden_rows = operands.hidden + token[:, None] * operands.hidden_stride
        entry = tl.load(entries + column * TILE + tl.arange(0, TILE))
        inside = entry < operands.entries_total
        weight_rows = operands.weight + entry.to(tl.int64) * operands.weight_stride
        logits = tl.zeros((SAMPLE, TILE), tl.float32)
        if operands.low is not None:
            logits = add_low_rank(logits, operands, token, used, entry, inside, PRECISION)
        for start in range(0, features, BLOCK_D):
            d = start + depth
            a = tl.load(hidden_rows + d[None, :], mask=used[:, None] & (d < features)[None, :], other=0.0)
            b = tl.load(weight_rows[None, :] + d[:, None], mask=inside[None, :] & (d < features)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
        if operands.bias is not None:
            logits += tl.load(operands.bias + entry, mask=inside, other=0.0).to(tl.float32)[None, :]
        if operands.scale is not None:
            scale = tl.load(operands.scale + entry, mask=inside, other=0.0)
            logits *= scale[None, :]
        if operands.softcap is not None:
            logits = softcapped(logits, operands.softcap)
        softmax = tl.exp2((logits - peak[:, None]) * operands.log2_scale - log_sum[:, None])
        rank_here = tl.load(ranks + column * row_blocks_total + place // ROW_BLOCK, mask=used, other=0)
        # The last comparison is false for a NaN: one token's must not reach the others.
        dropped = (rank_here < 0)[:, None] & inside[None, :] & (softmax <= 1)
        mass += tl.sum(tl.where(dropped, softmax, 0.0), 0)
        if operands.softcap is not None:
            softmax *= softcap_slope(logits, operands.softcap)
        if operands.scale is not None:
            softmax *= scale[None, :]
        weights = tl.sum(tl.where(dropped, softmax, 0.0), 0)
        for start in range(0, features, BLOCK_D):
            d = start + depth
            w = tl.load(weight_rows[:, None] + d[None, :], mask=inside[:, None] & (d < features)[None, :], other=0.0)
            total = tl.sum(w.to(tl.float32) * weights[:, None], 0)
            total += tl.load(sums + d, mask=d < tl.where(number > program, features, 0), other=0.0)
            tl.store(sums + d, total, mask=d < features)
        if operands.low is not None:
            for start in range(0, operands.rank, RANK_DEPTH):
                r = start + tl.arange(0, RANK_DEPTH)
                at = operands.up + entry.to(tl.int64)[:, None] * operands.up_stride + r[None, :]
                b = tl.load(at, mask=inside[:, None] & (r < operands.rank)[None, :], other=0.0)
                total = tl.sum(b.to(tl.float32) * weights[:, None], 0)
                own = sums + features + r
                total += tl.load(own, mask=r < tl.where(number > program, operands.rank, 0), other=0.0)
                tl.store(own, total, mask=r < operands.rank)
    tl.store(sums + width, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["parts"])
def _tail_mean_kernel(sums, sparse_strips, mean, parts, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of all programs over their mass; 0 where nothing is dropped."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((PARTS,), tl.float32)
    for first in range(0, tl.where(tl.load(sparse_strips + 1) > 0, parts, 0), PARTS):
        part = first + tl.arange(0, PARTS)
        own = sums + part * (width + 1)
        total += tl.sum(
            tl.load(own[:, None] + d[None, :], mask=(part < parts)[:, None] & (d < width)[None, :], other=0.0), 0
        )
        mass += tl.load(own + width, mask=part < parts, other=0.0)
    # The least number that is not denormal.
    tl.store(mean + d, total / tl.maximum(tl.sum(mass, 0), 1.1754943508222875e-38), mask=d < width)


def tail_bytes(hidden: Tensor) -> int:
    """What :func:`tail_direction` allocates, at most."""
    return 4 * (_programs(hidden) + 1) * (hidden.shape[1] + 1)


def _programs(hidden: Tensor) -> int:
    return 2 * programs(hidden.device)


def tail_direction(
    plan: Plan,
    operands: Operands,
    places: Places,
    config: Config,
) -> Tail:
    """Zero if nothing is dropped.

    With a softcap each row is weighted by the cap's derivative too, and so it is by its scale.
    """
    hidden, low = operands.hidden, operands.low
    columns, row_blocks = plan.ranks.shape
    # Columns are in order of activity: all kinds of entries are met. One a program, if that is enough.
    enough = max(columns * config.entry_tile // SAMPLED_ENTRIES, 1)
    every = min(ceil_div(columns, _programs(hidden)), enough)
    grid = min(_programs(hidden), ceil_div(columns, every))
    features = hidden.shape[1]
    width = features + (0 if low is None else operands.rank)
    sums = hidden.new_empty((grid, width + 1), dtype=torch.float32)
    launch(
        _tail_kernel,
        (grid,),
        (
            operands.argument,
            places,
            plan.entries,
            plan.ranks,
            plan.sparse_strips,
            sums,
            columns,
            every,
            row_blocks,
        ),
        SAMPLE=config.sample,
        TURNS=TURNS,
        ROW_BLOCK=config.row_block,
        TILE=config.entry_tile,
        BLOCK_D=config.block_d,
        PRECISION=config.precision,
        num_warps=4,
        num_stages=config.forward_stages,
    )
    mean = sums.new_empty(width)
    launch(
        _tail_mean_kernel,
        (ceil_div(width, 64),),
        (
            sums,
            plan.sparse_strips,
            mean,
            grid,
            width,
        ),
        PARTS=32,
        BLOCK=64,
    )
    return Tail(mean[:features], None if low is None else mean[features:])
