"""How tokens and vocabulary are walked within a workspace: pieces of tokens, strips of the vocabulary."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton.language as tl

from torchtune_lce.kernels.tuning import Config, ceil_div, programs

# Directions of what is dropped that a piece of tokens has: tl.dot takes no fewer rows than 16.
GROUPS = tl.constexpr(16)
# There is a slot for a column of each so many entries of a strip. With more of them its product in whole is as fast.
ENTRIES_A_SLOT = 4
# And where there is room, of each so many entries of the vocabulary: fewer products, each of which reads and writes u'.
ENTRIES_A_WAITING_SLOT = 8
# Of the first strip with a filter: the entries of a tokenizer's first ids are its most frequent.
FIRST_TILES = 8
# Of a trained projection's exponentials fewer than one of so many are not held: pieces of tokens with wider strips save
# as much.
LEAST_HELD = 8
# Parts that the sampled tiles are summed in, each by a program: more would be read again for every row.
MOST_PARTS = 16


@dataclass(frozen=True)
class Division:
    """How tokens and vocabulary are walked within a workspace."""

    tokens: int  # of a piece, whole row blocks; the last may be shorter
    tiles: int  # of a strip, of config.forward_entries entries; the last strip may have fewer
    slots: int = 0  # with a filter: for columns of a row block that wait for their product


@dataclass(frozen=True)
class Sample:
    """Tiles ``first``, ``first + every`` and so on of the vocabulary, each for one row block of every group."""

    first: int
    every: int
    blocks_a_group: int
    tiles: int  # how many those are

    def parts(self, features: int, device: torch.device, config: Config) -> int:
        """How many programs share the sampled tiles of a chunk of features."""
        return max(min(2 * programs(device) // ceil_div(features, config.entry_tile), self.tiles, MOST_PARTS), 1)

    @staticmethod
    def of(piece: int, pieces: int, row_blocks: int, tiles: int) -> "Sample":
        """Of the piece-th piece of tokens: together they take every tile once, if that is enough of them for each.

        The mean of some 16,000 weight rows differs from that of all by a hundredth of a row's length.
        """
        every = min(max(pieces, 4), 8, max(tiles // 64, 1))
        first = piece % every
        return Sample(first, every, ceil_div(row_blocks, GROUPS.value), len(range(first, tiles, every)))


# What an H100 was measured to lose, in rounds of its 132 programs with a tile of logits each: by a token of a strip for
# sums that are read and written; by a strip, times the features, for two launches; and by tiles of half as many
# features, how many times as long they take, since what they load serves fewer products.
ROUNDS_A_TOKEN, ROUNDS_A_STRIP, HALF_A_CHUNK = 1.6e-4, 800, 1.3


@cache
def divide(
    tokens: int,
    vocabulary: int,
    features: int,
    dtype: torch.dtype,
    filters: bool,
    sums_a_tile: int,
    workspace: int,
    workers: int,
    config: Config,
) -> Division:
    """The division that takes the fewest rounds within ``workspace`` bytes; the smallest one if none fits.

    Among few, since every number of tokens that a training meets is divided.
    """
    tiles = ceil_div(vocabulary, config.forward_entries)
    row_blocks = ceil_div(tokens, config.row_block)
    best, least = Division(config.row_block, 1), math.inf
    for pieces in itertools.takewhile(row_blocks.__ge__, numbers_of_pieces()):
        blocks = ceil_div(row_blocks, pieces)
        places = min(blocks * config.row_block, tokens)
        room = workspace - bytes_beside(places, tiles, features, filters, sums_a_tile, config)
        widest = min(room // tile_bytes(places, dtype, filters, config), tiles)
        if widest < 1:
            continue
        sums = tiles * min(product_rounds(blocks, features, chunk, workers, config) for chunk in chunks(dtype, config))
        a_strip = blocks * config.row_block * ROUNDS_A_TOKEN + ROUNDS_A_STRIP / features
        whole = widest * blocks // workers
        # Logits in whole rounds of programs, but for the last strip's.
        for width in ((whole - 1) * workers // blocks, whole * workers // blocks, widest):
            if width < 1:
                continue
            of_strips = _rounds(tiles, width, first_tiles(width, filters), blocks, workers, a_strip)
            rounds = ceil_div(row_blocks, blocks) * (of_strips + sums)
            if rounds < least:
                best, least = Division(blocks * config.row_block, width), rounds
        if widest == tiles:
            break
    if not filters:
        return best
    places = min(best.tokens, tokens)
    taken = bytes_beside(places, tiles, features, filters, sums_a_tile, config)
    taken += best.tiles * tile_bytes(places, dtype, filters, config)
    more = max(workspace - taken, 0) // (ceil_div(places, config.row_block) * slot_bytes(dtype, config))
    own = best.tiles * config.forward_entries // ENTRIES_A_SLOT
    # Of whole 16: kernels are compiled for such numbers or for others.
    return replace(best, slots=max(min(own + more, vocabulary // ENTRIES_A_WAITING_SLOT) // 16 * 16, own))


def tiles_held(
    tokens: int,
    vocabulary: int,
    features: int,
    dtype: torch.dtype,
    sums_a_tile: int,
    workspace: int,
    config: Config,
) -> int:
    """How many of the vocabulary's last tiles, of config.forward_entries entries, a walk over all tokens at once leaves
    for gradients by entry: as many as the workspace holds in the forward and in the backward; 0 where those are few.

    Their memory is the forward's only strip. In whole numbers without a branch: tracers know ``tokens`` by name alone.
    """
    tiles = ceil_div(vocabulary, config.forward_entries)
    beside = torch.sym_max(
        bytes_beside(tokens, tiles, features, False, sums_a_tile, config),
        least_of_backward(tokens, features, dtype, config),
    )
    of_tile = torch.sym_max(tile_bytes(tokens, dtype, False, config), 1)
    held = torch.sym_max(torch.sym_min((workspace - beside) // of_tile, tiles), 0)
    return held * torch.sym_min(held * LEAST_HELD // tiles, 1)


def tiles_in_gradient(
    tokens: int, vocabulary: int, features: int, dtype: torch.dtype, sums_a_tile: int, workspace: int, config: Config
) -> int:
    """Of the last tiles those that are left in the memory of the weight's gradient: in rows before their own, which are
    written first. 0 where the workspace holds all, or they are few.
    """
    tiles = ceil_div(vocabulary, config.forward_entries)
    if tiles_held(tokens, vocabulary, features, dtype, sums_a_tile, workspace, config) == tiles:
        return 0
    of_rows = config.forward_entries * features * dtype.itemsize
    held = tiles * of_rows // (of_rows + tile_bytes(tokens, dtype, False, config))
    return held if held * LEAST_HELD >= tiles else 0


def least_of_backward(tokens: int, features: int, dtype: torch.dtype, config: Config) -> int:
    """Bytes that entry_gradients.py is left beside what is held: all states, which it then takes in two pieces at the
    most, one tile, and of float16 what is scaled.
    """
    wide = strip_dtype(dtype).itemsize if dtype == torch.float16 else 0
    return tokens * features * (dtype.itemsize + wide) + tile_bytes(tokens, dtype, False, config)


def pieces_of(tokens: int, bytes_a_token: int, workspace: int, config: Config) -> list[slice]:
    """As few slices of whole row blocks as fit the workspace, at least one block each, equal to within a block."""
    row_blocks = ceil_div(tokens, config.row_block)
    fitting = max(workspace // bytes_a_token // config.row_block, 1)
    pieces = ceil_div(row_blocks, fitting)
    starts = [row_blocks * piece // pieces * config.row_block for piece in range(pieces)]
    return [slice(*ends) for ends in itertools.pairwise([*starts, tokens])]


def numbers_of_pieces() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on."""
    yield 1
    for power in itertools.count(1):
        yield 2**power
        yield 3 * 2 ** (power - 1)


def tile_bytes(places: int, dtype: torch.dtype, filters: bool, config: Config) -> int:
    """Of a tile of a strip's width: its exponentials; which entries are active, their columns, and what is dropped."""
    entries, size = config.forward_entries, strip_dtype(dtype).itemsize
    row_blocks = ceil_div(places, config.row_block)
    exponentials = entries * row_blocks * config.row_block * size
    if not filters:
        return exponentials
    of_block = entries // 8 + entries // ENTRIES_A_SLOT * slot_bytes(dtype, config)
    return exponentials + row_blocks * of_block + 4 * places


def slot_bytes(dtype: torch.dtype, config: Config) -> int:
    """Of a row block's column and of which entry it is."""
    return config.row_block * strip_dtype(dtype).itemsize + 4


def bytes_beside(places: int, tiles: int, features: int, filters: bool, sums_a_tile: int, config: Config) -> int:
    """Of a piece beside its strip: u', the sums of all tiles and of those, where rows are done again; what is dropped.

    ``sums_a_tile`` and token: one of E, and where they are wanted of E times its exponent, and of logits.
    """
    numbers = places * (features + sums_a_tile * (tiles + 2) + 1)
    if filters:
        sampled = Sample.of(0, 1, 1, tiles).tiles
        row_blocks = ceil_div(places, config.row_block)
        by_group = sampled * (config.forward_entries + 1) + MOST_PARTS * features
        numbers += 4 * places + row_blocks * (tiles + 6) + GROUPS.value * by_group
    return 4 * numbers


def first_tiles(width: int, filters: bool) -> int:
    """Of the first strip, where others have ``width``: with a filter fewer, since it knows least of denominators."""
    return min(width, FIRST_TILES) if filters else width


def _rounds(tiles: int, width: int, first: int, blocks: int, workers: int, a_strip: float) -> float:
    """Of all strips' logits, with ``a_strip`` for each, of ``first`` tiles, then ``width``, and what is left."""
    others, last = divmod(tiles - first, width)
    logits = ceil_div(blocks * first, workers) + others * ceil_div(blocks * width, workers)
    return logits + ceil_div(blocks * last, workers) + a_strip * (1 + others + (last > 0))


def product_rounds(blocks: int, features: int, chunk: int, workers: int, config: Config) -> float:
    """Of the second product, a tile of a strip's width."""
    slowness = 1 if chunk == config.features else HALF_A_CHUNK
    return ceil_div(blocks * ceil_div(features, chunk), workers) * chunk / features * slowness


def fill(row_blocks: int, features: int, workers: int, config: Config) -> float:
    """Of the programs in the rounds that the second product's tiles take, how many have one."""
    tiles = row_blocks * ceil_div(features, config.features)
    return tiles / (ceil_div(tiles, workers) * workers)


def chunks(dtype: torch.dtype, config: Config) -> tuple[int, ...]:
    """How many columns of D a program of the second product may sum at once."""
    if dtype == torch.float16:
        return (config.entry_tile,)  # its operands are float32
    return config.features, config.features // 2


def strip_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of E for inputs of a dtype: float16 has no room for it, and its products are taken in tf32, which holds it."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def product_precision(dtype: torch.dtype, config: Config) -> str:
    """Of the second product, as tl.dot names it."""
    return "tf32" if dtype == torch.float16 else config.precision
