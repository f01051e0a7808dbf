"""The mean of what filtering drops: a token's dropped entries point, to first order, all the same way.

A dropped tail adds sum_v E_v c_v w_v to u'. Its entries are many and small, so the sum is close to their mass times one
direction, which the tokens of a few row blocks share: the mean weight row of the dropped entries, weighted by their
probability. On real hidden states that direction holds 0.96 to 0.99 of the squared error that dropping leaves
(docs/kernel-notes.md). It is estimated from a few tokens and tiles; each token's dropped mass is exact.
"""

import torch
import triton
import triton.language as tl

from torchtune_lce.kernels.active_columns import Dropped, sampled_block
from torchtune_lce.kernels.division import GROUPS
from torchtune_lce.kernels.exponentials import Strip
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Piece
from torchtune_lce.kernels.tuning import Config, ceil_div


@triton.jit(
    do_not_specialize=[
        "first_place",
        "tokens",
        "tiles",
        "first_sampled",
        "sample_every",
        "blocks_a_group",
        "strip_tiles",
        "before_first",
        "row_blocks_total",
    ]
)
def _mean_kernel(
    dropped_columns,
    dropped_masses,
    strip_is_whole,
    weight,
    means,
    count,
    first_place,
    tokens,
    entries_total,
    features,
    weight_stride,
    tiles,
    first_sampled,
    sample_every,
    blocks_a_group,
    strip_tiles,
    before_first,
    row_blocks_total,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """means[part, group]: a part's share of each group's direction, FEATURES columns a program; 0 without any mass."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    used = tl.minimum(tl.load(count) - first_place, tokens)
    groups = tl.cdiv(tl.cdiv(tl.maximum(used, 0), ROW_BLOCK), blocks_a_group)
    group = tl.arange(0, GROUPS)
    d = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_step = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = ENTRIES // BLOCK_K
    total = tl.zeros((GROUPS, FEATURES), tl.float32)
    first = part * tiles // parts
    last = tl.where(groups > 0, (part + 1) * tiles // parts, 0)
    for step in range(first * steps, last * steps):
        place = step * BLOCK_K + in_step
        own_tile = first_sampled + step // steps * sample_every
        entry = own_tile * ENTRIES + step % steps * BLOCK_K + in_step
        at = dropped_columns + group.to(tl.int64)[:, None] * (tiles * ENTRIES) + place[None, :]
        block, _ = sampled_block(step // steps, group, blocks_a_group, used, ROW_BLOCK)
        # The first strip is narrower than the others, by `before_first` tiles.
        flag = strip_is_whole + (own_tile + before_first) // strip_tiles * row_blocks_total + block
        counts = tl.load(flag, mask=group < groups, other=1) == 0
        q = tl.load(at, mask=counts[:, None], other=0.0)
        at = weight + entry.to(tl.int64)[:, None] * weight_stride + d[None, :]
        w = tl.load(at, mask=(entry < entries_total)[:, None] & (d < features)[None, :], other=0.0)
        if w.dtype == tl.bfloat16:
            total = tl.dot(q.to(tl.bfloat16), w, total)
        else:
            total = tl.dot(q, w.to(tl.float32), total, input_precision=PRECISION)
    mass = tl.zeros((GROUPS, MASSES), tl.float32)
    for start in range(0, tiles, MASSES):
        tile = start + tl.arange(0, MASSES)
        exists = (group < groups)[:, None] & (tile < tiles)[None, :]
        own_tile = first_sampled + tile * sample_every
        block, _ = sampled_block(tile[None, :], group[:, None], blocks_a_group, used, ROW_BLOCK)
        flag = (own_tile[None, :] + before_first) // strip_tiles * row_blocks_total + block
        counts = exists & (tl.load(strip_is_whole + flag, mask=exists, other=1) == 0)
        mass += tl.load(dropped_masses + group[:, None] * tiles + tile[None, :], mask=counts, other=0.0)
    whole = tl.sum(mass, 1)
    direction = tl.where((whole > 0)[:, None], total / tl.where(whole > 0, whole, 1.0)[:, None], 0.0)
    own = means + (part * GROUPS + group)[:, None] * features + d[None, :]
    tl.store(own, direction, mask=(d < features)[None, :])


def find_means(piece: Piece, dropped: Dropped, strip: Strip, config: Config) -> None:
    """Fills ``dropped.means``. One launch."""
    weight, sample = piece.operands.weight, dropped.sample
    features = weight.shape[1]
    launch(
        _mean_kernel,
        (ceil_div(features, config.entry_tile), dropped.means.shape[0]),
        (
            dropped.columns,
            dropped.masses,
            dropped.is_whole,
            weight,
            dropped.means,
            piece.count,
            piece.first,
            piece.tokens,
            weight.shape[0],
            features,
            weight.stride(0),
            sample.tiles,
            sample.first,
            sample.every,
            sample.blocks_a_group,
            strip.tiles,
            strip.tiles - strip.first_tiles,
            dropped.is_whole.shape[1],
        ),
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        FEATURES=config.entry_tile,
        BLOCK_K=config.block_k,
        MASSES=16,
        PRECISION="tf32" if weight.dtype == torch.float16 else config.precision,
        num_warps=4,
        num_stages=4,
    )
