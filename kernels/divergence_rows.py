"""What a row's divergence and its gradient need of the whole vocabulary: both log-sum-exps, and two sums beside them.

Each program goes over a segment of the vocabulary and keeps, of the student and of the teacher, the largest logit so
far and the sum of exponentials measured from it; another kernel adds up the segments, in their order. With z the
student's logits and y the teacher's, each less its own largest, so that what logits share costs no digit:

    forward   -Σ p log q          = log Σ exp z - Σ exp(y) z / Σ exp y
    reverse   Σ q (log q - log p) = Σ exp(z) (z - y) / Σ exp z - log Σ exp z + log Σ exp y
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.divergence_tiles import Group, both_logits
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import OperandsArgument
from torchtune_lce.kernels.primitives import LOG2_E, LOG_2, tile_coordinates
from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# Numbers a row and segment, and those of a row that gradients are made of.
SUMS, NUMBERS = 6, 5
# With fewer, programs that run at once would have more row blocks among them than L2 has room for; with more, the sums
# would take memory.
LEAST_SEGMENTS, MOST_SEGMENTS = 16, 32


@triton.jit
def _finite(peak):
    """An infinity stays in the logits that this is subtracted from, or they would become NaN."""
    return tl.where(tl.abs(peak) < float("inf"), peak, 0.0)


@triton.jit
def _raised(peak, total, teacher_peak, teacher_total, logit_sum, gap_sum, higher, teacher_higher):
    """The four sums, measured from higher peaks. First the totals: from that of masked entries a peak rises as far as a
    number can.
    """
    base, teacher_base = _finite(higher), _finite(teacher_higher)
    shrunk = tl.exp2((peak - base) * LOG2_E)
    teacher_shrunk = tl.exp2((teacher_peak - teacher_base) * LOG2_E)
    rise, teacher_rise = base - _finite(peak), teacher_base - _finite(teacher_peak)
    total *= shrunk
    teacher_total *= teacher_shrunk
    logit_sum = logit_sum * teacher_shrunk - teacher_total * rise
    gap_sum = gap_sum * shrunk - total * (rise - teacher_rise)
    return total, teacher_total, logit_sum, gap_sum


@triton.jit(do_not_specialize=["group_first", "first_place", "tokens", "segments", "tiles_a_segment", "tiles"])
def _segment_kernel(
    student: OperandsArgument,
    teacher: OperandsArgument,
    states,
    state_blocks,
    weight_blocks,
    teacher_states,
    teacher_state_blocks,
    teacher_weight_blocks,
    count,
    sums,
    group_first,
    first_place,
    tokens,
    segments,
    tiles_a_segment,
    tiles,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[:, segment, place] of a piece of `tokens` places, from `first_place` of the group on: both peaks and totals,
    and the sums of the forward and of the reverse divergence."""
    used = tl.minimum(tl.load(count) - group_first - first_place, tokens)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    kind_stride = segments.to(tl.int64) * tokens
    for index in tl.range(tl.program_id(0), row_blocks * segments, tl.num_programs(0)):
        row_block, segment = tile_coordinates(index, row_blocks, segments, GROUP)
        place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        peak = tl.full((ROW_BLOCK,), float("-inf"), tl.float32)
        teacher_peak = tl.full((ROW_BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((ROW_BLOCK,), tl.float32)
        teacher_total = tl.zeros((ROW_BLOCK,), tl.float32)
        logit_sum = tl.zeros((ROW_BLOCK,), tl.float32)
        gap_sum = tl.zeros((ROW_BLOCK,), tl.float32)
        first_tile = segment * tiles_a_segment
        for tile in range(first_tile, tl.minimum(first_tile + tiles_a_segment, tiles)):
            logits, teacher_logits = both_logits(
                student,
                teacher,
                states,
                state_blocks,
                weight_blocks,
                teacher_states,
                teacher_state_blocks,
                teacher_weight_blocks,
                first_place // ROW_BLOCK,
                row_block,
                tile,
                used,
                TMA,
                ROW_BLOCK,
                ENTRIES,
                BLOCK_D,
                PRECISION,
            )
            exists = (tile * ENTRIES + tl.arange(0, ENTRIES) < student.entries_total)[None, :]
            if RAGGED:
                higher = tl.maximum(peak, tl.max(tl.where(exists, logits, float("-inf")), 1))
                teacher_higher = tl.maximum(teacher_peak, tl.max(tl.where(exists, teacher_logits, float("-inf")), 1))
            else:
                higher = tl.maximum(peak, tl.max(logits, 1))
                teacher_higher = tl.maximum(teacher_peak, tl.max(teacher_logits, 1))
            total, teacher_total, logit_sum, gap_sum = _raised(
                peak, total, teacher_peak, teacher_total, logit_sum, gap_sum, higher, teacher_higher
            )
            peak, teacher_peak = higher, teacher_higher
            logits -= _finite(peak)[:, None]
            teacher_logits -= _finite(teacher_peak)[:, None]
            powers = tl.exp2(logits * LOG2_E)
            if RAGGED:
                powers = tl.where(exists, powers, 0.0)
            total += tl.sum(powers, 1)
            if REVERSE:
                gap_sum += tl.sum(powers * (logits - teacher_logits), 1)
            powers = tl.exp2(teacher_logits * LOG2_E)
            if RAGGED:
                powers = tl.where(exists, powers, 0.0)
            teacher_total += tl.sum(powers, 1)
            if FORWARD:
                logit_sum += tl.sum(powers * logits, 1)
        present = place < used
        own = sums + segment.to(tl.int64) * tokens + place
        tl.store(own, peak, mask=present)
        tl.store(own + kind_stride, total, mask=present)
        tl.store(own + 2 * kind_stride, teacher_peak, mask=present)
        tl.store(own + 3 * kind_stride, teacher_total, mask=present)
        tl.store(own + 4 * kind_stride, logit_sum, mask=present)
        tl.store(own + 5 * kind_stride, gap_sum, mask=present)


@triton.jit(do_not_specialize=["first_place", "tokens", "places", "segments"])
def _row_kernel(
    sums,
    count,
    target_logits,
    losses,
    nll,
    numbers,
    forward_share,
    reverse_share,
    first_place,
    tokens,
    places,
    segments,
    BLOCK: tl.constexpr,
):
    """losses[place] and numbers[:, place] of `tokens` of all `places`, from `first_place` on; losses 0 past the count.
    Unless None also nll[place], from target_logits of these tokens.

    The numbers are the student's largest logit and the binary logarithm of its total, the teacher's, and by how much
    the logits of both, less those largest ones, differ in the mean over q: log q - log p less the reverse divergence is
    what they differ by beyond that.
    """
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < tokens
    used = here < tl.minimum(tl.load(count) - first_place, tokens)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    teacher_peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    teacher_total = tl.zeros((BLOCK,), tl.float32)
    logit_sum = tl.zeros((BLOCK,), tl.float32)
    gap_sum = tl.zeros((BLOCK,), tl.float32)
    kind_stride = segments.to(tl.int64) * tokens
    own = sums + here
    for _ in range(0, segments):
        own_peak = tl.load(own, mask=used, other=0.0)
        own_total = tl.load(own + kind_stride, mask=used, other=0.0)
        own_teacher_peak = tl.load(own + 2 * kind_stride, mask=used, other=0.0)
        own_teacher_total = tl.load(own + 3 * kind_stride, mask=used, other=0.0)
        own_logit_sum = tl.load(own + 4 * kind_stride, mask=used, other=0.0)
        own_gap_sum = tl.load(own + 5 * kind_stride, mask=used, other=0.0)
        higher = tl.maximum(peak, own_peak)
        teacher_higher = tl.maximum(teacher_peak, own_teacher_peak)
        total, teacher_total, logit_sum, gap_sum = _raised(
            peak, total, teacher_peak, teacher_total, logit_sum, gap_sum, higher, teacher_higher
        )
        own_total, own_teacher_total, own_logit_sum, own_gap_sum = _raised(
            own_peak,
            own_total,
            own_teacher_peak,
            own_teacher_total,
            own_logit_sum,
            own_gap_sum,
            higher,
            teacher_higher,
        )
        total += own_total
        teacher_total += own_teacher_total
        logit_sum += own_logit_sum
        gap_sum += own_gap_sum
        peak, teacher_peak = higher, teacher_higher
        own += tokens
    total, teacher_total = tl.where(used, total, 1.0), tl.where(used, teacher_total, 1.0)
    log2_total, log2_teacher_total = tl.log2(total), tl.log2(teacher_total)
    mean_gap = gap_sum / total
    loss = tl.zeros((BLOCK,), tl.float32)
    # A share of 0 times an infinity would be NaN.
    if forward_share != 0:
        loss += forward_share * (log2_total * LOG_2 - logit_sum / teacher_total)
    if reverse_share != 0:
        # Near the teacher the loss is small beside either logarithm.
        loss += reverse_share * (mean_gap - tl.log2(total / teacher_total) * LOG_2)
    place = first_place + here
    tl.store(losses + place, tl.where(used, loss, 0.0), mask=inside)
    if target_logits is not None:
        target = tl.load(target_logits + here, mask=used, other=0.0)
        # Of logits less the largest: what all share costs no digit.
        own_nll = log2_total * LOG_2 - (target - _finite(peak))
        tl.store(nll + place, tl.where(used, own_nll, 0.0), mask=inside)
    own = numbers + place
    stride = places.to(tl.int64)
    tl.store(own, _finite(peak), mask=inside)
    tl.store(own + stride, log2_total, mask=inside)
    tl.store(own + 2 * stride, _finite(teacher_peak), mask=inside)
    tl.store(own + 3 * stride, log2_teacher_total, mask=inside)
    tl.store(own + 4 * stride, mean_gap, mask=inside)


def row_statistics(
    group: Group,
    first_place: int,  # of the group: of the piece whose teacher's states are there, a multiple of the row block
    places: int,
    shares: tuple[float, float],  # of the forward and the reverse divergence
    a_segment: int,  # tiles of a segment
    sums: Tensor,  # SUMS * segments * places or more, float32, overwritten
    target_logits: Tensor | None,  # [places] float32: of the labels
    losses: Tensor,  # [N] float32, by place, filled at the piece's
    nll: Tensor | None,  # likewise, with logits of the labels
    numbers: Tensor,  # [NUMBERS, N] float32, likewise
    config: Config,
) -> None:
    """Two launches; reads nothing back to the host."""
    tiles = ceil_div(group.operands.weight.shape[0], config.forward_entries)
    workers = programs(group.states.device)
    blocks = ceil_div(places, config.row_block)
    count = ceil_div(tiles, a_segment)
    arguments = group.arguments(config)
    launch(
        _segment_kernel,
        (min(workers, blocks * count),),
        (*arguments, sums, group.first, first_place, places, count, a_segment, tiles),
        FORWARD=shares[0] != 0,
        REVERSE=shares[1] != 0,
        RAGGED=group.operands.weight.shape[0] % config.forward_entries != 0,
        **group.constants(arguments, config),
    )
    launch(
        _row_kernel,
        (ceil_div(places, 128),),
        (
            sums,
            group.count,
            target_logits,
            losses,
            nll,
            numbers,
            *shares,
            group.first + first_place,
            places,
            losses.numel(),
            count,
        ),
        BLOCK=128,
        num_warps=4,
    )


def tiles_a_segment(row_blocks: int, tiles: int, workers: int) -> int:
    """With which the programs have as many tiles each as can be."""
    segments = range(min(tiles, LEAST_SEGMENTS), min(tiles, MOST_SEGMENTS) + 1)
    sizes = {ceil_div(tiles, number) for number in segments}
    # Of two equally good ones the larger, whose sums are fewer.
    return min(sizes, key=lambda size: (ceil_div(row_blocks * ceil_div(tiles, size), workers) * size, -size))
