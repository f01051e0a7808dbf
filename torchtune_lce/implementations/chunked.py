"""``impl="chunked"``: bounded memory in plain eager PyTorch, for any device and without a compiler.

The vocabulary is walked in strips (:mod:`torchtune_lce.implementations.walk`). Of the entries beside the target the
sum of exponentials is kept, measured from one of their logits; no direction ever holds more than a block of logits. How
often the logits are computed depends on what is differentiated:

- Neither weight, bias nor an adapter's parameters: once. With p the softmax, c a logit's derivative by the product (the
  softcap's, and a scale), g and l the upstream gradients of a token's loss and log-sum-exp, t its target and

      m = sum over v != t of p_v c_v w_v / (1 - p_t),

  the gradient by the hidden state is (g + l) (1 - p_t) m + (g (p_t - 1) + l p_t) c_t w_t, for any g and l, which is
  (g + l) (1 - p_t) (m - c_t w_t) + l c_t w_t. So the forward keeps m or m - c_t w_t, [N, D], and the backward is a pass
  over it: of each token whichever is smaller, as it is rounded. What rows have in common is large in the former alone;
  rows that have nothing in common make the latter as large as w_t. That by an adapter's ``low`` is made of its ``up``.
- Any of these, and the loss is a mean or a sum whose log-sum-exps nobody differentiates: once. The forward takes tokens
  whose whole rows of logits fit the workspace and makes the gradients of the sum, which the backward only scales. Not
  in 16 bits, where a sum over pieces of tokens would be held in float32 beside the gradient; and not where the rows of
  fewer than 128 tokens fit. Activation checkpointing lets the gradients of the first forward go, and makes them again.
- Otherwise twice, in the forward and in the backward.

All are custom operators: how many tokens are in use decides their shapes, which a compiler cannot know. A target that
is no entry makes its own token's loss and gradients NaN, and what is summed over tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.implementations.capabilities import TWICE_DIFFERENTIABLE
from torchtune_lce.implementations.walk import (
    Operands,
    Piece,
    add_product,
    by_logits,
    finite,
    no_values,
    pieces,
    rounds_factors,
    sizes_of,
    tokens_with_whole_rows,
    walk_gradients,
)
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.validation import is_writable

_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale"
_SETTINGS = "int ignore_index, float? softcap, float logit_scale, int workspace_mib"
_GRADIENTS = ", ".join(f"Tensor d_{name}" for name in Operands._fields)
_COUNT = len(Operands._fields)


def token_losses(call: Call) -> Losses:
    """By one of the operators."""
    options, operands = call.options, Operands(*call.operands)
    needs = Operands(*(x is not None and x.requires_grad and torch.is_grad_enabled() for x in operands))
    with_means = bool(options.label_smoothing) and not call.means_by_product
    settings = call.labels, options.ignore_index, options.softcap, float(options.logit_scale), options.workspace_mib
    if call.summed and needs.of_entries and not with_means and _sums_fit(operands, options):
        total, nll, peak, log_total, *_ = torch.ops.torchtune_lce.chunked_sum(
            *operands, *settings, options.label_smoothing, options.z_loss, list(needs)
        )
        return Losses(nll.detach(), peak.detach(), log_total.detach(), total=total)
    with_directions = any(needs) and not needs.of_entries and not with_means
    nll, peak, log_total, means, *_ = torch.ops.torchtune_lce.chunked(*operands, *settings, with_means, with_directions)
    return Losses(nll, peak.detach(), log_total, means if with_means else None)


def _sums_fit(operands: Operands, options) -> bool:
    """Whether tokens can be taken with whole rows of logits, and gradients summed up in place."""
    hidden = operands.hidden
    if hidden.dtype != accumulation_dtype(hidden.dtype):
        return False
    return tokens_with_whole_rows(hidden.shape[0], sizes_of(operands, options.softcap, options.workspace_mib)) > 0


# Of a sum of exponentials measured from one of the logits: so far above it is the largest that digits are lost.
_MOST = 2.0**64


class Sums(NamedTuple):
    """Of some tokens over the entries beside their targets, [n] each."""

    peak: Tensor  # the largest logit, or one that is less
    total: Tensor  # of exponentials measured from it
    target: Tensor  # the target's own logit, NaN where it is no entry

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Negative log-likelihood; the peak or a larger target, 0 where not finite; log-sum-exp, less that."""
        # By how much the others outweigh the target: log((1 - p) / p), from which a confident token's loss loses no
        # digit.
        others = self.peak - self.target + self.total.log()
        nll = torch.logaddexp(others, torch.zeros_like(others)).masked_fill(self.target == torch.inf, torch.nan)
        base = finite(torch.maximum(self.peak, self.target))
        return nll, base, (self.total * (self.peak - base).exp() + (self.target - base).exp()).log()


def by_target_and_others(d_nll: Tensor, d_lse: Tensor | None, nll: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Gradients by the target's logit, and by another one as a share of its softmax; before ``logit_scale``."""
    d_nll, d_lse = d_nll * logit_scale, d_lse if d_lse is None else d_lse * logit_scale
    # Of the target p - 1 and p: neither is the difference of two numbers near 1.
    d_target = d_nll * torch.expm1(-nll)
    return (d_target, d_nll) if d_lse is None else (d_target + d_lse * torch.exp(-nll), d_nll + d_lse)


# --- losses, and with a frozen head what gradients are made of ---

torch.library.define(
    "torchtune_lce::chunked",
    f"({_OPERANDS}, Tensor targets, {_SETTINGS}, bool with_means, bool with_directions) "
    "-> (Tensor nll, Tensor peak, Tensor log_total, Tensor means, Tensor direction, Tensor low_direction, "
    "Tensor slope, Tensor apart)",
)


@torch.library.impl("torchtune_lce::chunked", "default")
@without_autocast
def _forward(*arguments):
    """What :func:`token_losses` returns; ``means`` is empty unless ``with_means``. Unless ``with_directions`` the last
    four are too: m or m - c_t w_t of the module's docstring; m of ``up``'s rows, not rounded; c_t; and which it is.
    """
    operands, (targets, *settings, with_means, with_directions) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    results = _results(operands, targets, with_means, with_directions)

    def walked(piece: Piece, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fills the results at the piece's tokens; its reference, and where that was too small for others."""
        found = _walk(piece, reference, with_means, with_directions)
        too_small = found.beyond(piece.factor)
        for result, part in zip(results, _finished(piece, found), strict=True):
            if result.numel():
                result[piece.rows] = part.to(result.dtype)
        return found.reference, too_small

    def all_pieces() -> Iterator[Piece]:
        return pieces(operands, targets, *settings, multiplied=with_directions)

    references = [walked(piece, None) for piece in all_pieces()]
    # The host waits for the device once, not in each piece.
    if references and torch.cat([too_small for _, too_small in references]).any():
        for piece, (reference, too_small) in zip(all_pieces(), references, strict=True):
            if too_small.any():
                # The others' as before, so that no token's bits depend on another.
                walked(piece, _largest(piece).where(too_small, reference))
    return results


def _results(operands: Operands, targets: Tensor, with_means: bool, with_directions: bool) -> tuple[Tensor, ...]:
    """Zeros, which ignored tokens keep."""
    hidden, low = operands.hidden, operands.low
    numbers = hidden.new_zeros((targets.shape[0],), dtype=accumulation_dtype(hidden.dtype))
    return (
        numbers,
        torch.zeros_like(numbers),
        torch.zeros_like(numbers),
        numbers.new_zeros(numbers.shape if with_means else 0),
        hidden.new_zeros(hidden.shape if with_directions else 0),
        numbers.new_zeros(low.shape if with_directions and low is not None else 0),
        numbers.new_zeros(numbers.shape if with_directions else 0),
        numbers.new_zeros(numbers.shape if with_directions else 0, dtype=torch.bool),
    )


torch.library.register_fake("torchtune_lce::chunked")(
    lambda *arguments: _results(Operands(*arguments[:_COUNT]), arguments[_COUNT], *arguments[-2:])
)


def _finished(piece: Piece, found: "_Walked") -> tuple[Tensor | None, ...]:
    """What the operator returns, of the piece's tokens, in the accumulation dtype; the directions in their place."""
    reference, total, target, mean, direction, low_direction, excess = found
    # Infinities, from which a number was subtracted.
    peak = reference.masked_fill(total == 0, -torch.inf).masked_fill_(total == torch.inf, torch.inf)
    sums = Sums(peak, total, target.masked_fill_(piece.targets.outside, torch.nan))
    if direction is None:
        slope = apart = None
    else:
        slope, apart = _finish_directions(piece, sums, direction, low_direction, excess)
    nll, base, log_total = sums.losses()
    return nll, base, log_total, mean - base, direction, low_direction, slope, apart


class _Walked(NamedTuple):
    """What a walk over the vocabulary finds, [n] but the last two, of the entries beside the target but the mean."""

    reference: Tensor  # one of their logits
    total: Tensor  # of exponentials measured from it
    target: Tensor  # its own logit
    mean: Tensor  # of all logits
    direction: Tensor | None  # [n, D]: the weight's rows, added up with these exponentials
    low_direction: Tensor | None  # [n, r]: likewise ``up``'s
    excess: Tensor | None  # by what rounding to the dtype of factors has multiplied the sum of direction's shares

    def beyond(self, factor: torch.dtype) -> Tensor:
        """[n], whether other logits are so far above the reference that digits, or a factor's range, do not suffice."""
        found = self.total > _MOST
        if self.direction is not None and factor == torch.float16:
            found |= ~self.direction.sum(-1).isfinite()
        return found


def _walk(piece: Piece, reference: Tensor | None, with_means: bool, with_directions: bool) -> _Walked:
    """``reference``: by default the largest of the first strip, from which the largest of all is seldom far."""
    totals, targets, exact, rounded = [], [], [], []
    mean, base = torch.zeros_like(piece.rows, dtype=piece.wide), None
    vocabulary, scale, up = piece.operands.weight.shape[0], piece.operands.scale, piece.operands.up
    direction = torch.zeros_like(piece.hidden, dtype=piece.wide) if with_directions else None
    low_direction = torch.zeros_like(piece.low) if with_directions and piece.low is not None else None
    for part, weight in piece.strips():
        logits, tanh, _ = piece.logits(part, weight, differentiable=with_directions)
        if with_means:
            base = _finite_largest(logits) if base is None else base
            # Divided first: a sum of least finite numbers is none.
            mean += (logits - base[:, None]).div_(vocabulary).sum(-1)
        targets.append(piece.take_targets(logits, part.start))
        reference = _finite_largest(logits) if reference is None else reference
        exponentials = logits.sub_(reference[:, None]).exp_()
        totals.append(exponentials.sum(-1))
        if direction is not None:
            if tanh is not None:
                exponentials.mul_(tanh.square_().neg_().add_(1))
            if scale is not None:
                exponentials.mul_(scale[part])
            if low_direction is not None:
                low_direction.addmm_(exponentials, up[part].to(piece.wide))
            factors = exponentials.to(piece.factor)
            # A scale may have either sign, and then the sum may be next to nothing.
            if factors.dtype != piece.wide and scale is None:
                exact.append(totals[-1] if tanh is None else exponentials.sum(-1))
                rounded.append(factors.sum(-1, dtype=piece.wide))
            add_product(direction, factors, weight)
            del factors
        # Before the next strip's are made.
        del logits, tanh, exponentials, weight
    mean = mean if base is None else mean + base
    target = piece.targets.by_token(targets)
    excess = torch.stack(rounded).sum(0) / torch.stack(exact).sum(0) if rounded else None
    return _Walked(reference, torch.stack(totals).sum(0), target, mean, direction, low_direction, excess)


def _largest(piece: Piece) -> Tensor:
    """[n], of the logits beside the target's."""
    largest = []
    for part, weight in piece.strips():
        logits, _, _ = piece.logits(part, weight, differentiable=False)
        piece.take_targets(logits, part.start)
        largest.append(_finite_largest(logits))
        del logits, weight
    return torch.stack(largest).amax(0)


def _finite_largest(logits: Tensor) -> Tensor:
    """The largest finite number in place of an infinity, which stays in the logits that it is subtracted from."""
    most = torch.finfo(logits.dtype).max
    return logits.amax(-1).clamp_(-most, most)


def _finish_directions(
    piece: Piece, sums: Sums, direction: Tensor, low_direction: Tensor | None, excess: Tensor | None
):
    """Makes means of sums over the other entries, and takes the target's row from ``direction`` where that leaves less.

    ``excess`` as in :class:`_Walked`: without it the shares of a mean come to 1 again, so that what rows have in common
    is not multiplied by what rounding has done to their sum. Returns c_t of the module's docstring, and where that is.
    """
    weight, scale, target = piece.operands.weight, piece.operands.scale, sums.target
    labels = piece.targets.labels
    # Of no other entries there is no mean.
    total = sums.total.where(sums.total > 0, 1)[:, None]
    if low_direction is not None:
        low_direction.div_(total)
    if excess is not None:
        # Of shares that are all rounded to nothing there is nothing to correct.
        total = total * excess.where(excess.isfinite() & (excess > 0), 1)[:, None]
    direction.div_(total)
    slope = torch.ones_like(target)
    if piece.softcap is not None:
        slope = 1 - (target / (piece.softcap * piece.logit_scale)).square()
    slope = slope if scale is None else slope * scale[labels]
    return slope, take_own_rows(direction, weight, labels, slope)


def take_own_rows(direction: Tensor, weight: Tensor, labels: Tensor, slope: Tensor) -> Tensor:
    """Takes c_t w_t of the module's docstring from m, ``direction`` [n, D] in the accumulation dtype, where that leaves
    less; returns where, [n] bool.
    """
    own = weight[labels].to(direction.dtype).mul_(slope[:, None])
    # |m - own| < |m|
    apart = 2 * torch.einsum("nd,nd->n", direction, own) > torch.einsum("nd,nd->n", own, own)
    direction.addcmul_(own, apart[:, None].to(direction.dtype), value=-1)
    return apart


torch.library.define(
    "torchtune_lce::chunked_along_directions",
    "(Tensor? d_nll, Tensor? d_lse, Tensor nll, Tensor slope, Tensor targets, Tensor direction, Tensor? apart, "
    "Tensor rows, int ignore_index, float logit_scale, int workspace_mib) -> Tensor",
)


@torch.library.impl("torchtune_lce::chunked_along_directions", "default")
@without_autocast
def _along_directions(
    d_nll, d_lse, nll, slope, targets, direction, apart, rows, ignore_index, logit_scale, workspace_mib
):
    """Gradient [N, D] by the hidden states, ``rows`` being the weight's, or [N, r] by ``low``, they being ``up``'s.

    ``apart``: where the target's row has been taken from ``direction``.
    """
    d_target, d_softmax = by_target_and_others(
        torch.zeros_like(nll) if d_nll is None else d_nll, d_lse, nll, logit_scale
    )
    if apart is not None:
        d_target = torch.where(apart, 0 if d_lse is None else d_lse * logit_scale, d_target)
    along, d_target = (d_softmax * -torch.expm1(-nll))[:, None], (d_target * slope)[:, None]
    gradient = rows.new_zeros(direction.shape)
    # Both terms in the accumulation dtype, and their factors as they are.
    bytes_of_token = direction.shape[1] * (2 * nll.itemsize + 3 * direction.itemsize)
    labels = targets.clamp(0, rows.shape[0] - 1)
    used = (targets != ignore_index).nonzero().squeeze(-1)
    for some in used.split(max(workspace_mib * 2**20 // bytes_of_token, 1)):
        terms = direction[some] * along[some]
        gradient[some] = terms.addcmul_(rows[labels[some]], d_target[some]).to(gradient.dtype)
    return gradient


@torch.library.register_fake("torchtune_lce::chunked_along_directions")
def _(d_nll, d_lse, nll, slope, targets, direction, apart, rows, ignore_index, logit_scale, workspace_mib):
    return rows.new_empty(direction.shape)


torch.library.define(
    "torchtune_lce::chunked_backward",
    f"(Tensor? d_nll, Tensor? d_lse, Tensor? d_means, {_OPERANDS}, Tensor targets, Tensor nll, Tensor peak, "
    f"Tensor log_total, {_SETTINGS}, bool[] needs) -> ({_GRADIENTS})",
)


@torch.library.impl("torchtune_lce::chunked_backward", "default")
@without_autocast
def _backward(d_nll, d_lse, d_means, *arguments):
    """Gradients by the operands, empty where ``needs`` has no True."""
    operands, (targets, nll, peak, log_total, *settings, needs) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    d_nll = torch.zeros_like(nll) if d_nll is None else d_nll
    logit_scale = settings[2]
    d_target, d_softmax = by_target_and_others(d_nll, d_lse, nll, logit_scale)
    vocabulary, needs = operands.weight.shape[0], Operands(*needs)
    capped_or_scaled = settings[1] is not None or operands.scale is not None
    others = capped_or_scaled or d_means is not None or any((needs.bias, needs.low, needs.up))
    # The factor goes into the exponent then: two passes over a block of logits in place of four.
    rounded = rounds_factors(operands.hidden) and not others and not bool((d_softmax < 0).any())

    def of_piece(piece):
        base, log_sum, by_softmax, by_target = (x[piece.rows, None] for x in (peak, log_total, d_softmax, d_target))
        by_softmax = by_softmax * torch.exp(-log_sum)
        by_mean = None if d_means is None else d_means[piece.rows, None] * (logit_scale / vocabulary)

        def differentiate(logits, start):
            d_logits = logits.sub_(base).exp_().mul_(by_softmax)
            piece.put_targets(d_logits, start, by_target.squeeze(-1))
            return d_logits if by_mean is None else d_logits.add_(by_mean)

        return by_logits(piece, differentiate)

    def of_rounded_piece(piece):
        base = (peak + log_total - d_softmax.log())[piece.rows, None]
        by_target = d_target[piece.rows].to(piece.factor)

        def of_strip(part, weight):
            d_logits = piece.rounded_exponentials(part, weight, base)
            piece.put_targets(d_logits, part.start, by_target)
            return d_logits, None

        return of_strip

    # In pieces of tokens the logits would be computed another time.
    walked = pieces(operands, targets, *settings, at_once=needs.of_entries, rounded=rounded)
    return walk_gradients(operands, walked, needs, of_rounded_piece if rounded else of_piece)


@torch.library.register_fake("torchtune_lce::chunked_backward")
def _(d_nll, d_lse, d_means, *arguments):
    return no_values(Operands(*arguments[:_COUNT]), arguments[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ignore_index, softcap, logit_scale, workspace_mib, ctx.with_means, ctx.with_directions = inputs
    ctx.set_materialize_grads(False)
    nll, peak, log_total, _, *directions = output
    ctx.save_for_backward(*tensors, nll, peak, log_total, *directions)
    ctx.settings = ignore_index, softcap, logit_scale, workspace_mib


def _differentiate(ctx, d_nll, _, d_lse, d_means, *__):
    operators, saved = torch.ops.torchtune_lce, ctx.saved_tensors
    operands, (targets, nll, peak, log_total, *directions) = Operands(*saved[:_COUNT]), saved[_COUNT:]
    needs = Operands(*ctx.needs_input_grad[:_COUNT])
    if ctx.with_directions and not needs.of_entries:
        direction, low_direction, slope, apart = directions
        ignore_index, _, logit_scale, workspace_mib = ctx.settings

        def along(*direction):
            upstream = d_nll, d_lse, nll, slope, targets
            return operators.chunked_along_directions(*upstream, *direction, ignore_index, logit_scale, workspace_mib)

        d_hidden = along(direction, apart, operands.weight) if needs.hidden else None
        d_low = along(low_direction, None, operands.up) if needs.low else None
        return d_hidden, None, None, d_low, *[None] * 9
    upstream = d_nll, d_lse, d_means if ctx.with_means else None
    gradients = operators.chunked_backward(*upstream, *operands, targets, nll, peak, log_total, *ctx.settings, [*needs])
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 7


# --- a sum, with its gradients ---

torch.library.define(
    "torchtune_lce::chunked_sum",
    f"({_OPERANDS}, Tensor targets, {_SETTINGS}, float label_smoothing, float z_loss, bool[] needs) "
    f"-> (Tensor total, Tensor nll, Tensor peak, Tensor log_total, {_GRADIENTS})",
)


@torch.library.impl("torchtune_lce::chunked_sum", "default")
@without_autocast
def _sum(*arguments):
    """The sum of :attr:`torchtune_lce.inputs.losses.Losses.total`, what it is made of, and gradients by it, empty where
    ``needs`` has no True.
    """
    operands, (targets, *settings, smoothing, z_loss, needs) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    nll, peak, log_total, *_ = _results(operands, targets, with_means=False, with_directions=False)

    def of_piece(piece):
        rows = piece.rows

        def differentiate(logits, start):
            target = piece.targets.by_token([piece.take_targets(logits, start)])
            target.masked_fill_(piece.targets.outside, torch.nan)
            largest = logits.amax(-1)
            base = finite(largest)
            exponentials = logits.sub_(base[:, None]).exp_()
            nll[rows], peak[rows], log_total[rows] = Sums(largest, exponentials.sum(-1), target).losses()
            d_nll, d_lse = by_sum(peak[rows] + log_total[rows], smoothing, z_loss)
            d_target, d_softmax = by_target_and_others(d_nll, d_lse, nll[rows], piece.logit_scale)
            # No more than 1, also where no other entry can be and base is none of their logits.
            shrunk = (base - peak[rows] - log_total[rows]).clamp_(max=0).exp()
            d_logits = exponentials.mul_((d_softmax * shrunk)[:, None])
            piece.put_targets(d_logits, start, d_target)
            return d_logits

        return by_logits(piece, differentiate)

    walked = pieces(operands, targets, *settings, whole_rows=True)
    gradients = walk_gradients(operands, walked, Operands(*needs), of_piece)
    # Not nothing times what may be infinite.
    total = (1 - smoothing) * nll + smoothing * log_total if smoothing else nll
    if z_loss:
        total = total + z_loss * (peak + log_total).square()
    return total.sum(), nll, peak, log_total, *gradients


def by_sum(lse: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor | None]:
    """Gradients of the sum by a token's loss and log-sum-exp; None without a term of the latter."""
    d_nll = torch.full_like(lse, 1 - smoothing)
    if z_loss:
        return d_nll, smoothing + 2 * z_loss * lse
    return d_nll, torch.full_like(lse, smoothing) if smoothing else None


@torch.library.register_fake("torchtune_lce::chunked_sum")
def _(*arguments):
    operands, targets = Operands(*arguments[:_COUNT]), arguments[_COUNT]
    nll, peak, log_total, *_ = _results(operands, targets, with_means=False, with_directions=False)
    return nll.new_empty(()), nll, peak, log_total, *no_values(operands, arguments[-1])


def _setup_context_of_sum(ctx, inputs, output) -> None:
    # The gradients are outputs too, for which zeros would be made.
    ctx.set_materialize_grads(False)
    *tensors, ignore_index, softcap, logit_scale, workspace_mib, smoothing, z_loss, ctx.needs = inputs
    _, nll, peak, log_total, *gradients = output
    ctx.save_for_backward(*tensors, nll, peak, log_total, *gradients)
    ctx.settings = ignore_index, softcap, logit_scale, workspace_mib
    ctx.terms = smoothing, z_loss
    # Written to by a backward, and given away.
    ctx.spent = False


def _differentiate_sum(ctx, d_total, *_):
    operators, saved = torch.ops.torchtune_lce, ctx.saved_tensors
    operands, (targets, nll, peak, log_total, *gradients) = Operands(*saved[:_COUNT]), saved[_COUNT:]
    needs = list(ctx.needs_input_grad[:_COUNT])
    if torch.is_grad_enabled():
        # For a second derivative, which this operator refuses when it is asked for.
        upstream = (x if x is None else d_total * x for x in by_sum(peak + log_total, *ctx.terms))
        arguments = *operands, targets, nll, peak, log_total, *ctx.settings, needs
        gradients = operators.chunked_backward(*upstream, None, *arguments)
    else:
        if ctx.spent or any(need and not made for need, made in zip(needs, ctx.needs, strict=True)):
            # Once more over the same graph; or vmap, inside which nothing seems to ask for a gradient.
            made = operators.chunked_sum(*operands, targets, *ctx.settings, *ctx.terms, needs)
            gradients = made[-_COUNT:]
        # A tracer may not write to what the forward has returned, and many upstream gradients need as many results.
        in_place = all(map(is_writable, (d_total, *gradients)))
        ctx.spent = ctx.spent or in_place
        # Of ignored tokens nothing, whatever d_total is; infinite, where it was divided by the number of all others.
        used = targets != ctx.settings[0]
        of_tokens, of_entries = d_total.where(used, 0)[:, None], d_total.where(used.any(), 0)
        factors = Operands(*[of_entries] * _COUNT)._replace(hidden=of_tokens, low=of_tokens)
        # By their data, or torch would refuse another backward, as what was saved has been written to.
        gradients = [
            made if not need else made.data.mul_(factor) if in_place else made * factor
            for made, factor, need in zip(gradients, factors, needs, strict=True)
        ]
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 8


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(f"impl='chunked' has no second derivative (create_graph=True); set {TWICE_DIFFERENTIABLE}")


torch.library.register_autograd("torchtune_lce::chunked", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::chunked_sum", _differentiate_sum, setup_context=_setup_context_of_sum)
for _operator in ("chunked_along_directions", "chunked_backward"):
    torch.library.register_autograd(f"torchtune_lce::{_operator}", _refuse_second_derivative)
