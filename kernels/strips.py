"""Loss and hidden gradient in one walk over the vocabulary.

With E = exp(logit - reference), measured a row from its target's logit (reference_logits.py), and S' and u' the sums of
E and of E c w over all entries but the target, c being the softcap's derivative:

    loss = log(1 + S' / T),    gradient of loss and log-sum-exp by hidden = g (u' - S' c_t w_t) / (T + S') + ...

with T = E of the target; row_gradients.py has all of it. So what u' needs of a strip of the vocabulary is known as soon
as the strip's logits are: one kernel leaves E of the strip and its row sums (exponentials.py), a second product adds E
times the strip's weight rows to u' (strip_product.py). With a filter that is over the active columns of each row block
alone (active_columns.py) unless it keeps all (keep_rule.py), and what they leave out gives its mean (dropped_mean.py).
The backward then has no kernel that sees the vocabulary, but for a trained projection (entry_gradients.py). The
workspace holds one strip and u'. Where it is small, tokens are taken in pieces: with narrow strips the sums would be
read and written too often (division.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.active_columns import Dropped, pack_active
from torchtune_lce.kernels.division import (
    ENTRIES_A_SLOT,
    Sample,
    bytes_beside,
    divide,
    pieces_of,
    product_precision,
    strip_dtype,
    tiles_held,
)
from torchtune_lce.kernels.dropped_mean import find_means
from torchtune_lce.kernels.exponentials import Blocks, Strip, Sums, strip_exponentials
from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Held, Operands, Piece, Walk
from torchtune_lce.kernels.overflow import redo_overflown
from torchtune_lce.kernels.reference_logits import reference_logits
from torchtune_lce.kernels.row_gradients import finish_rows
from torchtune_lce.kernels.strip_product import add_product, step
from torchtune_lce.kernels.tuning import Config, ceil_div, programs


# Tiles are added in their order, from the first on, whatever strips they came in, and how threads share the work must
# not depend on whether a number is a multiple of 16: a token's sum has the same bits in any company.
@triton.jit(do_not_specialize=["first_place", "tokens", "tiles", "sums_stride"])
def _row_sum_kernel(
    sums,
    row_sums,
    count,
    first_place,
    tokens,
    tiles,
    sums_stride,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_sums[kind, place] = sum of sums[kind, :, place]."""
    kind = tl.program_id(1).to(tl.int64)
    sums += kind * sums_stride
    row_sums += kind * tokens
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


class Tiles(NamedTuple):
    """Tiles of the vocabulary that are walked in a strip's memory."""

    strip: Strip
    first: int
    end: int


def walk_rows(
    operands: Operands,  # without an adapter
    targets: Tensor,  # [N], as they came: where one names no entry, its token's results are NaN
    rows: Tensor,  # [N] int64: rows of hidden, those in use first
    labels: Tensor,  # [N], in that order
    count: Tensor,  # [1] int32, rows in use, on the device
    eps: float | None,  # None: nothing is filtered
    is_trained: bool,  # the projection: shares are wanted, and what there is room for is held
    gradient_tiles: int,  # held in memory of the weight's gradient, beside those in the workspace
    with_entropy: bool,
    with_mean: bool,
    workspace: int,  # bytes
    config: Config,
) -> Walk:
    """Reads nothing back to the host. The values' memory holds the hidden states in the places' order before."""
    hidden = operands.hidden
    tokens, features = hidden.shape
    vocabulary = operands.weight.shape[0]
    filters = eps is not None
    values = torch.empty_like(hidden, memory_format=torch.contiguous_format)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return values.new_empty(shape, dtype=dtype)

    row_blocks = ceil_div(tokens, config.row_block)
    dropped_mass, kept = (
        empty(tokens * filters),
        values.new_zeros(row_blocks, dtype=torch.int32) if filters else empty(0, dtype=torch.int32),
    )
    shares = empty(5, tokens) if is_trained else empty(0)
    by_row = [empty(tokens) for _ in range(3)]
    optional = empty(tokens * with_entropy), empty(tokens * with_mean)
    sums_a_tile = 1 + with_entropy + with_mean
    room = workspace if holds(is_trained, filters, with_mean) else 0
    memory = empty_held(hidden, vocabulary, gradient_tiles, sums_a_tile, room, config)
    results = Walk(*by_row, dropped_mass, values, empty(2, tokens), kept, shares, *optional, *memory)
    if not tokens:
        return results
    logits = reference_logits(operands, targets, rows, count, values, config)
    tiles = ceil_div(vocabulary, config.forward_entries)
    workers = programs(hidden.device)
    held = results.held, results.in_gradient
    if room:
        held = (
            strip_in_workspace(results.held, tokens, config),
            strip_in_gradient(results.in_gradient, gradient_tiles, tokens, config),
        )
    is_held = any(map(len, held))
    if is_held:
        of_token = bytes_beside(1, tiles, features, False, sums_a_tile, config)
        pieces = len(pieces_of(tokens, of_token, workspace - results.held.nbytes, config))
        places = min(ceil_div(row_blocks, pieces) * config.row_block, tokens)
    else:
        division = divide(tokens, vocabulary, features, hidden.dtype, filters, sums_a_tile, workspace, workers, config)
        places, slots = min(division.tokens, tokens), None
        if filters:
            slots = max(division.slots, division.tiles * config.forward_entries // ENTRIES_A_SLOT)
        strip = Strip.empty(places, division.tiles, slots, hidden, config)
        strips = [Tiles(strip, 0, tiles)]
    totals = empty(places, features)
    # Each from a multiple of 16 bytes on: kernels are compiled for such addresses or for others.
    sums_of_tiles = empty(sums_a_tile, ceil_div(tiles * places, 4) * 4)
    kinds = sums_a_tile + 2 + with_entropy
    sums_of_rows = empty(kinds * places)
    for number, first in enumerate(range(0, tokens, places)):
        here = slice(first, first + places)
        piece = Piece(operands, rows[here], count, first, values[here], labels[here], *logits[:, here].unbind())
        tile_sums = sums_of_tiles[:, : tiles * piece.tokens]
        of_rows = sums_of_rows[: kinds * piece.tokens].view(kinds, piece.tokens)
        redone, of_tiles = of_rows[sums_a_tile:], Sums.of(tile_sums, with_entropy, with_mean)
        row_sums = Sums.of(of_rows[:sums_a_tile], with_entropy, with_mean)
        left_out, kept_strips = None, (None, None)
        if is_held:
            columns = slice(first, first + ceil_div(piece.tokens, config.row_block) * config.row_block)
            strips, kept_strips = held_strips(*(strip[:, columns] for strip in held), tiles, config)
        if filters:
            blocks = slice(first // config.row_block, ceil_div(first + piece.tokens, config.row_block))
            sample = Sample.of(number, ceil_div(tokens, places), blocks.stop - blocks.start, tiles)
            left_out = Dropped.empty(piece, sample, kept[blocks], strip, config)
        walk(piece, totals, strips, of_tiles, left_out, eps, config)
        launch(
            _row_sum_kernel,
            (ceil_div(piece.tokens, 32), sums_a_tile),
            (
                tile_sums,
                of_rows,
                count,
                first,
                piece.tokens,
                tiles,
                tile_sums.stride(0),
            ),
            TILES=64,
            BLOCK=32,
            num_warps=4,
        )
        precision = product_precision(hidden.dtype, config)
        redo_overflown(piece, row_sums.powers, of_tiles.powers, redone, totals, *kept_strips, precision, config)
        if left_out is not None:
            find_means(piece, left_out, strip, config)
        finish_rows(piece, totals, row_sums, redone, left_out, results, config)
    return results


def holds(is_trained: bool, filters: bool, with_mean: bool) -> bool:
    """Whether exponentials are held: gradients of the logits' means want the workspace for themselves."""
    return is_trained and not filters and not with_mean


def empty_held(
    hidden: Tensor, vocabulary: int, gradient_tiles: int, sums_a_tile: int, workspace: int, config: Config
) -> tuple[Tensor, Tensor]:
    """Memory of :attr:`Walk.held`, and for in_gradient that of a gradient [V, D]; ``workspace`` 0: nobody wants any.

    Else two elements of the first at the least: whether a tensor has two torch asks while it traces, and an export is
    for the numbers of tokens with the same answer alone.
    """
    size = 0
    if workspace:
        tokens, features = hidden.shape
        tiles = tiles_held(tokens, vocabulary, features, hidden.dtype, sums_a_tile, workspace, config)
        if gradient_tiles:
            tiles = min(tiles, ceil_div(vocabulary, config.forward_entries) - gradient_tiles)
        columns = ceil_div(tokens, config.row_block) * config.row_block
        size = torch.sym_max(tiles * config.forward_entries * columns, 2)
    held = hidden.new_empty(size, dtype=strip_dtype(hidden.dtype))
    # A view of it, as a gradient, could not be changed in place as others can.
    return held, hidden.new_empty((vocabulary, hidden.shape[1]) if gradient_tiles else 0)


def strip_in_workspace(held: Tensor, tokens: int, config: Config) -> Tensor:
    """[entries, whole row blocks of N]: of the first that :func:`empty_held` has made all that it has room for."""
    columns = max(ceil_div(tokens, config.row_block), 1) * config.row_block
    return held[: held.numel() // columns * columns].view(-1, columns)


def strip_in_gradient(gradient: Tensor, tiles: int, tokens: int, config: Config) -> Tensor:
    """[entries, whole row blocks of N]: as many ``tiles`` in the first rows of the second."""
    columns = max(ceil_div(tokens, config.row_block), 1) * config.row_block
    dtype = strip_dtype(gradient.dtype)
    size = tiles * config.forward_entries * columns * dtype.itemsize // gradient.element_size()
    return gradient.view(-1)[:size].view(dtype).view(-1, columns)


def held_strips(
    in_workspace: Tensor, in_gradient: Tensor, tiles: int, config: Config
) -> tuple[list[Tiles], tuple[Held | None, Held | None]]:
    """The strips of a vocabulary of ``tiles`` whose last ones stay in these memories; and what stays, for kernels.

    All before the gradient's are made in the workspace's memory, or where that has none in the gradient's.
    """
    strips, first = [], tiles - len(in_gradient) // config.forward_entries
    if len(in_workspace):
        strips.append(Tiles(Strip.held(in_workspace, first, config), 0, first))
    if len(in_gradient):
        start = first if len(in_workspace) else 0
        strips.append(Tiles(Strip.held(in_gradient, tiles - start, config), start, tiles))
    return strips, (_kept(in_workspace, first, config), _kept(in_gradient, tiles, config))


def _kept(values: Tensor, end: int, config: Config) -> Held | None:
    """What ``values`` are of the tiles before ``end``; None where they are none."""
    entries = end * config.forward_entries
    return Held(values, entries - len(values), entries, values.stride(0)) if len(values) else None


def walk(
    piece: Piece,
    totals: Tensor,  # [M, D] float32, filled: u'
    strips: list[Tiles],
    tile_sums: Sums,  # [tiles, M] each, filled
    dropped: Dropped | None,  # filled
    eps: float | None,
    config: Config,
) -> None:
    """Every strip's exponentials and their product with its weight rows."""
    row_blocks = ceil_div(piece.tokens, config.row_block)
    depth, chunk = step(row_blocks, piece.states.shape[1], piece.states.dtype, programs(piece.states.device), config)
    number = 0
    for strip, start, end in strips:
        blocks = Blocks.of(piece, strip, depth, chunk, config)
        kernels = [strip_exponentials(piece, strip, blocks, tile_sums, dropped and dropped.running, eps, config)]
        if dropped is not None:
            kernels.append(pack_active(piece, strip, tile_sums.powers, dropped, config))
        kernels.append(add_product(piece, strip, blocks, dropped is not None, totals, config))
        for first, here in strip.parts(end - start):
            for kernel in kernels:
                kernel(number, start + first, here)
            number += 1
