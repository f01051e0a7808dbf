"""Whole rows of logits of some tokens at a time, and what torch.compile fuses of the steps between the products.

A piece's logits, [n, V] in the dtype of the products' factors, are all of that size that there is: the steps read
them, and the last one writes the gradient by them in their place. So each step computes again what it needs of them, a
softcap's tanh, a bias, a scale: a compiler fuses that into reading them.

The steps are compiled for any number of tokens, and for the first vocabulary that comes as a constant, so that a card
may read aligned rows in wide loads; from the second one on for any.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.implementations.chunked import Sums, by_sum, by_target_and_others
from torchtune_lce.implementations.walk import Operands, finite, has_wide_product, sizes_of
from torchtune_lce.inputs.dtypes import accumulation_dtype

# Tokens of a card's tile: a product takes as long for a few more.
_TILE = 128
# Pieces whose products may be added up in 16 bits: of so few the roundings are less than that of the factors.
_MOST_ROUNDED = 8
# Of exponentials whose sum is to be 1: in float16 small ones would be subnormal, in 16 bits this loses nothing.
UNIT = 2.0**10


def any_variants():
    """A context, in which a function is compiled for all variants that come: a dtype, a softcap, a bias or none, a
    frozen weight or not.

    torch's limit for a function, eight in a process, is soon passed, so its limit for all of them together holds.
    Numbers of Python are constants: torch 2.13, told to compile for any, may go on with one that it has seen before.
    """
    config = torch._dynamo.config
    return config.patch(recompile_limit=config.accumulated_recompile_limit, specialize_float=True)


def compiled_always(function: Callable) -> Callable:
    """The function under torch.compile for any sizes, which raises where it would run a variant of it without compiling
    it.
    """
    # As one whole, or torch would only warn.
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def run(*arguments):
        with any_variants():
            return compiled(*arguments)

    return run


class Cap(NamedTuple):
    """What becomes of logits with bias and scale."""

    softcap: float | None
    logit_scale: float

    def slope(self, capped: Tensor) -> Tensor:
        """Derivative of capped logits, before ``logit_scale``, from what they are after it."""
        if self.softcap is None:
            return torch.ones_like(capped)
        return 1 - (capped / (self.softcap * self.logit_scale)).square()


# --- steps, each of which passes over a piece's logits ---


def statistics(
    logits: Tensor,  # [n, V] without bias, scale and softcap
    labels: Tensor,  # [n] int32; where one names no entry, its token's target is NaN
    bias: Tensor | None,
    scale: Tensor | None,
    cap: Cap,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`Sums` holds, in the accumulation dtype."""
    values, _ = _uncapped(logits, bias, scale)
    is_target, some_entry = _is_target(values, labels), labels.clamp(0, values.shape[1] - 1).long()
    target = _capped(values.gather(-1, some_entry[:, None]).squeeze(-1), cap)
    # A softcap rises: the largest comes before it, so that its tanh is asked for once.
    largest = _capped(values.masked_fill(is_target, -torch.inf).amax(-1), cap)
    others = _capped(values, cap).masked_fill(is_target, -torch.inf)
    total = (others - finite(largest)[:, None]).exp().sum(-1)
    return largest, total, target.masked_fill(some_entry != labels, torch.nan)


def finish(
    peak: Tensor, total: Tensor, target: Tensor, cap: Cap, purpose: str, smoothing: float, z_loss: float
) -> tuple[Tensor | None, ...]:
    """Of the results of :func:`statistics`, without passing over the logits, a token's loss, peak, and log-sum-exp less
    it; and what :func:`write_gradient` takes to make of the logits what ``purpose`` needs: a reference, a factor, and
    what stands at the target. [n] each.

    ``sum``: the gradient of a sum with label smoothing and z-loss. ``directions``: what is to be multiplied with the
    weight's rows, see :mod:`torchtune_lce.implementations.chunked`; then there is a last one, the derivative of the
    target's logit but for a scale. ``losses``: nothing.

    A step of its own: with the sums in one kernel, Triton 3.6 fails to compile some of few entries.
    """
    base = finite(peak)
    nll, peak, log_total = found = Sums(peak, total, target).losses()
    if purpose == "sum":
        by_total = by_sum(peak + log_total, smoothing, z_loss)
        d_target, d_softmax = by_target_and_others(*by_total, nll, cap.logit_scale)
        # No more than 1, also where no other entry can be and base is none of their logits.
        return *found, base, d_softmax * (base - peak - log_total).clamp(max=0).exp(), d_target, None
    if purpose == "directions":
        # Of no other entries there is no mean.
        factor = UNIT / total.where(total > 0, 1)
        return *found, base, factor, torch.zeros_like(target), cap.slope(target)
    return *found, None, None, None, None


def means(logits: Tensor, labels: Tensor, bias, scale, cap, peak: Tensor) -> Tensor:
    """Of a token's logits, less its peak: [n] in the accumulation dtype."""
    values = _capped(_uncapped(logits, bias, scale)[0], cap)
    # Divided first: a sum of least finite numbers is none.
    return ((values - peak[:, None]) / values.shape[1]).sum(-1)


def write_gradient(logits: Tensor, *arguments) -> None:
    """That by a piece's logits in their place; arguments as of :func:`_gradient`."""
    gradient, scale = _gradient(logits, *arguments)[0], arguments[2]
    logits.copy_(gradient if scale is None else gradient * scale)


def summed_by_bias(logits: Tensor, *arguments) -> Tensor:
    """[V] in the accumulation dtype. The logits are as they were: a sum over tokens is another pass."""
    gradient, scale = _gradient(logits, *arguments)[0], arguments[2]
    return gradient.sum(0) if scale is None else gradient.sum(0) * scale


def summed_by_scale(logits: Tensor, *arguments) -> Tensor:
    """[V] in the accumulation dtype."""
    gradient, unscaled = _gradient(logits, *arguments)
    return (gradient * unscaled).sum(0)


def _gradient(
    logits: Tensor,  # [n, V]
    labels: Tensor,  # [n] int32
    bias: Tensor | None,
    scale: Tensor | None,
    cap: Cap,
    reference: Tensor,  # [n], as the rest
    factor: Tensor,
    d_target: Tensor,
    d_mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """exp(value - reference) times ``factor``, at the target ``d_target``, and a V-th of ``d_mean``; times the
    softcap's derivative. And the logits with their bias.
    """
    values, unscaled = _uncapped(logits, bias, scale)
    gradient = (_capped(values, cap) - reference[:, None]).exp() * factor[:, None]
    gradient = torch.where(_is_target(values, labels), d_target[:, None], gradient)
    if d_mean is not None:
        gradient = gradient + d_mean[:, None] / values.shape[1]
    if cap.softcap is not None:
        # Of a tanh of its own: what is used twice, a compiler for a CPU would keep, in a block as large as the logits.
        gradient = gradient * (1 - torch.tanh(-values / cap.softcap).square())
    return gradient, unscaled


def _uncapped(logits: Tensor, bias: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """With bias and scale, and with their bias alone; in the accumulation dtype."""
    unscaled = logits.to(accumulation_dtype(logits.dtype))
    if bias is not None:
        unscaled = unscaled + bias
    return unscaled if scale is None else unscaled * scale, unscaled


def _capped(values: Tensor, cap: Cap) -> Tensor:
    if cap.softcap is not None:
        return cap.softcap * cap.logit_scale * torch.tanh(values / cap.softcap)
    return values if cap.logit_scale == 1 else values * cap.logit_scale


def _is_target(values: Tensor, labels: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device, dtype=labels.dtype) == labels[:, None]


@dataclass(frozen=True)
class Steps:
    statistics: Callable
    finish: Callable
    means: Callable
    write_gradient: Callable
    summed_by_bias: Callable
    summed_by_scale: Callable


@cache
def steps() -> Steps:
    """Compiled when first called, once a process: importing the package must not start a compiler."""

    def of_logits(function: Callable) -> Callable:
        return of_any_tokens(function, shared=(2, 3))

    others = map(of_logits, (means, write_gradient, summed_by_bias, summed_by_scale))
    return Steps(of_logits(statistics), of_any_tokens(finish), *others)


def of_any_tokens(function: Callable, shared: tuple[int, ...] = ()) -> Callable:
    """Compiled, to be called where :func:`any_variants` holds, which takes the host as long as a small step to enter.
    ``shared``: where arguments stand that all tokens share, the bias and the scale.
    """
    compiled = torch.compile(function, fullgraph=True)

    def run(*arguments):
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor) and place not in shared:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*arguments)

    return run


# --- pieces ---


class Division(NamedTuple):
    """Of a call's tokens into pieces."""

    tokens: int  # of a piece
    entries: int  # of a strip whose rows of the weight are widened, or whose gradient is added up in float32
    wide_sums: bool  # gradients of the weight and of an adapter's up are added up in the accumulation dtype


def divide(
    tokens: int,
    features: int,
    vocabulary: int,
    dtype: torch.dtype,
    workspace_mib: int,
    widened: bool,
    needs: Operands | None,
) -> Division:
    """Pieces as large as the workspace holds. ``needs``: gradients that are made of them, if any.

    In 16 bits a sum over pieces would be held in float32 beside the weight's gradient, or over strips beside that of
    the hidden states. The memory of it makes pieces larger instead, of which there are then few, so that the sum may be
    rounded; where they are many it is what it would be.
    """
    wide, workspace = accumulation_dtype(dtype).itemsize, workspace_mib * 2**20
    if needs is None or dtype.itemsize == wide:
        return _divide(tokens, features, vocabulary, dtype, workspace, widened, wide_sums=False)
    of_sum = wide * features * (vocabulary if needs.weight else tokens)
    few = _divide(tokens, features, vocabulary, dtype, workspace + of_sum, widened, wide_sums=False)
    if not (needs.weight or needs.up) or few.tokens * _MOST_ROUNDED >= tokens:
        return few
    return _divide(tokens, features, vocabulary, dtype, workspace, widened, wide_sums=True)


def _divide(tokens, features, vocabulary, dtype, workspace, widened, wide_sums) -> Division:
    wide = accumulation_dtype(dtype).itemsize
    factor = wide if widened else dtype.itemsize
    entries = vocabulary
    if widened or wide_sums:
        # Rows of the weight, and the products that are added to the gradient's.
        entry = 2 * wide * features
        entries = min(vocabulary, max(workspace // 4 // entry, 64))
        workspace -= entries * entry
    # Logits; the hidden state as it was or is for products, a product, and a row to be taken from it, also as it was.
    fitting = max(workspace // (vocabulary * factor + 2 * features * (wide + dtype.itemsize)), 1)
    fitting = fitting // _TILE * _TILE or fitting
    even = -(-tokens // max(-(-tokens // fitting), 1)) or 1
    return Division(min(fitting, -(-even // _TILE) * _TILE), entries, wide_sums)


@dataclass(frozen=True)
class Rows:
    """Some tokens and their logits, without bias, scale and softcap, in the dtype of products' factors."""

    at: Tensor | slice  # which tokens
    labels: Tensor  # [n] int32
    hidden: Tensor  # [n, D], in the dtype of factors
    low: Tensor | None  # [n, r], likewise
    logits: Tensor  # [n, V]


class Walk:
    """The pieces of a call's tokens that are not ignored, and products of what is made of their logits; ``needs`` as in
    :func:`divide`.
    """

    def __init__(
        self, operands: Operands, targets: Tensor, ignore_index: int, workspace_mib: int, needs: Operands | None
    ):
        self.operands, self.targets = operands, targets
        self.used = (targets != ignore_index).nonzero().squeeze(-1)
        # Of all tokens no copy is needed.
        self.all = self.used.numel() == targets.shape[0]
        sizes = sizes_of(operands, None, workspace_mib)
        self.wide = accumulation_dtype(sizes.dtype)
        self.factor = self.wide if sizes.widened else sizes.dtype
        self.division = divide(
            self.tokens, sizes.features, sizes.vocabulary, sizes.dtype, workspace_mib, sizes.widened, needs
        )

    @property
    def tokens(self) -> int:
        """In use."""
        return self.used.numel()

    def __iter__(self) -> Iterator[Rows]:
        hidden, _, _, low, up, _ = self.operands
        at_once = self.division.tokens
        memory = hidden.new_empty((min(at_once, self.tokens), self.operands.weight.shape[0]), dtype=self.factor)
        # Of 64 bits, what names no entry could do so in 32.
        labels = (self.targets if self.all else self.targets[self.used]).clamp(-1, memory.shape[1]).int()
        end = 0
        while end < self.tokens:
            start, end = end, min(end + at_once, self.tokens)
            # Not a last one alone: torch takes an axis of length 1 for a constant, and compiles once more.
            end -= self.tokens - end == 1 and end - start > 2
            at = slice(start, end) if self.all else self.used[start:end]
            states, some_low = hidden[at].to(self.factor), None if low is None else low[at].to(self.factor)
            rows = Rows(at, labels[start:end], states, some_low, memory[: end - start])
            for part, weight in self._strips(self.operands.weight):
                torch.mm(states, weight.T, out=rows.logits[:, part])
            if low is not None:
                rows.logits.addmm_(rows.low, up.to(self.factor).T)
            yield rows

    def put(self, results: Sequence[Tensor], found: list[tuple[Tensor, ...]]) -> None:
        """Fills ``results``, [N] each, by what was ``found`` of each piece, one after the other."""
        at = slice(None) if self.all else self.used
        for result, parts in zip(results, zip(*found, strict=True), strict=False):
            result[at] = torch.cat(parts)

    def wide_product(self, rows: Rows, matrix: Tensor, factor: float) -> Tensor:
        """As :meth:`product`, in the accumulation dtype, not rounded before where torch has such a product."""
        if rows.logits.dtype == self.wide:
            return self.product(rows, matrix, factor)
        if has_wide_product(rows.logits):
            return torch.mm(rows.logits, matrix, out_dtype=self.wide).mul_(factor)
        return (rows.logits @ matrix).to(self.wide).mul_(factor)

    def product(self, rows: Rows, matrix: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
        """``factor`` times what stands in the logits' place times ``matrix``, [n, its width] in their dtype."""
        product = rows.logits.new_empty((rows.logits.shape[0], matrix.shape[1])) if out is None else out
        for part, values in self._strips(matrix):
            beta = 1 if part.start else 0
            torch.addmm(product, rows.logits[:, part], values, beta=beta, alpha=factor, out=product)
        return product

    def add_product(self, sums: Tensor, rows: Rows, states: Tensor, factor: float, first: bool) -> None:
        """``sums`` [V, width of ``states``], which hold nothing yet if the piece is the ``first``, grow by ``factor``
        times what stands in the logits' place, transposed, times ``states``.
        """
        for start in range(0, sums.shape[0], self.division.entries):
            part = slice(start, start + self.division.entries)
            left, some = rows.logits[:, part].T, sums[part]
            if left.dtype == some.dtype:
                torch.addmm(some, left, states, beta=0 if first else 1, alpha=factor, out=some)
                continue
            wide = some.dtype == self.wide and has_wide_product(left)
            product = torch.mm(left, states, out_dtype=self.wide) if wide else left @ states
            if first:
                some.copy_(product.mul_(factor))
            else:
                some.add_(product, alpha=factor)

    def _strips(self, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """In the dtype of factors: as a whole if it has that already, so that no sum of parts is rounded."""
        if matrix.dtype == self.factor:
            yield slice(0, matrix.shape[0]), matrix
            return
        for start in range(0, matrix.shape[0], self.division.entries):
            part = slice(start, min(start + self.division.entries, matrix.shape[0]))
            yield part, matrix[part].to(self.factor)


def gradients(
    walk: Walk,
    needs: Operands,
    cap: Cap,
    by_logits: Callable[[Rows], tuple[Tensor | None, ...]],
    factor: float = 1.0,
) -> tuple[Tensor, ...]:
    """``factor`` times those by the operands, empty where ``needs`` has no True. ``by_logits`` gives of a piece what
    :func:`_gradient` takes beside the logits, labels and operands.
    """
    operands = walk.operands
    made = {name: _sums(name, walk) for name in Operands._fields if getattr(needs, name)}
    first = True
    for rows in walk:
        arguments = rows.logits, rows.labels, operands.bias, operands.scale, cap, *by_logits(rows)
        if needs.bias:
            made["bias"].add_(steps().summed_by_bias(*arguments), alpha=factor)
        if needs.scale:
            made["scale"].add_(steps().summed_by_scale(*arguments), alpha=factor)
        steps().write_gradient(*arguments)
        for name, matrix in (("hidden", operands.weight), ("low", operands.up)):
            if name in made and walk.all and made[name].dtype == walk.factor:
                walk.product(rows, matrix, factor, out=made[name][rows.at])
            elif name in made:
                made[name][rows.at] = walk.product(rows, matrix, factor).to(made[name].dtype)
        for name, states in (("weight", rows.hidden), ("up", rows.low)):
            if name in made:
                walk.add_product(made[name], rows, states, factor, first)
        first = False
        # Before another takes its place, and before sums are rounded.
        del rows, arguments
    return tuple(
        made[name].to(x.dtype) if name in made else operands.hidden.new_empty(0)
        for name, x in operands._asdict().items()
    )


def _sums(name: str, walk: Walk) -> Tensor:
    """What a gradient is added up or written in: zeros for what no piece has."""
    like = getattr(walk.operands, name)
    of_entries = name in ("weight", "up")
    whole = walk.tokens > 0 if of_entries else name in ("hidden", "low") and walk.all
    is_wide = name in ("bias", "scale") or of_entries and walk.division.wide_sums
    make = like.new_empty if whole else like.new_zeros
    return make(like.shape, dtype=walk.wide if is_wide else like.dtype)
