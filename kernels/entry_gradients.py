"""Gradients by weight and bias: every strip of the vocabulary once more, times the scaled hidden states.

Exponentials of the vocabulary's last entries, as far as the workspace goes, are held since the forward, and not made
again. Strips of the others are taken from their end on, so that rows of the weight's gradient that are not written yet
have room for a strip's exponentials: where they hold more of them than the workspace does, they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.division import strip_dtype
from torchtune_lce.kernels.exponentials import Blocks
from torchtune_lce.kernels.operands import ForEntries, Operands, OwnCells
from torchtune_lce.kernels.places import in_order
from torchtune_lce.kernels.scaled_states import scale_states
from torchtune_lce.kernels.strip_again import strip_again
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
    held: Tensor,  # [entries, whole row blocks of N]: see Walk
    in_gradient: Tensor,  # likewise; may lie in d_weight
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
    tokens = hidden.shape[0]
    if not tokens:
        for gradient in (d_weight, d_bias):
            if gradient is not None:
                gradient.zero_()
        return
    dtype = strip_dtype(hidden.dtype)
    scaled = memory if memory.dtype == dtype else memory.new_empty(memory.shape, dtype=dtype)
    given = scale_states(hidden, rows, count, shares, d_losses, d_log_sums, scaled)
    products = _Products(given, count, d_weight, d_bias, hidden.dtype, config)
    end, tiles = weight.shape[0], ceil_div(weight.shape[0], config.forward_entries)
    # The gradient's first: rows of the others are written over it.
    for strip in (in_gradient, held):
        if len(strip):
            tiles -= len(strip) // config.forward_entries
            first = tiles * config.forward_entries
            _of_held(products, strip, labels, first, end)
            end = first
    if tiles:
        _of_strips(products, operands, rows, labels, shares, tiles, workspace)


@dataclass(frozen=True)
class _Products:
    """What makes the gradients that are wanted, of strips wherever their exponentials lie."""

    given: ForEntries
    count: Tensor  # [1] int32
    d_weight: Tensor | None  # [V, D]
    d_bias: Tensor | None  # [V]
    dtype: torch.dtype  # of the inputs
    config: Config

    def of(
        self, strip: Tensor, columns: object | None, scaled_blocks: object | None, own: OwnCells | None = None
    ) -> list[Callable[[int, int], None]]:
        """For a strip [entries, whole row blocks of N] and the descriptors of it and of what is scaled: what launches
        each for the strip's first entry, and how many it has.
        """
        products = []
        if self.d_weight is not None:
            scaled = self.given.scaled, scaled_blocks
            products.append(
                weight_product(strip, columns, *scaled, self.count, self.d_weight, self.dtype, self.config, own=own)
            )
        if self.d_bias is not None:
            factors = self.given.factors
            products.append(bias_product(strip, columns, factors, self.count, self.d_bias, self.config, own=own))
        return products


def _of_held(products: _Products, strip: Tensor, labels: Tensor, first: int, end: int) -> None:
    """Of entries from ``first`` to ``end``, whose exponentials the forward has left."""
    given, config = products.given, products.config
    blocks = None, None
    if has_blocks(config, strip, given.scaled):
        blocks = weight_blocks(strip, given.scaled, config)
    own = in_order_of_labels(labels, given.cells, first, end, config)
    for product in products.of(strip, *blocks, own):
        product(first, end - first)


def _of_strips(
    products: _Products,
    operands: Operands,
    rows: Tensor,
    labels: Tensor,
    shares: Tensor,
    tiles: int,  # the vocabulary's first
    workspace: int,
) -> None:
    """Of entries whose exponentials are made again."""
    given, count, d_weight, config = products.given, products.count, products.d_weight, products.config
    hidden, weight = operands.hidden, operands.weight
    tokens, features = hidden.shape
    places, in_workspace = _division(hidden, workspace, config)
    columns = ceil_div(tokens, config.row_block) * config.row_block
    dtype = given.scaled.dtype
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
            values = given.scaled.new_empty(size)
        strip = values.view(most, columns)
        blocks, scaled_blocks = _blocks(operands, states, strip, given.scaled, config)
        again = strip_again(operands, states, blocks, labels, count, shares, given.cells, strip, config)
        return again, products.of(strip, blocks.columns, scaled_blocks)

    for strip in strips:
        again, of_strip = kernels(strip.in_output)
        for piece in pieces:
            if len(pieces) > 1 or strip is strips[0]:
                in_order(hidden, rows[piece.start : piece.stop], count, piece.start, states)
            again(piece.start, len(piece), strip.first, strip.tiles)
        first = strip.first * config.forward_entries
        entries = min(strip.tiles * config.forward_entries, weight.shape[0] - first)
        for product in of_strip:
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
