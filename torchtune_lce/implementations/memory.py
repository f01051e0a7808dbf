"""What a loss allocates between the hidden states and their gradient: one formula for each, in bytes.

N tokens, D features, V entries, b bytes of an element of the training dtype. Gradients are those of the hidden states,
NDb, and of a trained head, VDb, of which three are there while autograd adds a chunk's to the others'. The rest is what
is alive at the worst moment of the forward and of the backward, found by following each loss's own code:

stock, main: 8 chunks of tokens. Kept for the backward: the float32 log-softmax, 4NV. The forward of stock also holds
the logits of all chunks, bNV; one chunk at a time is there in float32.
With compile: True the log-softmax is not kept; the logits are, bNV, and a chunk's gradient comes to them.

torch_compile: the workspace, and in 16 bits as much as a float32 sum of the trained head's gradient would take, or with
a frozen head of the hidden states'. The forward makes the gradients.
reference: float32 logits, 4NV, their exponentials, and a mask of the targets, NV; in the backward one gradient more
in place of the logits. With an adapter the two parts of the sum of logits; with DoRA's scale, in the backward, what it
scales, the gradient, and the gradient's products with either.
chunked: the workspace, whatever NV is, and vectors. With a frozen head and no adapter values of the hidden states'
gradient's size are kept for the backward, NDb. Otherwise, in float32, the forward makes the gradients themselves; in 16
bits the backward does, with the hidden states' sums beside the workspace.
cce: the workspace, but not less than its tiles and their lists take. With a frozen head, or where nothing is filtered,
and no adapter values of the hidden states' gradient's size are kept for the backward, NDb. With a trained head where
nothing is filtered exponentials too, of the workspace.

LoRA on the output, of rank r, adds its gradients, Vrb and rDb, to those above, and an Nr product; its dropout keeps the
thinned out hidden states and their mask, (b + 1)ND. DoRA's scale of the rows has a gradient that needs what it scales:
stock keeps two more copies of the logits, 2bNV, and holds three of the weight, 3VDb, for the length of its rows.

tests/commands/plan/test_plan.py holds these against allocations measured on the CPU, docs/measured.md against a
card's.
"""

from dataclasses import dataclass

import torch

from torchtune_lce.implementations import fused
from torchtune_lce.implementations.capabilities import CAPABILITIES, CCE_PRESETS
from torchtune_lce.implementations.walk import (
    Operands,
    Sizes,
    entries_per_strip,
    tokens_per_piece,
    tokens_with_whole_rows,
)
from torchtune_lce.inputs.dtypes import accumulation_dtype

CHUNKS = 8
# Rows of W and of W + s B A that are held at a time for DoRA's lengths of them, in the accumulation dtype.
NORM_BYTES = 32 * 2**20
# Of labels, places, sums and counts: a few 8-byte numbers each.
_BYTES_PER_TOKEN, _BYTES_PER_ENTRY = 64, 8
# Of kernels/autograd.py: tokens and entries of a tile on a card; bytes of its lists.
_TILE, _TILE_LISTS = 128, 64
# Entries of a tile of kernels/strips.py on a card; of a trained head's exponentials none are held where that is fewer
# than one of so many (kernels/division.py).
_STRIP_TILE, _LEAST_HELD = 256, 8


@dataclass(frozen=True)
class OutputAdapter:
    """LoRA on the output; ``scaled`` where it is DoRA, whose magnitude scales the rows."""

    rank: int
    dropout: bool
    scaled: bool


@dataclass(frozen=True)
class Problem:
    """Sizes that a loss's memory depends on."""

    tokens: int
    features: int
    vocabulary: int
    itemsize: int
    trained_head: bool
    workspace_mib: int = 128
    adapter: OutputAdapter | None = None

    @property
    def logits(self) -> int:
        """Their number."""
        return self.tokens * self.vocabulary

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.features * self.itemsize

    @property
    def head_bytes(self) -> int:
        """Of the head's gradient, 0 where it is frozen."""
        return self.vocabulary * self.features * self.itemsize if self.trained_head else 0

    @property
    def scaled(self) -> bool:
        return self.adapter is not None and self.adapter.scaled

    @property
    def adapter_bytes(self) -> int:
        """Of the gradients of the adapter's matrices and magnitude."""
        if self.adapter is None:
            return 0
        numbers = (self.vocabulary + self.features) * self.adapter.rank + self.vocabulary * self.adapter.scaled
        return numbers * self.itemsize

    @property
    def adapter_kept(self) -> int:
        """What autograd keeps from the adapter's forward: its product, and what dropout makes of the hidden states."""
        if self.adapter is None:
            return 0
        thinned = self.hidden_bytes + self.tokens * self.features if self.adapter.dropout else 0
        return self.tokens * self.adapter.rank * self.itemsize + thinned


@dataclass(frozen=True)
class LossMemory:
    """Bytes at the worst moment of the loss's forward and of its backward, gradients among the latter; and those of
    exponentials that are held from one to the other, in the workspace or in the memory of the head's gradient.
    """

    forward: int
    backward: int
    held: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def obstacle(loss: str, adapter: OutputAdapter | None) -> str | None:
    """Why there is no plan for this loss with such an output, or None."""
    base = loss.removesuffix("_compiled")
    if adapter is not None and base == "main":
        return "has no formula for an adapter on the output (apply_lora_to_output: False)"
    return None


def loss_memory(loss: str, problem: Problem) -> LossMemory:
    """Of ``stock``, ``main`` (each also ``_compiled``) or one of this package's implementations.

    Raises ValueError for another name, or where there is an :func:`obstacle`.
    """
    why = obstacle(loss, problem.adapter)
    if why:
        raise ValueError(f"{loss} {why}")
    base = loss.removesuffix("_compiled")
    if base in ("stock", "main"):
        if loss.endswith("_compiled"):
            return _chunks_compiled(problem)
        return _chunks_eager(problem, all_logits=base == "stock")
    if base == "torch_compile":
        return _fused(problem)
    if base == "reference":
        return _full_logits(problem)
    if base == "chunked":
        return _chunked(problem)
    if base in CCE_PRESETS:
        filtering = CAPABILITIES[base].filtering
        if problem.adapter or problem.trained_head and (filtering.hidden or filtering.weight):
            return _cce(problem)
        return _cce_in_strips(problem, filtering.hidden)
    raise ValueError(f"no formula for the memory of {loss!r}")


def _full_logits(problem: Problem) -> LossMemory:
    logits, b = problem.logits, problem.itemsize
    if problem.adapter is None:
        return LossMemory(9 * logits, max(9 * logits, 4 * logits + problem.hidden_bytes + problem.head_bytes))
    kept = problem.adapter_kept
    forward = (12 + (b if b < 4 else 0)) * logits + kept
    return LossMemory(forward, 16 * logits + kept if problem.scaled else forward)


def _chunks_eager(problem: Problem, all_logits: bool) -> LossMemory:
    b, logits = problem.itemsize, problem.logits
    # What DoRA multiplies with its scale; a chunk's rows of it, and its factors.
    factors = 2 * b * logits if problem.scaled else 0
    kept = 4 * logits + factors + problem.adapter_kept
    if problem.scaled:
        kept += 3 * CHUNKS * b * problem.vocabulary
    if all_logits:
        # float() of float32 logits is no copy.
        forward = kept + b * logits + (4 * logits // CHUNKS if b < 4 else 0)
    else:
        forward = kept + 4 * logits // CHUNKS
    if problem.scaled:
        # Before the loss: the last chunk's logits are made.
        of_the_weight = 3 * problem.vocabulary * problem.features * b
        forward = max(forward, factors + b * logits + of_the_weight + problem.adapter_kept)
    # The first chunk that the backward comes to: gradients by its log-softmax and by its float32 logits. The second,
    # when neither is kept any more: by its logits and by the head, to be added to the first's.
    first = kept + max(8, 3 * b if problem.scaled else 0) * logits // CHUNKS
    # An adapter's share of the logits has a gradient of its own.
    by_logits = b * logits // CHUNKS * (1 if problem.adapter is None else 2)
    then = (
        kept - 2 * kept // CHUNKS + by_logits + problem.hidden_bytes + 3 * (problem.head_bytes + problem.adapter_bytes)
    )
    return LossMemory(forward, max(first, then))


def _chunks_compiled(problem: Problem) -> LossMemory:
    b, logits = problem.itemsize, problem.logits
    kept = b * logits * (3 if problem.scaled else 1) + problem.adapter_kept
    by_logits = b * logits // CHUNKS * (1 if problem.adapter is None else 2)
    gradients = problem.hidden_bytes + problem.head_bytes + problem.adapter_bytes
    forward = kept + (3 * problem.vocabulary * problem.features * b if problem.scaled else 0)
    return LossMemory(forward, kept + by_logits + gradients)


def _fused(problem: Problem) -> LossMemory:
    dtype, tokens = _dtype(problem), problem.tokens
    adapted = problem.adapter is not None
    needs = Operands(True, problem.trained_head, False, adapted, adapted, problem.scaled)
    sizes = tokens, problem.features, problem.vocabulary, dtype, problem.workspace_mib
    division = fused.divide(*sizes, widened=False, needs=needs)
    piece = min(division.tokens, tokens)
    # A product, and where not all are taken at once hidden states.
    states = piece * problem.features * problem.itemsize * (1 if piece == tokens else 2)
    wide = accumulation_dtype(dtype).itemsize
    sums = 0
    if division.wide_sums:
        columns = problem.features * problem.trained_head + (problem.adapter.rank if adapted else 0)
        sums = wide * (problem.vocabulary * columns + division.entries * problem.features)
    kept = _gradients(problem) + _vectors(problem) + problem.adapter_kept
    forward = piece * problem.vocabulary * problem.itemsize + states + sums + kept
    return LossMemory(max(forward, _row_lengths(problem) + _vectors(problem) + problem.adapter_kept), kept)


def _chunked(problem: Problem) -> LossMemory:
    dtype = _dtype(problem)
    wide, tokens = accumulation_dtype(dtype).itemsize, problem.tokens
    sizes = Sizes(problem.features, problem.vocabulary, dtype, problem.workspace_mib, 1 + problem.scaled)
    low = 0 if problem.adapter is None else 2 * wide * tokens * problem.adapter.rank
    vectors = _vectors(problem) + problem.adapter_kept + low
    gradients = _gradients(problem)
    # Of a token: the sum of its gradient, and in 16 bits its hidden state widened.
    copies = problem.features * (wide if problem.itemsize == wide else 2 * wide)
    lengths = _row_lengths(problem) + vectors
    whole_rows = min(tokens, tokens_with_whole_rows(tokens, sizes))
    if _summed(problem) and problem.itemsize == wide and whole_rows:
        made = whole_rows * (problem.vocabulary * sizes.bytes_of_entry(1) + copies) + gradients + vectors
        return LossMemory(max(made, lengths), gradients + vectors)
    piece = tokens_per_piece(tokens, sizes)
    strip = entries_per_strip(piece, sizes)
    if not _summed(problem):
        forward = strip * sizes.bytes_of_entry(piece) + piece * copies + problem.hidden_bytes + vectors
        # What is kept, the gradient, and two terms of it.
        return LossMemory(forward, 2 * problem.hidden_bytes + min(problem.workspace_mib * 2**20, 2 * tokens * copies))
    # The logits are made twice, in the backward all tokens' at once.
    losses = sizes._replace(multiplied=False)
    piece = tokens_per_piece(tokens, losses)
    forward = entries_per_strip(piece, losses) * losses._replace(blocks=1).bytes_of_entry(piece) + vectors
    if problem.itemsize < wide and problem.adapter is None:
        sizes = sizes._replace(rounded=True)
        copies += wide * min(sizes.logits_at_once(tokens), problem.vocabulary)
    at_once = entries_per_strip(tokens, sizes, copied=False) * sizes.bytes_of_entry(tokens) + tokens * copies
    return LossMemory(max(forward, lengths), at_once + gradients + vectors)


def _dtype(problem: Problem) -> torch.dtype:
    return {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[problem.itemsize]


def _summed(problem: Problem) -> bool:
    """Whether anything that tokens share has a gradient."""
    return problem.trained_head or problem.adapter is not None


def _gradients(problem: Problem) -> int:
    return problem.hidden_bytes + problem.head_bytes + problem.adapter_bytes


def _row_lengths(problem: Problem) -> int:
    """What finding the lengths of DoRA's scaled rows takes, before the loss, some of them at a time."""
    if not problem.scaled:
        return 0
    wide = accumulation_dtype(_dtype(problem)).itemsize
    rows = min(problem.vocabulary, NORM_BYTES // (2 * wide * problem.features))
    return rows * problem.features * (2 * wide if problem.itemsize < wide else wide)


def _cce(problem: Problem) -> LossMemory:
    # Never more than one copy of the logits and a float32 copy of the hidden states would be.
    most = problem.itemsize * problem.logits + 4 * problem.tokens * problem.features
    workspace = max(min(problem.workspace_mib * 2**20, most), _least_workspace(problem)) + _vectors(problem)
    workspace += problem.adapter_kept
    return LossMemory(
        max(workspace, _row_lengths(problem)),
        workspace + problem.hidden_bytes + problem.head_bytes + problem.adapter_bytes,
    )


def _cce_in_strips(problem: Problem, filters: bool) -> LossMemory:
    """Of kernels/strips.py: a strip of exponentials, the hidden states' sums, and a sum a tile of the vocabulary.

    With a filter a quarter of the strip once more, for active columns, and sums by column of what is dropped, of a
    sample for 16 groups of tokens, which 16 programs multiply.
    """
    tiles = -(-problem.vocabulary // _STRIP_TILE)
    of_token = 4 * (problem.features + tiles + 3)
    of_tile = _STRIP_TILE * problem.itemsize
    of_all = 0
    if filters:
        sampled = -(-tiles // max(min(tiles // 64, 4), 1))
        of_token += 16 + tiles // 32
        of_tile += of_tile // 4 + _STRIP_TILE // 64 + 5
        of_all = 4 * 16 * (sampled * (_STRIP_TILE + 1) + 16 * problem.features)
    # A strip has whole row blocks.
    blocks = -(-problem.tokens // _TILE)
    most = problem.tokens * of_token + blocks * _TILE * tiles * of_tile + of_all
    least = min(problem.tokens, _TILE) * of_token + _TILE * of_tile + of_all
    workspace = max(min(problem.workspace_mib * 2**20, most), least)
    kept = problem.hidden_bytes + _vectors(problem)
    backward = problem.hidden_bytes + kept
    held = 0
    if problem.trained_head:
        of_tiles = blocks * _TILE * of_tile
        room = problem.workspace_mib * 2**20 - problem.tokens * of_token
        fitting = min(max(room // of_tiles, 0), tiles)
        in_workspace = fitting if fitting * _LEAST_HELD >= tiles else 0
        of_rows = _STRIP_TILE * problem.features * problem.itemsize
        in_gradient = tiles * of_rows // (of_rows + of_tiles) if in_workspace < tiles else 0
        if in_gradient * _LEAST_HELD >= tiles:
            in_workspace = min(in_workspace, tiles - in_gradient)
            sums = max(min(problem.workspace_mib * 2**20, problem.tokens * of_token), _TILE * of_token)
            workspace = sums + of_tiles * in_workspace + problem.head_bytes
            held = problem.head_bytes
        held += of_tiles * in_workspace
        # Hidden states in order, and a strip of exponentials; what does not fit lies in the head's gradient.
        in_order = problem.hidden_bytes + problem.itemsize * blocks * _TILE * tiles * _STRIP_TILE
        backward += min(problem.workspace_mib * 2**20, in_order) + problem.head_bytes
    return LossMemory(workspace + kept, backward, held)


def _least_workspace(problem: Problem) -> int:
    """Two tiles for each block of tokens, whatever the workspace, and the lists of all tiles."""
    columns, blocks = (-(-size // _TILE) for size in (problem.vocabulary, problem.tokens))
    tile = _TILE * (_TILE * problem.itemsize + 4)
    return blocks * (2 * tile + _TILE_LISTS * columns) + 3 * _BYTES_PER_ENTRY * problem.vocabulary


def _vectors(problem: Problem) -> int:
    # DoRA's scale, the norms that it is made of and its gradient.
    scale = 12 if problem.scaled else 0
    return problem.tokens * _BYTES_PER_TOKEN + problem.vocabulary * (_BYTES_PER_ENTRY + scale)
