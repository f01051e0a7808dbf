"""Gradients by weight and bias: every strip of the vocabulary once more, times the scaled hidden states.

Exponentials of the vocabulary's last entries, as far as the workspace goes, are held since the forward, and not made
again. Strips of the others are taken from their end on, so that rows of the weight's gradient that are not written yet
have room for a strip's exponentials: where they hold more of them than the workspace does, they are used.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.division import strip_dtype
from torchtune_lce.kernels.exponentials import Blocks
from torchtune_lce.kernels.operands import Operands, OwnCells
from torchtune_lce.kernels.places import in_order
from torchtune_lce.kernels.scaled_states import scale_states
from torchtune_lce.kernels.strip_again import strip_again
from torchtune_lce.kernels.strips import as_strip
from torchtune_lce.kernels.tuning import Config, ceil_div
from torchtune_lce.kernels.weight_product import bias_product, in_order_of_labels, weight_blocks, weight_product


class BackwardStrip(NamedTuple):
    first: int  # tile of config.forward_entries entries
    tiles: int
    in_output: bool  # its exponentials lie in the first rows of the weight's gradient


def backward_strips(tiles: int, in_workspace: int, rows_a_row: float) -> list[BackwardStrip]:
    """From the end of ``tiles`` on; ``rows_a_row`` rows of a strip fit into a row of the weight's gradient."""
    strips = []
    end = tiles
    while end:
        in_output = int(end * rows_a_row / (1 + rows_a_row))
        width = min(max(in_output, in_workspace), end)
        strips.append(BackwardStrip(end - width, width, in_output > in_workspace))
        end -= width
    return strips


def entry_gradients(
    operands: Operands,  # without an adapter
    rows: Tensor,  # [N] int64: rows of hidden, those in use first
    labels: Tensor,  # [N], in that order
    count: Tensor,  # [1] int32, rows in use, on the device
    shares: Tensor,  # [5, N] float32: see Walk
    held: Tensor,  # see Walk
    d_losses: Tensor,  # [N] float32, in the order of hidden
    d_log_sums: Tensor | None,  # [N] float32
    memory: Tensor,  # [N, D] in the dtype of hidden, overwritten
    d_weight: Tensor | None,  # [V, D], filled
    d_bias: Tensor | None,  # [V], filled
    workspace: int,  # bytes, beside what is held
    config: Config,
) -> None:
    """Reads nothing back to the host."""
    hidden, weight = operands.hidden, operands.weight
    tokens, features = hidden.shape
    if not tokens:
        for gradient in (d_weight, d_bias):
            if gradient is not None:
                gradient.zero_()
        return
    dtype = strip_dtype(hidden.dtype)
    scaled = memory if memory.dtype == dtype else memory.new_empty(memory.shape, dtype=dtype)
    given = scale_states(hidden, rows, count, shares, d_losses, d_log_sums, scaled)
    vocabulary = weight.shape[0]

    def products_of(strip: Tensor, columns: object, scaled_blocks: object, own: OwnCells | None = None) -> list:
        """What makes gradients of a strip's entries."""
        products = []
        if d_weight is not None:
            factors = strip, columns, scaled, scaled_blocks
            products.append(weight_product(*factors, count, d_weight, hidden.dtype, config, own=own))
        if d_bias is not None:
            products.append(bias_product(strip, columns, given.factors, count, d_bias, config, own=own))
        return products

    held = as_strip(held, tokens, config)
    tiles = ceil_div(vocabulary, config.forward_entries) - len(held) // config.forward_entries
    if len(held):
        first = tiles * config.forward_entries
        blocks = weight_blocks(held, scaled, config) if has_blocks(config, held, scaled) else (None, None)
        own = in_order_of_labels(labels, given.cells, first, vocabulary, config)
        for product in products_of(held, *blocks, own):
            product(first, vocabulary - first)
    if not tiles:
        return
    places, in_workspace = _division(hidden, workspace, config)
    columns = ceil_div(tokens, config.row_block) * config.row_block
    rows_a_row = 0.0
    if d_weight is not None:
        rows_a_row = features * d_weight.element_size() / (columns * dtype.itemsize)
    strips = backward_strips(tiles, in_workspace, rows_a_row)
    pieces = [range(first, min(first + places, tokens)) for first in range(0, tokens, places)]
    states = hidden.new_empty((places, features))

    @functools.cache
    def kernels(in_output: bool) -> tuple:
        """What makes a strip, and what its gradients, with its exponentials in either memory."""
        most = max(strip.tiles for strip in strips if strip.in_output == in_output) * config.forward_entries
        size = most * columns
        if in_output:
            values = d_weight.view(-1)[: size * dtype.itemsize // d_weight.element_size()].view(dtype)
        else:
            values = scaled.new_empty(size)
        strip = values.view(most, columns)
        blocks, scaled_blocks = _blocks(operands, states, strip, scaled, config)
        again = strip_again(operands, states, blocks, labels, count, shares, given.cells, strip, config)
        return again, products_of(strip, blocks.columns, scaled_blocks)

    for strip in strips:
        again, products = kernels(strip.in_output)
        for piece in pieces:
            if len(pieces) > 1 or strip is strips[0]:
                in_order(hidden, rows[piece.start : piece.stop], count, piece.start, states)
            again(piece.start, len(piece), strip.first, strip.tiles)
        first = strip.first * config.forward_entries
        entries = min(strip.tiles * config.forward_entries, vocabulary - first)
        for product in products:
            product(first, entries)


def _division(hidden: Tensor, workspace: int, config: Config) -> tuple[int, int]:
    """Places whose states are copied at once, and tiles of a strip in the workspace: at least one of each."""
    tokens, features = hidden.shape
    row_blocks = ceil_div(tokens, config.row_block)
    size, strip_size = hidden.element_size(), strip_dtype(hidden.dtype).itemsize
    if strip_size > size:
        # Of float16 what is scaled has memory of its own.
        workspace -= tokens * features * strip_size
    of_block = config.row_block * features * size
    of_tile = config.forward_entries * row_blocks * config.row_block * strip_size
    # Of all tokens at once states are copied once, of a piece in each strip: worth half of it.
    blocks = min(max(min(workspace // 2, workspace - of_tile) // of_block, 1), row_blocks)
    tiles = (workspace - blocks * of_block) // of_tile
    return min(blocks * config.row_block, tokens), max(tiles, 1)


def _blocks(operands: Operands, states: Tensor, strip: Tensor, scaled: Tensor, config: Config) -> tuple[Blocks, object]:
    """Descriptors for both kernels, the last that of what is scaled; None where the copy engine cannot read them."""
    if not has_blocks(config, states, operands.weight, strip, scaled):
        return Blocks(), None
    stored = None
    if strip.element_size() == 2 and config.stores_transposed:
        stored = in_blocks(strip, config.forward_entries, config.row_block)
    columns, scaled_blocks = weight_blocks(strip, scaled, config)
    blocks = replace(Blocks.of_logits(states, operands.weight, config), stored=stored, columns=columns)
    return blocks, scaled_blocks
