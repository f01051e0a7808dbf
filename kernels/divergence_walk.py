"""Divergences of a student from its teacher, and the gradients of the mean, made with them; and with both, where a loss
is made of either, the cross-entropy of the student's labels, which needs no more than is at hand.

The logits of both are computed twice, a tile at a time: for what a row needs of the whole vocabulary
(divergence_rows.py), then for the gradient by a strip of the student's logits (divergence_gradients.py), which is
multiplied with the strip's rows of the weight, and with the hidden states where the weight is trained. Tokens are taken
in groups whose states fit the workspace; where tokens share a gradient, all are one group.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.divergence_gradients import store_by_row, strip_differences
from torchtune_lce.kernels.divergence_rows import NUMBERS, SUMS, row_statistics, tiles_a_segment
from torchtune_lce.kernels.divergence_tiles import Group, divergence_configs
from torchtune_lce.kernels.division import chunks, numbers_of_pieces, product_rounds, strip_dtype
from torchtune_lce.kernels.exponentials import Blocks, Strip
from torchtune_lce.kernels.operands import Operands, used_in
from torchtune_lce.kernels.places import compact, in_order
from torchtune_lce.kernels.reference_logits import reference_logits
from torchtune_lce.kernels.strip_product import add_product, step
from torchtune_lce.kernels.tuning import Config, ceil_div, programs
from torchtune_lce.kernels.weight_product import weight_blocks, weight_product


class Needs(NamedTuple):
    """Which gradients are wanted, of the student."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def of_entries(self) -> bool:
        """Whether any is that tokens share."""
        return self.weight or self.bias


class Mixture(NamedTuple):
    """Of the divergence the forward and the reverse one, together 1; and the divergence of what gradients are of, whose
    rest is the labels' cross-entropy.
    """

    forward: float
    reverse: float
    divergence: float = 1.0

    @property
    def labels(self) -> float:
        return 1 - self.divergence

    @property
    def of_gradients(self) -> tuple[float, float, float]:
        return self.forward * self.divergence, self.reverse * self.divergence, self.labels


class Results(NamedTuple):
    losses: Tensor  # [N] float32, in any order, 0 where ignored
    nll: Tensor | None  # the same of the labels, if they have a share
    divisor: Tensor  # [] int32: tokens in use, 1 if there are none
    # Gradients of the mean, empty where not needed; of float16 that by hidden states is of the sum.
    d_hidden: Tensor  # [N, D]
    d_weight: Tensor  # [V, D]
    d_bias: Tensor  # [V]


@dataclass(frozen=True)
class Sizes:
    """What the division depends on; the dtypes are those of hidden states and weights."""

    tokens: int
    vocabulary: int
    features: int
    teacher_features: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    needs: Needs
    workspace: int  # bytes


@dataclass(frozen=True)
class DivergenceDivision:
    places: int  # of a piece, whole row blocks; the last may have fewer
    tiles: int  # of a strip


def walk(
    student: Operands,  # without an adapter, a softcap or a scale, as the teacher's
    teacher: Operands,
    labels: Tensor,  # [N], contiguous
    ignore_index: int,
    mixture: Mixture,
    needs: Needs,
    workspace: int,  # bytes
) -> Results:
    """Reads nothing back to the host.

    Beyond results and vectors it takes the workspace, and, where weight or bias are trained, hidden states in order
    unless their gradient's memory holds them, and that gradient's sums in float32; of float16 those states in float32.
    """
    hidden, weight = student.hidden, student.weight
    tokens, features = hidden.shape
    vocabulary = weight.shape[0]
    rows, _, count, divisor = compact(labels, ignore_index, vocabulary)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    results = Results(
        losses,
        torch.empty_like(losses) if mixture.labels else None,
        divisor,
        hidden.new_empty(hidden.shape if needs.hidden else 0),
        weight.new_empty(weight.shape if needs.weight else 0),
        weight.new_empty(vocabulary if needs.bias else 0),
    )
    if not tokens:
        results.d_weight.zero_()
        results.d_bias.zero_()
        return results
    logits_config, config = divergence_configs(hidden.device, hidden.dtype, teacher.hidden.dtype)
    sizes = Sizes(
        tokens, vocabulary, features, teacher.hidden.shape[1], hidden.dtype, teacher.hidden.dtype, needs, workspace
    )
    division = divide(sizes, programs(hidden.device), config)
    piece = min(division.places, tokens)
    together = tokens if needs.of_entries else piece
    if needs.of_entries and needs.hidden:
        # Until it is filled.
        states = results.d_hidden
    else:
        states = hidden.new_empty((together, features))
    teacher_states = teacher.hidden.new_empty((piece, sizes.teacher_features))
    numbers = losses.new_empty((NUMBERS, tokens))
    memory = _Memory(sizes, division, together, config, hidden)
    for first in range(0, tokens, together):
        here = slice(first, min(first + together, tokens))
        own = rows[here]
        target_logits = None
        if mixture.labels:
            used = used_in(here, count, tokens)
            # In the steps of the other logits.
            of_targets = replace(config, block_d=logits_config.block_d)
            target_logits, *_ = reference_logits(student, labels, own, used, states[: own.numel()], of_targets)
        else:
            in_order(hidden, own, count, first, states)
        group = Group(student, teacher, states[: own.numel()], teacher_states, count, first)
        pieces = [slice(start, min(start + piece, own.numel())) for start in range(0, own.numel(), piece)]
        for part in pieces:
            in_order(teacher.hidden, own[part], count, first + part.start, teacher_states)
            row_statistics(
                group,
                part.start,
                part.stop - part.start,
                mixture[:2],
                memory.tiles_a_segment,
                memory.sums,
                None if target_logits is None else target_logits[part],
                losses,
                results.nll,
                numbers,
                logits_config,
            )
        if any(needs):
            _gradients(
                group, own, labels, pieces, mixture.of_gradients, numbers, results, needs, memory, logits_config, config
            )
    return results


class _Memory:
    """What strips are made in, of the largest group."""

    def __init__(self, sizes: Sizes, division: DivergenceDivision, together: int, config: Config, like: Tensor):
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return like.new_empty(shape, dtype=dtype)

        needs = sizes.needs
        entries, row_blocks = division.tiles * config.forward_entries, ceil_div(together, config.row_block)
        piece = min(division.places, sizes.tokens)
        tiles = ceil_div(sizes.vocabulary, config.forward_entries)
        self.tiles = division.tiles
        # Of a whole piece: the last one, if it is smaller, has no more sums.
        self.tiles_a_segment = tiles_a_segment(ceil_div(piece, config.row_block), tiles, programs(like.device))
        self.sums = empty(SUMS * ceil_div(tiles, self.tiles_a_segment) * piece)
        self.totals = empty(together, sizes.features) if needs.hidden else None
        self.strip = self.bias_sums = self.scaled = None
        if any(needs):
            self.strip = empty(entries, row_blocks * config.row_block, dtype=strip_dtype(sizes.dtype))
        if needs.bias:
            # Zero where no place of a row block is in use.
            self.bias_sums = empty(row_blocks, entries).zero_()
        if needs.weight and strip_dtype(sizes.dtype) != sizes.dtype:
            self.scaled = empty(together, sizes.features)


def _gradients(
    group: Group,
    rows: Tensor,  # [M]: of its places
    labels: Tensor,  # [N]
    pieces: list[slice],
    shares: tuple[float, float, float],
    numbers: Tensor,
    results: Results,
    needs: Needs,
    memory: _Memory,
    logits_config: Config,
    config: Config,
) -> None:
    """Fills the results' at the group's rows. Where those by entry are needed the group has all tokens."""
    student, teacher = group.operands, group.teacher
    vocabulary, strip = student.weight.shape[0], memory.strip
    differences = strip_differences(
        group,
        shares,
        rows,
        labels,
        numbers,
        results.divisor,
        strip,
        _for_stores(strip, config),
        memory.bias_sums,
        logits_config,
    )
    products = []
    if needs.hidden:
        blocks = _product_blocks(group, strip, config)
        whole = Strip(memory.tiles, memory.tiles, strip, *[None] * 6)
        products.append(add_product(group, whole, blocks, False, memory.totals, config))
    if needs.weight:
        products.append(_weight_product(group, memory, results.d_weight, config))
    tiles = ceil_div(vocabulary, config.forward_entries)
    for number, first in enumerate(range(0, tiles, memory.tiles)):
        here = min(memory.tiles, tiles - first)
        for part in pieces:
            if len(pieces) > 1:
                in_order(teacher.hidden, rows[part], group.count, group.first + part.start, group.teacher_states)
            differences(part.start, part.stop - part.start, first, here)
        for product in products:
            product(number, first, here)
        if needs.bias:
            entry = first * config.forward_entries
            entries = min(here * config.forward_entries, vocabulary - entry)
            results.d_bias[entry : entry + entries] = memory.bias_sums[:, :entries].sum(0)
    if needs.hidden:
        of_sum = results.d_hidden.dtype == torch.float16
        store_by_row(memory.totals, rows, group.count, group.first, results.divisor, of_sum, results.d_hidden)


def _for_stores(strip: Tensor, config: Config):
    """The descriptor by which the copy engine stores a tile; None where it cannot: it takes 16 bits alone."""
    if strip.element_size() == 2 and config.stores_transposed and has_blocks(config, strip):
        return in_blocks(strip, config.forward_entries, config.row_block)
    return None


def _product_blocks(group: Group, strip: Tensor, config: Config) -> Blocks:
    weight = group.operands.weight
    if not has_blocks(config, weight, strip):
        return Blocks()
    row_blocks = ceil_div(group.tokens, config.row_block)
    depth, chunk = step(row_blocks, weight.shape[1], weight.dtype, programs(weight.device), config)
    columns = in_blocks(strip, depth, config.row_block)
    # Which states are there says that the copy engine reads the others.
    return Blocks(states=columns, weight_rows=in_blocks(weight, depth, chunk), columns=columns)


def _weight_product(group: Group, memory: _Memory, d_weight: Tensor, config: Config):
    """What launches it, as the other product: a strip's number, its first tile, and how many it has."""
    strip, states = memory.strip, group.states
    if memory.scaled is not None:
        states = memory.scaled.copy_(states)
    columns = scaled_blocks = None
    if has_blocks(config, strip, states):
        columns, scaled_blocks = weight_blocks(strip, states, config)
    product = weight_product(strip, columns, states, scaled_blocks, group.count, d_weight, group.states.dtype, config)

    def launch(_: int, first: int, tiles: int) -> None:
        entry = first * config.forward_entries
        product(entry, min(tiles * config.forward_entries, d_weight.shape[0] - entry))

    return launch


# What is lost, in rounds of all programs with a tile of both logits each, by 132 programs at 4 TB/s and 600 TF/s: by a
# tile of a strip's width, for reading its rows of both weights; by a token of a strip, for sums that are read and
# written, times the student's share of the features of both, or for the teacher's states that are copied, times theirs;
# by a strip, for its launches. Not measured.
ROUNDS_A_TILE, ROUNDS_A_TOKEN, ROUNDS_A_STRIP = 9e-3, 2.7e-4, 1.0


@cache
def divide(sizes: Sizes, workers: int, config: Config) -> DivergenceDivision:
    """The division that takes the fewest rounds within the workspace; the smallest one if none fits."""
    tiles = ceil_div(sizes.vocabulary, config.forward_entries)
    row_blocks = ceil_div(sizes.tokens, config.row_block)
    best, least = DivergenceDivision(config.row_block, 1), math.inf
    for pieces in itertools.takewhile(row_blocks.__ge__, numbers_of_pieces()):
        blocks = ceil_div(row_blocks, pieces)
        room = sizes.workspace - bytes_beside(min(blocks * config.row_block, sizes.tokens), sizes, workers, config)
        together = row_blocks if sizes.needs.of_entries else blocks
        widest = min(room // tile_bytes(together, sizes, config), tiles)
        if widest < 1:
            continue
        fewest = ceil_div(tiles, widest)
        for strips in range(fewest, min(fewest + 4, tiles) + 1):
            width = ceil_div(tiles, strips)
            rounds = _rounds(blocks, width, sizes, workers, config)
            if rounds < least:
                best, least = DivergenceDivision(blocks * config.row_block, width), rounds
    return best


def _rounds(blocks: int, width: int, sizes: Sizes, workers: int, config: Config) -> float:
    """Of a division into pieces of so many row blocks, and strips of so many tiles."""
    tiles = ceil_div(sizes.vocabulary, config.forward_entries)
    row_blocks = ceil_div(sizes.tokens, config.row_block)
    pieces, strips = ceil_div(row_blocks, blocks), ceil_div(tiles, width)
    both = sizes.features + sizes.teacher_features
    together = row_blocks if sizes.needs.of_entries else blocks
    of_piece = strips * ceil_div(blocks * width, workers) + 2 * tiles * ROUNDS_A_TILE
    if together > blocks:
        of_piece += strips * blocks * config.row_block * ROUNDS_A_TOKEN * sizes.teacher_features / both
    of_strip = ROUNDS_A_STRIP
    if sizes.needs.hidden:
        of_strip += together * config.row_block * ROUNDS_A_TOKEN * sizes.features / both
        product = min(
            product_rounds(together, sizes.features, chunk, workers, config) for chunk in chunks(sizes.dtype, config)
        )
        of_strip += product * width * sizes.features / both
    return pieces * of_piece + ceil_div(row_blocks, together) * strips * of_strip


def tile_bytes(row_blocks: int, sizes: Sizes, config: Config) -> int:
    """Of a strip, by tile of its width: its gradient, and sums of it over row blocks."""
    size = strip_dtype(sizes.dtype).itemsize * any(sizes.needs)
    return config.forward_entries * row_blocks * (config.row_block * size + 4 * sizes.needs.bias) or 1


def bytes_beside(places: int, sizes: Sizes, workers: int, config: Config) -> int:
    """Of a piece beside its strip: the teacher's states, and what rows are summed in; unless tokens share a gradient,
    and are all together, the student's states and their gradient's sums.
    """
    of_place = sizes.teacher_features * sizes.teacher_dtype.itemsize
    tiles = ceil_div(sizes.vocabulary, config.forward_entries)
    segment = tiles_a_segment(ceil_div(places, config.row_block), tiles, workers)
    of_place += 4 * SUMS * ceil_div(tiles, segment)
    if not sizes.needs.of_entries:
        of_place += sizes.features * (sizes.dtype.itemsize + 4 * sizes.needs.hidden)
    return places * of_place
