"""A strip of the gradient by the student's logits, and what is made of all strips by row of the hidden states.

With q the student's softmax and p the teacher's, f and r the shares of the two divergences and k the reverse one, it is
f (q - p) + r q (log q - log p - k); and with a share l of the labels' cross-entropy l (q - 1 at the label) beside it.
Near the teacher the first is small beside q and p: it is made in float32 of logits that were never rounded, and rounded
once, as what the products take.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.divergence_tiles import Group, both_logits
from torchtune_lce.kernels.exponentials import store_by_entry
from torchtune_lce.kernels.launching import Repeated, launch
from torchtune_lce.kernels.operands import OperandsArgument
from torchtune_lce.kernels.primitives import LOG2_E, multiply_add, rounded_to_tf32, tile_coordinates
from torchtune_lce.kernels.tuning import Config, ceil_div, programs, rows_and_columns


@triton.jit(
    do_not_specialize=["group_first", "group_tokens", "all_places", "first_place", "places", "first_tile", "tiles"]
)
def _difference_kernel(
    student: OperandsArgument,
    teacher: OperandsArgument,
    states,
    state_blocks,
    weight_blocks,
    teacher_states,
    teacher_state_blocks,
    teacher_weight_blocks,
    count,
    rows,
    labels,
    numbers,
    divisor,
    strip,
    strip_blocks,
    bias_sums,
    strip_stride,
    bias_stride,
    forward_share,
    reverse_share,
    label_share,
    group_first,
    group_tokens,
    all_places,
    first_place,
    places,
    first_tile,
    tiles,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    LABELS: tl.constexpr,
    RAGGED: tl.constexpr,
    FOR_TF32: tl.constexpr,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the mean by `tiles` tiles of logits, of `places` places from `first_place` of the group on.

    By entry and place of the group, as _exponential_kernel stores a strip; 0 past the vocabulary and the places in use.
    Unless None also bias_sums[row block, entry]: its sum over a row block, not rounded.
    """
    used = tl.minimum(tl.minimum(tl.load(count) - group_first, group_tokens) - first_place, places)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    share = 1.0 / tl.load(divisor).to(tl.float32)
    stride = all_places.to(tl.int64)
    for index in tl.range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0)):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        tile = first_tile + column
        in_piece = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        present = in_piece < used
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
        own = numbers + (group_first + first_place + in_piece)
        logits -= tl.load(own, mask=present, other=0.0)[:, None]
        log2_total = tl.load(own + stride, mask=present, other=0.0)
        teacher_logits -= tl.load(own + 2 * stride, mask=present, other=0.0)[:, None]
        factor = tl.zeros((ROW_BLOCK, ENTRIES), tl.float32)
        if REVERSE:
            mean_gap = tl.load(own + 4 * stride, mask=present, other=0.0)
            factor = (logits - teacher_logits - mean_gap[:, None]) * reverse_share
        if FORWARD:
            factor += forward_share
        entries = tile * ENTRIES + tl.arange(0, ENTRIES)
        if LABELS:
            row = tl.load(rows + first_place + in_piece, mask=present, other=0)
            label = tl.load(labels + row, mask=present, other=0)
            # Where it names no entry, all of its token's gradient becomes NaN, and no other's.
            names_entry = (label >= 0) & (label < student.entries_total)
            factor += tl.where(names_entry, label_share, float("nan"))[:, None]
        gradient = tl.exp2(multiply_add(logits, LOG2_E, -log2_total[:, None])) * factor
        if FORWARD:
            log2_teacher_total = tl.load(own + 3 * stride, mask=present, other=0.0)
            gradient -= tl.exp2(multiply_add(teacher_logits, LOG2_E, -log2_teacher_total[:, None])) * forward_share
        if LABELS:
            gradient -= tl.where(entries[None, :] == label[:, None], label_share, 0.0)
        exists = present[:, None]
        if RAGGED:
            exists = exists & (entries < student.entries_total)[None, :]
        gradient = tl.where(exists, gradient * share, 0.0)
        if bias_sums is not None:
            block = (first_place // ROW_BLOCK + row_block).to(tl.int64)
            at = bias_sums + block * bias_stride + column * ENTRIES + tl.arange(0, ENTRIES)
            tl.store(at, tl.sum(gradient, 0))
        if FOR_TF32:
            gradient = rounded_to_tf32(gradient)
        store_by_entry(
            gradient.to(strip.dtype.element_ty),
            strip,
            strip_blocks,
            strip_stride,
            column * ENTRIES,
            first_place + row_block * ROW_BLOCK,
            ROW_BLOCK,
            ENTRIES,
        )


def strip_differences(
    group: Group,
    shares: tuple[float, float, float],  # of the forward and the reverse divergence, and of the labels' cross-entropy
    rows: Tensor,  # [M] int64: of the group's places
    labels: Tensor,  # [N], as they came
    numbers: Tensor,  # [NUMBERS, N] float32, by place: see _row_kernel
    divisor: Tensor,  # [] int32, on the device: what the mean divides by
    strip: Tensor,  # [entries, whole row blocks of M], filled
    strip_blocks: object | None,  # its descriptor for stores, or None
    bias_sums: Tensor | None,  # [row blocks, entries] float32, filled where a row block is in use
    config: Config,
) -> Callable[[int, int, int, int], None]:
    """What launches it: first place of the group, places, first tile of the vocabulary, and how many tiles.

    The teacher's states are then those of these places.
    """
    vocabulary = group.operands.weight.shape[0]
    arguments = group.arguments(config)
    kernel = Repeated(
        _difference_kernel,
        (
            *arguments,
            *((rows, labels) if shares[2] else (None, None)),
            numbers,
            divisor,
            strip,
            strip_blocks,
            bias_sums,
            strip.stride(0),
            0 if bias_sums is None else bias_sums.stride(0),
            *shares,
            group.first,
            group.tokens,
            numbers.shape[1],
        ),
        FORWARD=shares[0] != 0,
        REVERSE=shares[1] != 0,
        LABELS=shares[2] != 0,
        FOR_TF32=strip.element_size() > group.states.element_size(),
        **group.constants(arguments, config),
    )

    def launch_strip(first_place: int, places: int, first: int, tiles: int) -> None:
        row_blocks = ceil_div(places, config.row_block)
        ragged = (first + tiles) * config.forward_entries > vocabulary
        workers = min(programs(strip.device), row_blocks * tiles)
        kernel((workers,), first_place, places, first, tiles, RAGGED=ragged)

    return launch_strip


@triton.jit(do_not_specialize=["first_place", "tokens"])
def _by_row_kernel(
    totals,
    rows,
    count,
    divisor,
    d_hidden,
    first_place,
    tokens,
    features,
    OF_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_hidden[rows[place]] = totals[place], times the divisor with OF_SUM; 0 past the count."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tokens
    used = place < tl.load(count) - first_place
    row = tl.load(rows + place, mask=inside, other=0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    own = totals + place.to(tl.int64)[:, None] * features + d[None, :]
    value = tl.load(own, mask=(used & inside)[:, None] & exists, other=0.0)
    if OF_SUM:
        value *= tl.load(divisor).to(tl.float32)
    at = d_hidden + row[:, None] * features + d[None, :]
    tl.store(at, value.to(d_hidden.dtype.element_ty), mask=inside[:, None] & exists)


def store_by_row(
    totals: Tensor,  # [M, D] float32, of meaning below the count
    rows: Tensor,  # [M] int64: row of each place
    count: Tensor,  # [1] int32
    first_place: int,
    divisor: Tensor,  # [] int32
    of_sum: bool,  # times the divisor: gradients of the sum, not of the mean
    d_hidden: Tensor,  # [N, D], filled at these rows
) -> None:
    """One launch."""
    tokens, features = rows.numel(), d_hidden.shape[1]
    block = rows_and_columns(d_hidden.device)
    launch(
        _by_row_kernel,
        (ceil_div(tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
        (totals, rows, count, divisor, d_hidden, first_place, tokens, features),
        OF_SUM=of_sum,
        **block,
        num_warps=4,
    )
