"""Where each token goes: those in use first, in their order, and how many they are; and what goes there with it.

One launch each, and nothing that the host waits for. A program that places tokens counts those in use before its block,
and all of them, from the targets themselves: reading those again costs less than another launch that has counted them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.tuning import ceil_div, rows_and_columns

# Tokens of a program. 131,072 are 32 programs, each of which reads all targets once.
BLOCK = 4096


@triton.jit(do_not_specialize=["tokens", "entries_total", "ignore_index"])
def _places_kernel(targets, rows, labels, count, divisor, tokens, entries_total, ignore_index, BLOCK: tl.constexpr):
    """rows[place] and labels[place] of this program's tokens; the first program stores count and divisor."""
    first = tl.program_id(0) * BLOCK
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        mask = start + index < tokens
        # Compared in the targets' dtype, which holds the index.
        used = mask & (tl.load(targets + start + index, mask=mask, other=0) != ignore_index)
        total += used.to(tl.int32)
        before += (used & (start < first)).to(tl.int32)
    in_use = tl.sum(total, 0)
    row = first + index
    inside = row < tokens
    label = tl.load(targets + row, mask=inside, other=0)
    used = inside & (label != ignore_index)
    place = tl.sum(before, 0) + tl.cumsum(used.to(tl.int32), 0) - used.to(tl.int32)
    # Of an ignored token: behind all in use, and the ignored ones before it.
    place = tl.where(used, place, in_use + row - place)
    tl.store(rows + place, row.to(tl.int64), mask=inside)
    names_entry = (label >= 0) & (label < entries_total)
    tl.store(labels + place, tl.where(used, tl.where(names_entry, label, 0), -1), mask=inside)
    tl.store(count, in_use, mask=first == 0)
    tl.store(divisor, tl.maximum(in_use, 1), mask=first == 0)


def compact(targets: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of targets [N], contiguous: rows [N] int64, tokens in use first and both in their order; labels [N] in that
    order, 0 where they name no entry, which nothing then reads past, -1 of those ignored; the number in use [1] int32;
    and [] int32 what their mean divides by, 1 if there are none.
    """
    tokens = targets.numel()
    rows = targets.new_empty(tokens, dtype=torch.int64)
    labels = torch.empty_like(targets)
    count = targets.new_empty(1, dtype=torch.int32)
    divisor = targets.new_empty((), dtype=torch.int32)
    # Without tokens there is a count too.
    launch(
        _places_kernel,
        (max(ceil_div(tokens, BLOCK), 1),),
        (
            targets,
            rows,
            labels,
            count,
            divisor,
            tokens,
            vocabulary,
            ignore_index,
        ),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return rows, labels, count, divisor


@triton.jit(do_not_specialize=["first_place", "tokens"])
def _in_order_kernel(
    matrix, rows, count, taken, first_place, tokens, features, matrix_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = place < tl.load(count) - first_place
    row = tl.load(rows + place, mask=used, other=0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    value = tl.load(matrix + row[:, None] * matrix_stride + d[None, :], mask=used[:, None] & exists, other=0.0)
    out = taken + place.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(out, value, mask=(place < tokens)[:, None] & exists)


def in_order(matrix: Tensor, rows: Tensor, count: Tensor, first_place: int = 0, taken: Tensor | None = None) -> Tensor:
    """Rows of ``matrix`` [N, D] at each place, ``rows`` [M] of those from ``first_place`` on, zero past the ``count``:
    what is ignored may be NaN. In the memory ``taken``, if given, [M or more, D].
    """
    tokens, features = rows.numel(), matrix.shape[1]
    if taken is None:
        taken = matrix.new_empty((tokens, features))
    block = rows_and_columns(matrix.device)
    launch(
        _in_order_kernel,
        (ceil_div(tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
        (
            matrix,
            rows,
            count,
            taken,
            first_place,
            tokens,
            features,
            matrix.stride(0),
        ),
        **block,
        num_warps=4,
    )
    return taken
