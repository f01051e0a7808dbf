"""What the operators hand to the launchers: operands of the logits, places of tokens, gradients to be filled.

Kernels take a named tuple as one argument. None stands in it for what there is not, which compiled kernels know.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """What the logits are made of: ``(hidden @ weight.T + low @ up.T + bias) * scale``, capped, times ``logit_scale``.

    Kernels measure logits before that scale, which is no more to them than another base of the exponentials.
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    low: Tensor | None  # [N, r]: with up, an adapter's part
    up: Tensor | None  # [V, r]
    softcap: float | None
    logit_scale: float = 1.0
    scale: Tensor | None = None  # [V] float32: of DoRA

    @property
    def log2_scale(self) -> float:
        """What a logit is multiplied by to be an exponent of 2."""
        return self.logit_scale * math.log2(math.e)

    @property
    def rank(self) -> int:
        return 1 if self.low is None else self.low.shape[1]

    @functools.cached_property
    def argument(self) -> "OperandsArgument":
        """As kernels take them."""
        adapter = (1, 1) if self.low is None else (self.low.stride(0), self.up.stride(0))
        return OperandsArgument(
            self.hidden,
            self.weight,
            self.bias,
            self.scale,
            self.low,
            self.up,
            self.hidden.shape[1],
            self.weight.shape[0],
            self.rank,
            self.hidden.stride(0),
            self.weight.stride(0),
            *adapter,
            self.softcap,
            self.log2_scale,
        )


class OperandsArgument(NamedTuple):
    """:class:`Operands` in a kernel: pointers, sizes and strides of rows."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: Tensor | None  # [V] float32
    low: Tensor | None  # [N, r]
    up: Tensor | None  # [V, r]
    features: int  # D
    entries_total: int  # V
    rank: int
    hidden_stride: int
    weight_stride: int
    low_stride: int
    up_stride: int
    softcap: float | None
    log2_scale: float


def scaled_upstream(upstream: Tensor | None, logit_scale: float) -> Tensor | None:
    """Upstream gradients of losses or log-sum-exps, for kernels, whose gradients are by logits before their scale."""
    return upstream if upstream is None or logit_scale == 1 else upstream * logit_scale


def used_in(piece: slice, count: Tensor, tokens: int) -> Tensor:
    """How many places of a piece are in use, [1] int32: ``count`` of all ``tokens`` are, and those come first."""
    if piece == slice(0, tokens):
        return count
    return (count - piece.start).clamp(0, piece.stop - piece.start)


class Places(NamedTuple):
    """Tokens in the order in which the backward takes them: those in use first."""

    rows: Tensor  # [M] int64: row of hidden at each place
    labels: Tensor  # [M]
    count: Tensor  # [1] int32, on the device: places in use
    row_total: Tensor  # [M, 2] float32: the largest logit, and the log of the sum of exponentials measured from it
    d_nll: Tensor  # [M] float32
    d_lse: Tensor | None  # [M] float32

    def of(self, piece: slice) -> "Places":
        count = used_in(piece, self.count, self.rows.numel())
        d_lse = self.d_lse if self.d_lse is None else self.d_lse[piece]
        return Places(self.rows[piece], self.labels[piece], count, self.row_total[piece], self.d_nll[piece], d_lse)


@dataclass(frozen=True)
class Ordered:
    """Tokens that are taken at once, places ``first`` to ``first + M``, in that order; in use are those below count."""

    operands: Operands
    rows: Tensor  # [M] int64: row of hidden at each place
    count: Tensor  # [1] int32, on the device: places in use, of all from 0 on
    first: int
    states: Tensor  # [M, D]: hidden states in the order of the places, zero past the count

    @property
    def tokens(self) -> int:
        return self.rows.numel()


@dataclass(frozen=True)
class Piece(Ordered):
    """Of a walk over strips, whose operands have no adapter."""

    labels: Tensor  # [M]
    targets: Tensor  # [M] float32: logits of the labels
    references: Tensor  # [M] float32: what exponentials are measured from
    floors: Tensor  # [M] float32: a lower bound of the softmax's denominator, measured so


class Walk(NamedTuple):
    """What a walk over the vocabulary in strips leaves, by row of hidden or by place."""

    losses: Tensor  # [N] float32, 0 where not in use, as all by row of hidden
    references: Tensor  # [N] float32; one that is not finite is 0
    log_totals: Tensor  # [N] float32: log-sum-exps less the references
    dropped_mass: Tensor  # [N] float32, or [0] without a filter: the softmax mass that the gradient leaves out
    values: Tensor  # [N, D] in the dtype of hidden, by place: see :func:`row_gradients`
    coefficients: Tensor  # [2, N] float32, by place
    kept: Tensor  # [row blocks] int32, or [0]: columns of each that the gradient is made of
    # [5, N] float32 by place, or [0]: for gradients by entry. E is exp2((z - shift) log2_scale + offset) of a logit z;
    # the first two are shift and offset, the others 1, E of the target, and the sum of the others' E, over the sum of
    # all.
    shares: Tensor
    entropies: Tensor  # [N] float32, or [0]
    means: Tensor  # [N] float32, or [0]: of the logits, less the references
    # E of entries, 0 at targets, see strips.empty_held; of no meaning in row blocks past those in use. The vocabulary's
    # last are in memory that the weight's gradient takes over, those before them in the workspace's.
    held: Tensor
    in_gradient: Tensor


class Held(NamedTuple):
    """:attr:`Walk.held`, or in_gradient, in a kernel."""

    strip: Tensor
    first: int  # entry
    end: int
    stride: int


class ForEntries(NamedTuple):
    """What gradients by entry are made of beside E, by place, 0 past those in use: see scaled_states.py."""

    scaled: Tensor  # [N, D] in a strip's dtype: hidden states times their factors
    factors: Tensor  # [N] float32
    cells: Tensor  # [N] float32: what stands for E of the target


class OwnCells(NamedTuple):
    """Places in the order of their labels, for strips in which the targets' cells are 0."""

    labels: Tensor  # [N]
    places: Tensor  # [N] int64
    starts: Tensor  # [tiles + 1] int64: where those of each tile of entries begin, and the last one's end
    cells: Tensor  # [N] float32, by place


class Gradients(NamedTuple):
    """By operand; None where nobody wants it."""

    hidden: Tensor | None  # [N, D], zero; filled at the rows in use
    weight: Tensor | None  # [V, D], every row written
    bias: Tensor | None  # [V], every element written
    low: Tensor | None  # [N, r] float32, zero; filled at the rows in use
    up: Tensor | None  # [V, r], every row written
    scale: Tensor | None  # [V] float32, every element written

    def by_token(self) -> "Gradients":
        return Gradients(self.hidden, None, None, self.low, None, None)

    def by_entry(self) -> "Gradients":
        return Gradients(None, self.weight, self.bias, None, self.up, self.scale)


class Workspace(NamedTuple):
    """What the strips of a backward leave to its products, and to each other."""

    gradients: Tensor  # [tiles, row_block, entry_tile], by slot: a strip's logit gradients
    masses: Tensor | None  # [tiles, row_block] float32, by slot: softmax that each tile holds; with a tail
    mass_before: Tensor | None  # [M] float32: of the strips before, by place; with a tail
    scale_sums: Tensor | None  # [tiles, entry_tile] float32, by slot: of the scale's gradient, where it is wanted
    # Of the hidden states' gradient in 16 bits, int16: halves of its sums so far, the first in its own memory.
    sums_high: Tensor | None  # [N, D]
    sums_low: Tensor | None  # [M, D], by place


class Tail(NamedTuple):
    """What a unit of dropped softmax mass adds to gradients by token, float32; None where nothing is dropped."""

    hidden: Tensor | None  # [D]
    low: Tensor | None  # [r]
