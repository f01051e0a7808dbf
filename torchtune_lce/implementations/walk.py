"""The logits of a call in bounded blocks, and gradients from theirs: what the losses, divergences and statistics of
plain PyTorch have in common, for any device.

Tokens are taken in pieces, and for a piece the vocabulary in strips. Logits are not rounded to a dtype of 16 bits, but
on ROCm and XPU: CUDA has products of such matrices with a float32 result, and for a CPU and MPS the factors are
widened. (That is faster, too: a CPU's own products of 16 bits may take a hundred times as long.)

An adapter (:class:`torchtune_lce.inputs.low_rank.LowRank`) joins strip by strip, in the accumulation dtype: its rank is
small.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.inputs.dtypes import accumulation_dtype

# Entries of a strip, or the products would be slow.
_LEAST_ENTRIES = 64
# Devices that multiply float32 as fast as 16 bits, or faster.
_WIDENING = ("cpu", "mps")
# Tokens of a piece that has whole rows of logits, or adding its products up would take longer than they do.
_LEAST_TOKENS = 128


class Operands(NamedTuple):
    """What the logits are made of, as operators take it; or gradients by it, or whether they are needed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    low: Tensor | None  # [N, r]; with up and scale a LowRank
    up: Tensor | None  # [V, r]
    scale: Tensor | None  # [V], in the accumulation dtype

    @property
    def of_entries(self) -> bool:
        """Whether any that tokens share is needed, whose gradient is a sum over all of them."""
        return any((self.weight, self.bias, self.up, self.scale))


def has_wide_product(factor: Tensor) -> bool:
    """Whether torch.mm takes ``out_dtype``: in every CUDA build, but not where float16 is to be summed in float16."""
    if factor.device.type != "cuda" or torch.version.hip is not None:
        return False
    return factor.dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def _factor_dtype(hidden: Tensor) -> torch.dtype:
    """Of the factors of products whose results are to be in the accumulation dtype."""
    return accumulation_dtype(hidden.dtype) if hidden.device.type in _WIDENING else hidden.dtype


def rounds_factors(hidden: Tensor) -> bool:
    """Whether factors are of fewer digits than the accumulation dtype's."""
    return _factor_dtype(hidden) != accumulation_dtype(hidden.dtype)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """In the accumulation dtype, that of ``out``."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if has_wide_product(left):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums``, in the accumulation dtype, grow by the product."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    elif has_wide_product(left):
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:
        sums += left @ right


class Sizes(NamedTuple):
    """What the memory of a walk depends on. ``blocks``: logits, and as many more as what is made of them needs."""

    features: int
    vocabulary: int
    dtype: torch.dtype  # of hidden and weight
    workspace_mib: int
    blocks: int
    widened: bool = False  # factors of 16 bits
    multiplied: bool = True  # whether what is made of logits is, with the weight: for gradients
    rounded: bool = False  # a strip in the dtype of factors, made of blocks of logits one after the other

    @property
    def bytes_of_token(self) -> int:
        """Of a copy of its hidden state, this widened or a product, and the sum of its gradient."""
        wide = accumulation_dtype(self.dtype).itemsize
        return self.features * (self.dtype.itemsize + (2 * wide if self.multiplied else wide))

    def bytes_of_entry(self, tokens: int) -> int:
        """Its blocks' columns, and in 16 bits its row, widened, and the row's gradient, or the columns rounded."""
        if self.rounded:
            return tokens * self.dtype.itemsize
        wide = accumulation_dtype(self.dtype).itemsize
        rounded = self.dtype.itemsize if self.multiplied and self.dtype.itemsize < wide else 0
        return tokens * self.blocks * wide + (2 * wide * self.features if self.widened else tokens * rounded)

    def logits_at_once(self, tokens: int) -> int:
        """Entries of a block, a quarter of the workspace: by default's, a card's cache holds it."""
        entries = self.workspace_mib * 2**18 // (max(tokens, 1) * accumulation_dtype(self.dtype).itemsize)
        return max(entries // _LEAST_ENTRIES, 1) * _LEAST_ENTRIES


def sizes_of(operands: Operands, softcap: float | None, workspace_mib: int, more_blocks: int = 0) -> Sizes:
    """The softcap's derivative needs its tanh beside the logits, the gradient by a scale what it scales."""
    hidden, (vocabulary, features) = operands.hidden, operands.weight.shape
    blocks = 1 + (softcap is not None) + (operands.scale is not None) + more_blocks
    widened = _factor_dtype(hidden) != hidden.dtype
    return Sizes(features, vocabulary, hidden.dtype, workspace_mib, blocks, widened)


def entries_per_strip(tokens: int, sizes: Sizes, copied: bool = True) -> int:
    """Vocabulary entries whose blocks fit the workspace, beside what the tokens take themselves if that is ``copied``
    within it. A multiple of 64, so that rows of a block begin where a card's products want them to.
    """
    left = sizes.workspace_mib * 2**20 - tokens * sizes.bytes_of_token * copied
    if sizes.rounded:
        left -= tokens * sizes.logits_at_once(tokens) * accumulation_dtype(sizes.dtype).itemsize
    fitting = left // max(sizes.bytes_of_entry(tokens), 1)
    return min(sizes.vocabulary, max(fitting // _LEAST_ENTRIES, 1) * _LEAST_ENTRIES)


def tokens_per_piece(tokens: int, sizes: Sizes) -> int:
    """Tokens that are taken at once, in pieces as equal as can be, for the rest of the workspace to hold a strip.

    A quarter of it is for what they take themselves: the more that is, the more strips there are to walk. Half of it
    for 64 entries at the least.
    """
    bytes_per_token = max(2 * sizes.bytes_of_token, _LEAST_ENTRIES * sizes.bytes_of_entry(1))
    fitting = max(sizes.workspace_mib * 2**19 // bytes_per_token, 1)
    return -(-tokens // max(-(-tokens // fitting), 1))


def tokens_with_whole_rows(tokens: int, sizes: Sizes) -> int:
    """Tokens of a piece whose logits, of the whole vocabulary, fit the workspace; 0 where they are too few."""
    fitting = sizes.workspace_mib * 2**20 // (sizes.vocabulary * sizes.bytes_of_entry(1) + sizes.bytes_of_token)
    if fitting >= _LEAST_TOKENS or fitting >= tokens:
        return fitting
    return 0


class Targets(NamedTuple):
    """Of a piece's n tokens; and in order of the entries that they are, so that those of a strip stand together."""

    labels: Tensor  # [n]; in place of one that names no entry another one, and what it gives is not used
    outside: Tensor  # [n], where that is
    tokens: Tensor  # [n] in order
    columns: Tensor  # [n] in order: of the strip that has them
    bounds: list[int]  # where those of each strip begin, and the last one's end

    def among(self, number: int) -> tuple[Tensor, Tensor]:
        """Those of the strip: tokens and columns."""
        part = slice(*self.bounds[number : number + 2])
        return self.tokens[part], self.columns[part]

    def by_token(self, found: list[Tensor]) -> Tensor:
        """[n] of what was found in each strip, one after the other, at its targets."""
        values = torch.cat(found)
        return torch.empty_like(values).index_copy_(0, self.tokens, values)


class Piece:
    """Some tokens' logits, a strip of the vocabulary at a time; each strip takes the memory of the one before."""

    def __init__(
        self,
        operands: Operands,
        softcap: float | None,
        logit_scale: float,
        rows: Tensor,
        strip: int,
        targets: Targets | None = None,
        logits_at_once: int = 0,
    ):
        self.operands, self.softcap, self.logit_scale = operands, softcap, logit_scale
        self.rows, self.strip, self.targets, self.logits_at_once = rows, strip, targets, logits_at_once
        hidden, low = operands.hidden, operands.low
        self.wide, self.factor = accumulation_dtype(hidden.dtype), _factor_dtype(hidden)
        # Of all tokens no copy is needed.
        used = hidden if rows.numel() == hidden.shape[0] else hidden[rows]
        self.hidden = used.to(self.factor)
        self.low = None if low is None else low[rows].to(self.wide)
        self._memory: dict[str, Tensor] = {}
        self._nothing = self.hidden.new_full((), -torch.inf, dtype=self.wide)

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Entries and their rows of the weight, in the dtype of factors."""
        weight = self.operands.weight
        for start in range(0, weight.shape[0], self.strip):
            part = slice(start, min(start + self.strip, weight.shape[0]))
            yield part, weight[part].to(self.factor)
        self._memory.clear()

    def take_targets(self, values: Tensor, start: int) -> Tensor:
        """What ``values`` [n, entries], a strip's that begins with ``start``, have at the targets among its entries,
        whose place minus infinity takes; see :meth:`Targets.by_token`.
        """
        at = self.targets.among(start // self.strip)
        if not at[0].numel():
            return values.new_empty(0)
        there = values[at]
        values.index_put_(at, self._nothing)
        return there

    def put_targets(self, values: Tensor, start: int, new: Tensor) -> None:
        """``new`` [n] in the place of what ``values`` [n, entries] have at the targets among the strip's entries."""
        at = self.targets.among(start // self.strip)
        if at[0].numel():
            values.index_put_(at, new[at[0]])

    def block(self, name: str, entries: int, dtype: torch.dtype) -> Tensor:
        """Memory [n, entries], the same for each strip, of which the first is the widest."""
        tokens = self.rows.numel()
        if name not in self._memory:
            self._memory[name] = self.hidden.new_empty(tokens * entries, dtype=dtype)
        return self._memory[name][: tokens * entries].view(tokens, entries)

    def logits(self, part: slice, weight: Tensor, differentiable: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of a strip, [n, entries] in the accumulation dtype; and beside them, where ``differentiable``, their tanh and
        what the scale scales, None without a softcap and a scale.
        """
        _, _, bias, low, up, scale = self.operands
        logits = _product(self.hidden, weight.T, out=self.block("products", weight.shape[0], self.wide))
        if bias is not None:
            logits += bias[part]
        if low is not None:
            logits.addmm_(self.low, up[part].T.to(self.wide))
        unscaled = tanh = None
        if scale is not None:
            unscaled = logits
            out = self.block("scaled", weight.shape[0], self.wide) if differentiable else logits
            logits = torch.mul(logits, scale[part], out=out)
        if self.softcap is not None:
            tanh = logits.div_(self.softcap).tanh_()
            out = self.block("capped", weight.shape[0], self.wide) if differentiable else tanh
            logits = torch.mul(tanh, self.softcap * self.logit_scale, out=out)
        elif self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        return logits, tanh, unscaled

    def rounded_exponentials(self, part: slice, weight: Tensor, base: Tensor) -> Tensor:
        """[n, entries] in the dtype of factors, of a strip's logits less ``base`` [n, 1]; these are made block by
        block, ``logits_at_once`` entries.
        """
        exponentials = self.block("exponentials", weight.shape[0], self.factor)
        for start in range(0, weight.shape[0], self.logits_at_once):
            here = slice(start, start + self.logits_at_once)
            rows = weight[here]
            entries = slice(part.start + start, part.start + start + rows.shape[0])
            logits, _, _ = self.logits(entries, rows, differentiable=False)
            torch.exp(logits.sub_(base), out=exponentials[:, here])
        return exponentials


def pieces(
    operands: Operands,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    workspace_mib: int,
    *,
    more_blocks: int = 0,
    at_once: bool = False,
    whole_rows: bool = False,
    multiplied: bool = True,
    rounded: bool = False,
) -> Iterator[Piece]:
    """Of the tokens that are not ignored. ``at_once``: one piece, whose copies come to what the workspace holds.
    ``whole_rows``: one strip each, see :func:`tokens_with_whole_rows`. ``multiplied`` and ``rounded`` as in
    :class:`Sizes`.
    """
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    sizes = sizes_of(operands, softcap, workspace_mib, more_blocks)._replace(multiplied=multiplied, rounded=rounded)
    tokens = rows.numel()
    if whole_rows:
        tokens = tokens_with_whole_rows(tokens, sizes)
    elif not at_once:
        tokens = tokens_per_piece(tokens, sizes)
    taken = [
        (some, sizes.vocabulary if whole_rows else entries_per_strip(some.numel(), sizes, copied=not at_once))
        for some in rows.split(max(tokens, 1))
    ]
    for (some, strip), its_targets in zip(taken, _targets(targets, taken, sizes.vocabulary), strict=True):
        at_once = sizes.logits_at_once(some.numel()) if rounded else 0
        yield Piece(operands, softcap, logit_scale, some, strip, its_targets, at_once)


def _targets(targets: Tensor, taken: list[tuple[Tensor, int]], vocabulary: int) -> list[Targets]:
    """Of each piece, which is its tokens and its strip's entries. The host waits for the device once, not in each."""
    found, bounds = [], []
    for some, strip in taken:
        given = targets[some].long()
        labels = given.clamp(0, vocabulary - 1)
        entries, tokens = labels.sort()
        found.append((labels, labels != given, tokens, entries % strip))
        starts = torch.arange(0, vocabulary + strip, strip, device=targets.device)
        bounds.append(torch.searchsorted(entries, starts))
    on_host = torch.cat(bounds).tolist()
    ends = itertools.accumulate((x.numel() for x in bounds), initial=0)
    return [
        Targets(*of_piece, on_host[start:end])
        for of_piece, (start, end) in zip(found, itertools.pairwise(ends), strict=True)
    ]


def finite(largest: Tensor) -> Tensor:
    """Zero in place of an infinity, which stays in the logits that it is not subtracted from."""
    return largest.where(largest.isfinite(), 0)


def walk_gradients(
    operands: Operands,
    walked: Iterable[Piece],
    needs: Operands,
    of_piece: Callable[[Piece], Callable[[slice, Tensor], tuple[Tensor, Tensor | None]]],
) -> tuple[Tensor, ...]:
    """Gradients by the operands, empty where ``needs`` has no True, from those by the logits of a strip at a time.

    ``of_piece(piece)(part, weight)`` makes these of the strip's entries and their rows, and the gradient by the scale,
    or None, as :func:`by_logits` does. They are in the accumulation dtype, or in that of factors where nothing but
    products is made of them. What is summed over tokens of 16 bits must come in one piece.
    """
    made: dict[str, Tensor] = {}

    def result(name: str) -> Tensor | None:
        """Made when first asked for: not before the products have taken memory of their own."""
        if getattr(needs, name) and name not in made:
            like = getattr(operands, name)
            made[name] = like.new_zeros(like.shape) if name in ("hidden", "low") else like.new_empty(like.shape)
        return made.get(name)

    first = True
    for piece in walked:
        d_kept = torch.zeros_like(piece.hidden, dtype=piece.wide) if needs.hidden else None
        d_kept_low = torch.zeros_like(piece.low) if needs.low else None
        of_strip = of_piece(piece)
        for part, weight in piece.strips():
            d_logits, by_scale = of_strip(part, weight)
            if needs.low:
                d_kept_low.addmm_(d_logits, operands.up[part].to(piece.wide))
            if needs.up:
                _add_transposed(result("up")[part], d_logits, piece.low, first)
            if needs.bias:
                _add(result("bias")[part], d_logits.sum(0), first)
            if needs.scale:
                _add(result("scale")[part], by_scale, first)
            d_logits = d_logits.to(piece.factor)
            if needs.hidden:
                add_product(d_kept, d_logits, weight)
            if needs.weight:
                _add_transposed(result("weight")[part], d_logits, piece.hidden, first)
            # Before the next strip's are made.
            del d_logits, weight
        if needs.hidden:
            result("hidden")[piece.rows] = d_kept.to(operands.hidden.dtype)
        if needs.low:
            result("low")[piece.rows] = d_kept_low.to(operands.low.dtype)
        first = False
    return tuple(operands.hidden.new_empty(0) if x is None else x for x in map(result, Operands._fields))


def no_values(operands: Operands, needs: Operands) -> tuple[Tensor, ...]:
    """What :func:`walk_gradients` returns, for a tracer."""
    none = operands.hidden.new_empty
    return tuple(x.new_empty(x.shape) if need else none(0) for need, x in zip(needs, operands, strict=True))


def by_logits(piece: Piece, differentiate: Callable[[Tensor, int], Tensor]):
    """For :func:`walk_gradients`, what makes of a strip gradients by its logits, before scale and softcap, and by the
    scale, or None; both in the accumulation dtype.

    ``differentiate(logits, start)`` makes those by the logits before ``logit_scale``, of a strip's logits, whose first
    entry is ``start``; in their place if it can.
    """

    def of_strip(part: slice, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, tanh, unscaled = piece.logits(part, weight, differentiable=True)
        d_logits = differentiate(logits, part.start)
        if tanh is not None:
            d_logits.mul_(tanh.square_().neg_().add_(1))
        if unscaled is None:
            return d_logits, None
        by_scale = unscaled.mul_(d_logits).sum(0)
        return d_logits.mul_(piece.operands.scale[part]), by_scale

    return of_strip


def _add(sums: Tensor, values: Tensor, first: bool) -> None:
    if first:
        sums.copy_(values)
    else:
        sums += values


def _add_transposed(sums: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``sums``, which hold nothing yet if it is the ``first``, grow by ``left`` transposed times ``right``."""
    if left.dtype == sums.dtype:
        torch.addmm(sums, left.T, right, beta=0 if first else 1, out=sums)
    else:
        _add(sums, left.T @ right, first)
