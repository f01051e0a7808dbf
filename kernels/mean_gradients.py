"""Gradients by means of capped logits, for label smoothing: nothing of them is small enough to leave out.

Without a softcap the mean of a token's logits is linear in its hidden state, and no matter of kernels
(torchtune_lce/terms/label_smoothing.py). With one the passes that make the losses sum up the logits too. Their gradient
by what the softcap takes is c / V at each of the V entries, c being its derivative there, times s, the scale of the
entry's row, if there is one (DoRA's). So the backward makes all logits once more, in strips of the vocabulary. A strip
holds c s, whatever upstream gradients are: times the weight's rows it gives what these multiply, a token, and times
hidden states that they have multiplied the gradients by the weight's rows. All are added to what the cross-entropy's
backward has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.kernels.descriptors import has_blocks
from torchtune_lce.kernels.division import pieces_of, strip_dtype
from torchtune_lce.kernels.exponentials import Blocks, Strip, store_by_entry, strip_logits
from torchtune_lce.kernels.launching import Repeated, launch
from torchtune_lce.kernels.operands import Gradients, Operands, OperandsArgument, Ordered, used_in
from torchtune_lce.kernels.places import in_order
from torchtune_lce.kernels.primitives import (
    add_low_rank,
    rounded_to_tf32,
    softcap_slope,
    softcapped,
    tile_coordinates,
)
from torchtune_lce.kernels.strip_product import add_product, step
from torchtune_lce.kernels.tuning import Config, ceil_div, programs, rows_and_columns
from torchtune_lce.kernels.weight_product import bias_product, weight_blocks, weight_product

# Pieces of tokens whose gradients may be added up in 16 bits: of so few the roundings are less than that of a strip.
MOST_ROUNDED = 8


@triton.jit(do_not_specialize=["tokens", "first_tile", "tiles"])
def _slope_kernel(
    states,
    state_blocks,
    operands: OperandsArgument,  # ``low`` by place
    weight_blocks,
    factors,
    strip,
    strip_blocks,
    scale_sums,
    count,
    tokens,
    strip_stride,
    scale_stride,
    first_tile,
    tiles,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    FOR_TF32: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c s of `tiles` tiles from `first_tile` on, by entry.

    Unless None also scale_sums[row block, entry of the strip]: sums of c times what is scaled times the place's factor.
    """
    used = tl.minimum(tl.load(count), tokens)
    row_blocks = tl.cdiv(used, ROW_BLOCK)
    for index in tl.range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        row_block, column = tile_coordinates(index, row_blocks, tiles, GROUP)
        tile = first_tile + column
        place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        present = place < used
        in_tile = tl.arange(0, ENTRIES)
        entries = tile * ENTRIES + in_tile
        logits = strip_logits(
            states,
            state_blocks,
            operands.weight,
            weight_blocks,
            operands.bias,
            row_block,
            tile,
            used,
            operands.entries_total,
            operands.features,
            operands.weight_stride,
            operands.softcap,
            operands.bias is not None,
            False,
            TMA,
            ROW_BLOCK,
            ENTRIES,
            BLOCK_D,
            PRECISION,
        )
        inside = entries < operands.entries_total
        if operands.low is not None:
            logits = add_low_rank(logits, operands, place, present, entries, inside, PRECISION)
        capped = logits
        if operands.scale is not None:
            scale = tl.load(operands.scale + entries, mask=inside, other=0.0)
            capped *= scale[None, :]
        capped = softcapped(capped, operands.softcap)
        slopes = softcap_slope(capped, operands.softcap)
        if scale_sums is not None:
            factor = tl.load(factors + place, mask=present, other=0.0)
            of_block = tl.sum(tl.where(present[:, None], slopes * logits * factor[:, None], 0.0), 0)
            tl.store(scale_sums + row_block.to(tl.int64) * scale_stride + column * ENTRIES + in_tile, of_block)
        if operands.scale is not None:
            slopes *= scale[None, :]
        if FOR_TF32:
            slopes = rounded_to_tf32(slopes)
        store_by_entry(
            slopes.to(strip.dtype.element_ty),
            strip,
            strip_blocks,
            strip_stride,
            column * ENTRIES,
            row_block * ROW_BLOCK,
            ROW_BLOCK,
            ENTRIES,
        )


@triton.jit(do_not_specialize=["tokens"])
def _multiply_kernel(
    matrix,
    factors,
    rows,
    count,
    out,
    tokens,
    features,
    ADDS_AT_ROWS: tl.constexpr,
    FOR_TF32: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of `matrix` times their places' factors, 0 past the count; or added to `out` at their rows of hidden."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = place < tl.minimum(tl.load(count), tokens)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    at = place.to(tl.int64)[:, None] * features + d[None, :]
    value = tl.load(matrix + at, mask=used[:, None] & exists, other=0.0).to(tl.float32)
    factor = tl.load(factors + place, mask=used, other=0.0)
    value = tl.where(used[:, None], value * factor[:, None], 0.0)
    if ADDS_AT_ROWS:
        row = tl.load(rows + place, mask=used, other=0)
        at = row[:, None] * features + d[None, :]
        mask = used[:, None] & exists
        value += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    else:
        mask = (place < tokens)[:, None] & exists
        if FOR_TF32:
            value = rounded_to_tf32(value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def add_mean_gradients(
    d_means: Tensor,  # [N] float32, by row of hidden
    operands: Operands,
    rows: Tensor,  # [N] int64
    count: Tensor,  # [1] int32
    gradients: Gradients,  # of whoever wants them, which grow by those of the means
    workspace: int,  # bytes
    config: Config,
) -> None:
    """Reads nothing back to the host.

    What entries get is in 16 bits a sum over few pieces of tokens; past these, parts of the vocabulary are taken in
    turn, whose sums are float32.
    """
    vocabulary = operands.weight.shape[0]
    factors = d_means[rows] * (operands.logit_scale / vocabulary)
    # Of a sum over tokens for which there is no product, O(V).
    bias = gradients.bias
    if bias is not None:
        gradients = gradients._replace(bias=torch.zeros_like(bias, dtype=torch.float32))
    pieces = _pieces(operands, gradients, rows.numel(), workspace, config)
    matrices = [x for x in (gradients.weight, gradients.up) if x is not None]
    if len(pieces) <= MOST_ROUNDED or all(x.dtype == torch.float32 for x in matrices):
        _add(operands, rows, count, factors, gradients, pieces, workspace, config)
    else:
        of_tokens = gradients.by_token()
        if any(x is not None for x in of_tokens):
            pieces = _pieces(operands, of_tokens, rows.numel(), workspace, config)
            _add(operands, rows, count, factors, of_tokens, pieces, workspace, config)
        _add_by_parts(operands, rows, count, factors, gradients.by_entry(), workspace, config)
    if bias is not None:
        bias += gradients.bias


def _add_by_parts(
    operands: Operands,
    rows: Tensor,
    count: Tensor,
    factors: Tensor,
    gradients: Gradients,
    workspace: int,
    config: Config,
) -> None:
    """Gradients of entries in float32 sums of a part of the vocabulary, which take a third of the workspace."""
    vocabulary, features = operands.weight.shape
    rank = 0 if gradients.up is None else operands.rank
    fitting = workspace // 3 // (4 * (features + rank)) // config.forward_entries
    entries = max(fitting, 1) * config.forward_entries
    left = max(workspace - 4 * (features + rank) * entries, 0)
    pieces = _pieces(operands, gradients, rows.numel(), left, config)
    for first in range(0, vocabulary, entries):
        part = slice(first, first + entries)
        weight, bias, up, scale = (
            x if x is None else x[part] for x in (operands.weight, operands.bias, operands.up, operands.scale)
        )
        own = Gradients(*(x if x is None else x[part] for x in gradients))
        sums = own._replace(
            weight=None if own.weight is None else torch.zeros_like(own.weight, dtype=torch.float32),
            up=None if own.up is None else torch.zeros_like(own.up, dtype=torch.float32),
        )
        of_part = replace(operands, weight=weight, bias=bias, up=up, scale=scale)
        _add(of_part, rows, count, factors, sums, pieces, left, config)
        for matrix, total in ((own.weight, sums.weight), (own.up, sums.up)):
            if matrix is not None:
                matrix += total


def _add(
    operands: Operands,
    rows: Tensor,
    count: Tensor,
    factors: Tensor,  # [N] float32, by place
    gradients: Gradients,
    pieces: list[slice],
    workspace: int,
    config: Config,
) -> None:
    hidden, (vocabulary, features) = operands.hidden, operands.weight.shape
    most = _longest(pieces)
    tiles = _strip_tiles(operands, gradients, most, workspace, config)
    scaled = low_scaled = totals = low_totals = None
    dtype = strip_dtype(hidden.dtype)
    if gradients.weight is not None:
        scaled = hidden.new_empty((most, features), dtype=dtype)
    if gradients.up is not None:
        low_scaled = hidden.new_empty((most, operands.rank), dtype=dtype)
    if gradients.hidden is not None:
        totals = hidden.new_empty((most, features), dtype=torch.float32)
    if gradients.low is not None:
        low_totals = hidden.new_empty((most, operands.rank), dtype=torch.float32)
    strip = Strip.empty(most, tiles, None, hidden, config)
    for here, piece in _ordered(operands, rows, count, pieces):
        tokens, own = piece.tokens, factors[here]
        low = piece.operands.low
        scale_sums = None
        if gradients.scale is not None:
            scale_sums = factors.new_zeros((ceil_div(tokens, config.row_block), strip.values.shape[0]))
        depth, chunk = step(ceil_div(tokens, config.row_block), features, hidden.dtype, programs(hidden.device), config)
        blocks = Blocks.of(piece, strip, depth, chunk, config)
        slopes = _slopes(piece, blocks, own, scale_sums, strip, config)
        products = []
        if totals is not None:
            products.append(add_product(piece, strip, blocks, False, totals, config))
        if scaled is not None or gradients.bias is not None:
            # Past a piece's places the copy engine must find nothing of another's.
            of_piece = None if scaled is None else scaled[:tokens]
            products.append(_by_entry(piece, own, strip, of_piece, gradients, config))
        if low is not None:
            # What follows multiplies places past those in use too.
            strip.values.zero_()
            if low_scaled is not None:
                _multiply(low, own, piece, low_scaled)
            if low_totals is not None:
                low_totals.zero_()
            products.append(_of_adapter(piece, strip, scale_sums, low_scaled, low_totals, gradients, config))
        for number, (first, width) in enumerate(strip.parts(ceil_div(vocabulary, config.forward_entries))):
            slopes(number, first, width)
            for product in products:
                product(number, first, width)
        for sums, gradient in ((totals, gradients.hidden), (low_totals, gradients.low)):
            if gradient is not None:
                _multiply(sums, own, piece, gradient, at_rows=True)


def _by_entry(
    piece: Ordered, factors: Tensor, strip: Strip, scaled: Tensor | None, gradients: Gradients, config: Config
) -> Callable[[int, int, int], None]:
    """What adds a strip's part to the gradients by weight and bias."""
    columns = scaled_blocks = None
    products = []
    if scaled is not None:
        _multiply(piece.states, factors, piece, scaled)
        if has_blocks(config, strip.values, scaled):
            columns, scaled_blocks = weight_blocks(strip.values, scaled, config)
        operands = strip.values, columns, scaled, scaled_blocks, piece.count, gradients.weight, piece.states.dtype
        products.append(weight_product(*operands, config, adds=True))
    if gradients.bias is not None:
        products.append(bias_product(strip.values, columns, factors, piece.count, gradients.bias, config, adds=True))

    def launch(_: int, first: int, tiles: int) -> None:
        part = _entries(piece, first, tiles, config)
        for product in products:
            product(part.start, part.stop - part.start)

    return launch


def _of_adapter(
    piece: Ordered,
    strip: Strip,
    scale_sums: Tensor | None,
    scaled: Tensor | None,
    totals: Tensor | None,
    gradients: Gradients,
    config: Config,
) -> Callable[[int, int, int], None]:
    """What adds a strip's part to the gradients by ``up`` and scale, and to the sums of that by ``low``."""
    up = piece.operands.up

    def run(_: int, first: int, tiles: int) -> None:
        part = _entries(piece, first, tiles, config)
        slopes = strip.values[: part.stop - part.start, : piece.tokens]
        if totals is not None:
            totals[: piece.tokens] += _product(slopes.T, up[part])
        if scaled is not None:
            gradients.up[part] += _product(slopes, scaled[: piece.tokens])
        if scale_sums is not None:
            gradients.scale[part] += scale_sums[:, : part.stop - part.start].sum(0)

    return run


@without_autocast
def _product(left: Tensor, right: Tensor) -> Tensor:
    """Float32, of factors in the dtype of a strip."""
    right = right.to(left.dtype)
    return left @ right if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


def _entries(piece: Ordered, first: int, tiles: int, config: Config) -> slice:
    """Those of some tiles."""
    of_tile = config.forward_entries
    return slice(first * of_tile, min((first + tiles) * of_tile, piece.operands.weight.shape[0]))


def _slopes(
    piece: Ordered,
    blocks: Blocks,
    factors: Tensor,
    scale_sums: Tensor | None,
    strip: Strip,  # filled
    config: Config,
) -> Callable[[int, int, int], None]:
    """What launches :func:`_slope_kernel` for a strip: its number, its first tile, and how many tiles it has."""
    operands, states = piece.operands, piece.states
    kernel = Repeated(
        _slope_kernel,
        (
            states,
            blocks.states,
            operands.argument,
            blocks.weight,
            factors,
            strip.values,
            blocks.stored,
            scale_sums,
            piece.count,
            piece.tokens,
            strip.values.stride(0),
            0 if scale_sums is None else scale_sums.stride(0),
        ),
        TMA=blocks.states is not None,
        # Triton 3.6 does not flatten a loop whose body has another.
        FLATTEN=blocks.states is not None and operands.low is None,
        FOR_TF32=states.dtype == torch.float16,
        ROW_BLOCK=config.row_block,
        ENTRIES=config.forward_entries,
        BLOCK_D=config.block_d,
        GROUP=config.group,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.forward_stages,
    )

    def launch(_: int, first: int, tiles: int) -> None:
        row_blocks = ceil_div(piece.tokens, config.row_block)
        kernel((min(programs(states.device), row_blocks * tiles),), first, tiles)

    return launch


def _multiply(matrix: Tensor, factors: Tensor, piece: Ordered, out: Tensor, at_rows: bool = False) -> None:
    """``out`` holds the piece's rows of ``matrix`` times their factors, or grows by them ``at_rows`` of hidden."""
    features = matrix.shape[1]
    block = rows_and_columns(matrix.device)
    launch(
        _multiply_kernel,
        (ceil_div(piece.tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
        (matrix, factors, piece.rows, piece.count, out, piece.tokens, features),
        ADDS_AT_ROWS=at_rows,
        FOR_TF32=not at_rows and out.element_size() > piece.states.element_size(),
        **block,
        num_warps=4,
    )


def _ordered(operands: Operands, rows: Tensor, count: Tensor, pieces: list[slice]) -> Iterator[tuple[slice, Ordered]]:
    """Each piece with its hidden states and ``low`` in order, in the same memory."""
    hidden, low = operands.hidden, operands.low
    most = _longest(pieces)
    states, low_states = (x if x is None else x.new_empty((most, x.shape[1])) for x in (hidden, low))
    for here in pieces:
        used, own = used_in(here, count, rows.numel()), rows[here]
        taken = [
            x if x is None else in_order(x, own, used, 0, memory)[: own.numel()]
            for x, memory in ((hidden, states), (low, low_states))
        ]
        yield here, Ordered(replace(operands, hidden=taken[0], low=taken[1]), own, used, 0, taken[0])


def _longest(pieces: list[slice]) -> int:
    return max((piece.stop - piece.start for piece in pieces), default=0)


def _states_bytes(operands: Operands) -> int:
    """Of a token's hidden state, and its row of ``low``, in order."""
    return sum(x.shape[1] * x.element_size() for x in (operands.hidden, operands.low) if x is not None)


def _token_bytes(operands: Operands, gradients: Gradients) -> int:
    """That a token takes beside the strip: its states, these multiplied, and sums of their gradients."""
    size = strip_dtype(operands.hidden.dtype).itemsize
    features, rank = operands.weight.shape[1], operands.rank
    of_hidden = 4 * (gradients.hidden is not None) + size * (gradients.weight is not None)
    of_low = 8 * (gradients.low is not None) + size * (gradients.up is not None)
    return _states_bytes(operands) + features * of_hidden + rank * of_low


def _pieces(operands: Operands, gradients: Gradients, tokens: int, workspace: int, config: Config) -> list[slice]:
    """A third of the workspace is left to a strip: with narrow ones the sums are read and written too often."""
    return pieces_of(tokens, _token_bytes(operands, gradients), workspace * 2 // 3, config)


def _strip_tiles(operands: Operands, gradients: Gradients, tokens: int, workspace: int, config: Config) -> int:
    """For a piece's tokens, what the rest of the workspace holds; at least one."""
    row_blocks = ceil_div(tokens, config.row_block)
    of_entry = row_blocks * (
        config.row_block * strip_dtype(operands.hidden.dtype).itemsize + 4 * (gradients.scale is not None)
    )
    left = workspace - tokens * _token_bytes(operands, gradients)
    tiles = ceil_div(operands.weight.shape[0], config.forward_entries)
    return min(max(left // max(of_entry * config.forward_entries, 1), 1), tiles)
