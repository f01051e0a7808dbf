"""Exponentials of a strip once more, in the backward: from each row's last reference, and with its target's own cell.

Nothing overflows: a row that was done again (overflow.py) is measured from its largest logit from the start.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.exponentials import Blocks, store_by_entry, strip_logits
from torchtune_lce.kernels.launching import Repeated
from torchtune_lce.kernels.operands import Operands
from torchtune_lce.kernels.primitives import (
    multiply_add,
    rounded_to_tf32,
    softcap_slope,
    tile_coordinates,
)
from torchtune_lce.kernels.tuning import Config, ceil_div, programs


@triton.jit(do_not_specialize=["first_place", "places", "tokens", "first_tile", "tiles"])
def _again_kernel(
    states,
    state_blocks,
    weight,
    weight_blocks,
    bias,
    labels,
    shares,
    cells,
    strip,
    strip_blocks,
    count,
    tokens,
    entries_total,
    features,
    weight_stride,
    strip_stride,
    softcap,
    log2_scale,
    first_place,
    places,
    first_tile,
    tiles,
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
    """E c of `tiles` tiles from `first_tile` on and `places` places from `first_place` on, whose states are there.

    By entry and place, as _exponential_kernel stores a strip; the target's cell is its own.
    """
    used = tl.minimum(tl.load(count) - first_place, places)
    row_blocks = tl.cdiv(tl.maximum(used, 0), ROW_BLOCK)
    for index in tl.range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0), flatten=TMA):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        tile = first_tile + column
        in_block = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        place = first_place + in_block
        present = in_block < used
        in_tile = tl.arange(0, ENTRIES)
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
        # Past the places in use there is nothing, whatever a bias says.
        shift = tl.load(shares + place, mask=present, other=0.0)
        offset = tl.load(shares + tokens + place, mask=present, other=float("-inf"))
        powers = tl.exp2(multiply_add(logits - shift[:, None], log2_scale, offset[:, None]))
        if HAS_SOFTCAP:
            powers *= softcap_slope(logits, softcap)
        if RAGGED:
            powers = tl.where((tile * ENTRIES + in_tile < entries_total)[None, :], powers, 0.0)
        own = tl.load(labels + place, mask=present, other=-1).to(tl.int32) - tile * ENTRIES
        cell = tl.load(cells + place, mask=present, other=0.0)
        powers = tl.where(in_tile[None, :] == own[:, None], cell[:, None], powers)
        if FOR_TF32:
            powers = rounded_to_tf32(powers)
        store_by_entry(
            powers.to(strip.dtype.element_ty),
            strip,
            strip_blocks,
            strip_stride,
            column * ENTRIES,
            first_place + row_block * ROW_BLOCK,
            ROW_BLOCK,
            ENTRIES,
        )


def strip_again(
    operands: Operands,  # without an adapter
    states: Tensor,  # [M, D]: hidden states of some places, in order
    blocks: Blocks,  # of states and weight, and of the strip as it is stored
    labels: Tensor,  # [N]
    count: Tensor,  # [1] int32
    shares: Tensor,  # [5, N] float32: see Walk
    cells: Tensor,  # [N] float32
    strip: Tensor,  # [entries, whole row blocks of N], filled
    config: Config,
) -> Callable[[int, int, int], None]:
    """What launches it for places and tiles: first place, how many, first tile of the vocabulary, and how many."""
    weight = operands.weight
    vocabulary, features = weight.shape
    kernel = Repeated(
        _again_kernel,
        (
            states,
            blocks.states,
            weight,
            blocks.weight,
            operands.bias,
            labels,
            shares,
            cells,
            strip,
            blocks.stored,
            count,
            labels.numel(),
            vocabulary,
            features,
            weight.stride(0),
            strip.stride(0),
            operands.softcap or 1.0,
            operands.log2_scale,
        ),
        HAS_BIAS=operands.bias is not None,
        HAS_SOFTCAP=operands.softcap is not None,
        TMA=blocks.states is not None,
        FOR_TF32=strip.element_size() > states.element_size(),
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        BLOCK_D=config.block_d,
        GROUP=config.group,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.forward_stages,
    )

    def launch(first_place: int, places: int, first: int, tiles: int) -> None:
        row_blocks = ceil_div(places, config.row_block)
        ragged = (first + tiles) * config.forward_entries > vocabulary
        kernel((min(programs(states.device), row_blocks * tiles),), first_place, places, first, tiles, RAGGED=ragged)

    return launch
