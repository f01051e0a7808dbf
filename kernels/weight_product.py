"""Gradients by rows of the weight and by the bias: a strip, by entry, times the scaled hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import in_blocks
from torchtune_lce.kernels.division import product_precision
from torchtune_lce.kernels.launching import Repeated
from torchtune_lce.kernels.operands import OwnCells
from torchtune_lce.kernels.primitives import tile_coordinates
from torchtune_lce.kernels.tuning import Config, ceil_div, programs


@triton.jit(do_not_specialize=["first_entry", "entries"])
def _weight_kernel(
    strip,
    strip_blocks,
    scaled,
    scaled_blocks,
    d_weight,
    own: OwnCells,
    count,
    features,
    strip_stride,
    first_entry,
    entries,
    ADDS: tl.constexpr,
    TMA: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `first_entry` on of d_weight, as many as `entries`, of which the strip has one each; with ADDS beside what
    they hold. Targets' cells are their ``own``, unless that is None, and 0 in the strip then.
    """
    # Places past those in use have zeros, up to whole steps, where there are any.
    used = tl.load(count)
    tiles = tl.cdiv(entries, TILE)
    chunks = tl.cdiv(features, FEATURES)
    in_step = tl.arange(0, BLOCK_K)
    for index in tl.range(tl.program_id(0), tiles * chunks, tl.num_programs(0)):
        tile, chunk = tile_coordinates(index, tiles, chunks, GROUP)
        row = tile * TILE + tl.arange(0, TILE)
        d = chunk * FEATURES + tl.arange(0, FEATURES)
        exists = (row < entries)[:, None] & (d < features)[None, :]
        total = tl.zeros((TILE, FEATURES), tl.float32)
        if TMA:
            for start in range(0, used, BLOCK_K):
                e = strip_blocks.load([tile * TILE, start])
                h = scaled_blocks.load([start, chunk * FEATURES])
                total = tl.dot(e, h, total, input_precision=PRECISION)
        else:
            columns = strip + row.to(tl.int64)[:, None] * strip_stride
            for start in range(0, used, BLOCK_K):
                place = start + in_step
                mask = (row < entries)[:, None] & (place < used)[None, :]
                e = tl.load(columns + place[None, :], mask=mask, other=0.0)
                at = scaled + place.to(tl.int64)[:, None] * features + d[None, :]
                h = tl.load(at, mask=(place < used)[:, None] & (d < features)[None, :], other=0.0)
                total = tl.dot(e, h, total, input_precision=PRECISION)
        if own is not None:
            end = tl.load(own.starts + tile + 1)
            # In turn: there are few, and no shared memory beside the other loop's.
            for start in tl.range(tl.load(own.starts + tile), end, BLOCK_K, num_stages=1):
                at = start + in_step
                label = tl.load(own.labels + at, mask=at < end, other=-1)
                place = tl.load(own.places + at, mask=at < end, other=0)
                cell = tl.load(own.cells + place, mask=at < end, other=0.0)
                cells = tl.where((first_entry + row)[:, None] == label[None, :], cell[None, :], 0.0)
                mask = (at < end)[:, None] & (d < features)[None, :]
                h = tl.load(scaled + place[:, None] * features + d[None, :], mask=mask, other=0.0)
                total = tl.dot(cells.to(h.dtype), h, total, input_precision=PRECISION)
        at = d_weight + (first_entry + row).to(tl.int64)[:, None] * features + d[None, :]
        if ADDS:
            total += tl.load(at, mask=exists, other=0.0).to(tl.float32)
        tl.store(at, total.to(d_weight.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first_entry", "entries"])
def _bias_kernel(
    strip,
    strip_blocks,
    factors,
    d_bias,
    own: OwnCells,
    count,
    strip_stride,
    first_entry,
    entries,
    ADDS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = tl.load(count)
    columns = strip + row.to(tl.int64)[:, None] * strip_stride
    total = tl.zeros((ROWS, PLACES), tl.float32)
    for start in range(0, used, PLACES):
        place = start + tl.arange(0, PLACES)
        if TMA:
            e = strip_blocks.load([tl.program_id(0) * ROWS, start])
        else:
            e = tl.load(columns + place[None, :], mask=(row < entries)[:, None] & (place < used)[None, :], other=0.0)
        total += e.to(tl.float32) * tl.load(factors + place, mask=place < used, other=0.0)[None, :]
    if own is not None:
        end = tl.load(own.starts + tl.program_id(0) + 1)
        for start in range(tl.load(own.starts + tl.program_id(0)), end, PLACES):
            at = start + tl.arange(0, PLACES)
            label = tl.load(own.labels + at, mask=at < end, other=-1)
            place = tl.load(own.places + at, mask=at < end, other=0)
            cell = tl.load(own.cells + place, mask=at < end, other=0.0) * tl.load(factors + place)
            total += tl.where((first_entry + row)[:, None] == label[None, :], cell[None, :], 0.0)
    whole = tl.sum(total, 1)
    at = d_bias + first_entry + row
    if ADDS:
        whole += tl.load(at, mask=row < entries, other=0.0).to(tl.float32)
    tl.store(at, whole.to(d_bias.dtype.element_ty), mask=row < entries)


def weight_product(
    strip: Tensor,  # [entries, whole row blocks of N]
    columns: object | None,  # its descriptor, None where the copy engine cannot read it
    scaled: Tensor,  # [N, D] in the strip's dtype: hidden states times their factors, zero past the count
    scaled_blocks: object | None,  # its descriptor
    count: Tensor,  # [1] int32
    d_weight: Tensor,  # [V, D], filled at the strip's rows
    dtype: torch.dtype,  # of the inputs
    config: Config,
    adds: bool = False,  # to what d_weight holds
    own: OwnCells | None = None,  # None: the strip has them
) -> Callable[[int, int], None]:
    """What launches it for a strip: its first entry, and how many it has."""
    features = d_weight.shape[1]
    kernel = Repeated(
        _weight_kernel,
        (
            strip,
            columns,
            scaled,
            scaled_blocks,
            d_weight,
            own,
            count,
            features,
            strip.stride(0),
        ),
        ADDS=adds,
        TMA=columns is not None,
        TILE=config.entry_tile,
        FEATURES=weight_chunk(strip, config),
        BLOCK_K=weight_depth(strip, config),
        GROUP=config.group,
        PRECISION=product_precision(dtype, config),
        num_warps=config.warps,
        num_stages=config.backward_stages,
    )

    def launch(first: int, entries: int) -> None:
        items = ceil_div(entries, config.entry_tile) * ceil_div(features, weight_chunk(strip, config))
        kernel((min(programs(strip.device), items),), first, entries)

    return launch


def bias_product(
    strip: Tensor,  # [entries, whole row blocks of N]
    columns: object | None,  # its descriptor, None where the copy engine cannot read it
    factors: Tensor,  # [N] float32
    count: Tensor,  # [1] int32
    d_bias: Tensor,  # [V], filled at the strip's entries
    config: Config,
    adds: bool = False,  # to what d_bias holds
    own: OwnCells | None = None,  # None: the strip has them
) -> Callable[[int, int], None]:
    """The same for the bias: no product, but a sum of the strip times the factors."""
    kernel = Repeated(
        _bias_kernel,
        (
            strip,
            columns,
            factors,
            d_bias,
            own,
            count,
            strip.stride(0),
        ),
        ADDS=adds,
        TMA=columns is not None,
        ROWS=config.entry_tile,
        PLACES=weight_depth(strip, config),
        num_warps=config.warps,
    )
    return lambda first, entries: kernel((ceil_div(entries, config.entry_tile),), first, entries)


def in_order_of_labels(labels: Tensor, cells: Tensor, first: int, end: int, config: Config) -> OwnCells:
    """For a product of entries from ``first`` to ``end``."""
    ordered, places = labels.sort(stable=True)
    edges = torch.arange(first, end + config.entry_tile, config.entry_tile, dtype=labels.dtype, device=labels.device)
    return OwnCells(ordered, places, torch.searchsorted(ordered, edges), cells)


def weight_blocks(strip: Tensor, scaled: Tensor, config: Config) -> tuple[object, object]:
    """Descriptors of both, where the copy engine can read them."""
    depth = weight_depth(strip, config)
    return in_blocks(strip, config.entry_tile, depth), in_blocks(scaled, depth, weight_chunk(strip, config))


def weight_depth(strip: Tensor, config: Config) -> int:
    """Places of a step."""
    return 32 if strip.element_size() == 4 else config.block_k


def weight_chunk(strip: Tensor, config: Config) -> int:
    """Columns of D that a program sums."""
    return config.entry_tile if strip.element_size() == 4 else config.features
