"""``impl="torch_compile"``: bounded memory, with what stands between the products fused by torch.compile.

Tokens are taken in pieces with whole rows of logits (:mod:`torchtune_lce.implementations.fused`). As in
:mod:`torchtune_lce.implementations.chunked` they are computed once where the loss is a mean or a sum whose log-sum-exps
nobody differentiates, by the forward, which makes the gradients too; and once for any loss where all that tokens share
is frozen. Otherwise twice.

All are custom operators: a caller's compiler would hold whole logits.
"""

import torch
from torch import Tensor

from torchtune_lce.implementations.capabilities import TWICE_DIFFERENTIABLE
from torchtune_lce.implementations.chunked import by_sum, by_target_and_others, take_own_rows
from torchtune_lce.implementations.fused import UNIT, Cap, Walk, any_variants, gradients, steps
from torchtune_lce.implementations.walk import Operands, no_values
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
    # Gradients by a mean may be too small for float16 before a scaler has enlarged them, and those by a sum too large.
    if call.summed and any(needs) and not with_means and operands.hidden.dtype != torch.float16:
        total, count, nll, peak, log_total, *_ = torch.ops.torchtune_lce.compiled_sum(
            *operands, *settings, options.label_smoothing, options.z_loss, list(needs)
        )
        nll, peak, log_total = (x.detach() for x in (nll, peak, log_total))
        return Losses(nll, peak, log_total, divisor=count.clamp(min=1), total=total)
    purpose = "means" if with_means else "directions" if any(needs) and not needs.of_entries else "losses"
    nll, peak, log_total, means, *_ = torch.ops.torchtune_lce.compiled(*operands, *settings, purpose)
    return Losses(nll, peak.detach(), log_total, means if with_means else None)


def _operator(name: str, signature: str):
    """Defines the operator, and decorates what it does: with plain tensors, whatever the caller has set."""
    torch.library.define(f"torchtune_lce::{name}", signature)

    def define(function):
        @torch.no_grad()
        def run(*arguments):
            # By what may ask for a gradient the steps would be compiled once more.
            with any_variants():
                return function(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))

        torch.library.impl(f"torchtune_lce::{name}", "default")(without_autocast(run))
        return function

    return define


# --- losses, and where all that tokens share is frozen what gradients are made of ---


@_operator(
    "compiled",
    f"({_OPERANDS}, Tensor targets, {_SETTINGS}, str purpose) -> (Tensor nll, Tensor peak, Tensor log_total, "
    "Tensor means, Tensor direction, Tensor low_direction, Tensor slope, Tensor apart)",
)
def _forward(*arguments):
    """What :func:`token_losses` returns, and as chunked's operator of this kind what gradients are made of; the latter
    empty unless the ``purpose`` is ``directions``, the mean unless it is ``means``.
    """
    operands, (targets, ignore_index, *cap, workspace_mib, purpose) = _split(arguments)
    results = _results(operands, targets, purpose)
    *numbers, mean, direction, low_direction, slope, apart = results
    to_directions = purpose == "directions"
    needs = Operands(True, False, False, low_direction.numel() > 0, False, False) if to_directions else None
    walk, all_found = Walk(operands, targets, ignore_index, workspace_mib, needs), []
    for rows in walk:
        common = rows.logits, rows.labels, operands.bias, operands.scale, Cap(*cap)
        *found, reference, factor, d_target, at_target = steps().finish(
            *steps().statistics(*common), Cap(*cap), "directions" if to_directions else "losses", 0.0, 0.0
        )
        all_found.append(found)
        if purpose == "means":
            mean[rows.at] = steps().means(*common, found[1])
        if to_directions:
            labels = rows.labels.clamp(0, operands.weight.shape[0] - 1)
            slope[rows.at] = at_target = at_target if operands.scale is None else at_target * operands.scale[labels]
            steps().write_gradient(*common, reference, factor, d_target, None)
            if low_direction.numel():
                low_direction[rows.at] = walk.wide_product(rows, operands.up, 1 / UNIT)
            made = walk.wide_product(rows, operands.weight, 1 / UNIT)
            apart[rows.at] = take_own_rows(made, operands.weight, labels, at_target)
            direction[rows.at] = made.to(direction.dtype)
    walk.put(numbers, all_found)
    return results


def _split(arguments) -> tuple[Operands, tuple]:
    return Operands(*arguments[:_COUNT]), arguments[_COUNT:]


def _numbers(operands: Operands, targets: Tensor) -> list[Tensor]:
    """Losses, peaks and log-sum-exps less these: zeros, which ignored tokens keep."""
    dtype = accumulation_dtype(operands.hidden.dtype)
    return [operands.hidden.new_zeros((targets.shape[0],), dtype=dtype) for _ in range(3)]


def _results(operands: Operands, targets: Tensor, purpose: str) -> tuple[Tensor, ...]:
    hidden, low, numbers = operands.hidden, operands.low, _numbers(operands, targets)
    like, to_directions = numbers[0], purpose == "directions"
    return (
        *numbers,
        torch.zeros_like(like) if purpose == "means" else like.new_empty(0),
        hidden.new_zeros(hidden.shape) if to_directions else hidden.new_empty(0),
        like.new_zeros(low.shape if to_directions and low is not None else 0),
        torch.zeros_like(like) if to_directions else like.new_empty(0),
        torch.zeros_like(like, dtype=torch.bool) if to_directions else like.new_empty(0, dtype=torch.bool),
    )


@torch.library.register_fake("torchtune_lce::compiled")
def _(*arguments):
    operands, (targets, *_, purpose) = _split(arguments)
    return _results(operands, targets, purpose)


@_operator(
    "compiled_backward",
    f"(Tensor? d_nll, Tensor? d_lse, Tensor? d_means, {_OPERANDS}, Tensor targets, Tensor nll, Tensor peak, "
    f"Tensor log_total, {_SETTINGS}, bool[] needs) -> ({_GRADIENTS})",
)
def _backward(d_nll, d_lse, d_means, *arguments):
    """Gradients by the operands, empty where ``needs`` has no True."""
    operands, (targets, nll, peak, log_total, ignore_index, *cap, workspace_mib, needs) = _split(arguments)
    cap = Cap(*cap)
    d_target, d_softmax = by_target_and_others(
        torch.zeros_like(nll) if d_nll is None else d_nll, d_lse, nll, cap.logit_scale
    )
    d_means = None if d_means is None else d_means * cap.logit_scale
    factor = d_softmax * torch.exp(-log_total)

    def by_logits(rows):
        return *(x[rows.at] for x in (peak, factor, d_target)), None if d_means is None else d_means[rows.at]

    needs = Operands(*needs)
    return gradients(Walk(operands, targets, ignore_index, workspace_mib, needs), needs, cap, by_logits)


@torch.library.register_fake("torchtune_lce::compiled_backward")
def _(d_nll, d_lse, d_means, *arguments):
    return no_values(Operands(*arguments[:_COUNT]), arguments[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ignore_index, softcap, logit_scale, workspace_mib, ctx.purpose = inputs
    ctx.set_materialize_grads(False)
    nll, peak, log_total, _, *directions = output
    ctx.save_for_backward(*tensors, nll, peak, log_total, *directions)
    ctx.settings = ignore_index, softcap, logit_scale, workspace_mib


def _differentiate(ctx, d_nll, _, d_lse, d_means, *__):
    operators, (operands, others) = torch.ops.torchtune_lce, _split(ctx.saved_tensors)
    targets, nll, peak, log_total, *directions, slope, apart = others
    needs = Operands(*ctx.needs_input_grad[:_COUNT])
    # A second derivative is refused by the operator that says whose it is.
    if ctx.purpose == "directions" and not needs.of_entries and not torch.is_grad_enabled():
        ignore_index, _, *settings = ctx.settings

        def along(*direction):
            upstream = d_nll, d_lse, nll, slope, targets
            return operators.chunked_along_directions(*upstream, *direction, ignore_index, *settings)

        d_hidden = along(directions[0], apart, operands.weight) if needs.hidden else None
        d_low = along(directions[1], None, operands.up) if needs.low else None
        return d_hidden, None, None, d_low, *[None] * 8
    d_means = d_means if ctx.purpose == "means" else None
    arguments = *operands, targets, nll, peak, log_total, *ctx.settings, list(needs)
    return *_needed(operators.compiled_backward(d_nll, d_lse, d_means, *arguments), needs), *[None] * 6


def _needed(found, needs) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


# --- a sum, with the gradients by its mean ---


@_operator(
    "compiled_sum",
    f"({_OPERANDS}, Tensor targets, {_SETTINGS}, float label_smoothing, float z_loss, bool[] needs) "
    f"-> (Tensor total, Tensor count, Tensor nll, Tensor peak, Tensor log_total, {_GRADIENTS})",
)
def _sum(*arguments):
    """The sum of :attr:`torchtune_lce.inputs.losses.Losses.total`, the number of tokens in use, what the sum is made
    of, and gradients by the mean, empty where ``needs`` has no True.
    """
    operands, (targets, ignore_index, *cap, workspace_mib, smoothing, z_loss, needs) = _split(arguments)
    cap = Cap(*cap)
    numbers, needs, all_found = _numbers(operands, targets), Operands(*needs), []

    def by_logits(rows):
        common = rows.logits, rows.labels, operands.bias, operands.scale, cap
        *found, reference, factor, d_target, _ = steps().finish(
            *steps().statistics(*common), cap, "sum", smoothing, z_loss
        )
        all_found.append(found)
        return reference, factor, d_target, None

    walk = Walk(operands, targets, ignore_index, workspace_mib, needs)
    # Of the mean: a sum that is scaled later would be rounded twice.
    found = gradients(walk, needs, cap, by_logits, factor=1 / max(walk.tokens, 1))
    walk.put(numbers, all_found)
    nll, peak, log_total = numbers
    total = (1 - smoothing) * nll.sum()
    # Nothing times what may be infinite would not be nothing.
    if smoothing:
        total += smoothing * log_total.sum()
    if z_loss:
        total += z_loss * (peak + log_total).square().sum()
    return total, torch.full((), walk.tokens, device=targets.device), *numbers, *found


@torch.library.register_fake("torchtune_lce::compiled_sum")
def _(*arguments):
    operands, (targets, *_, needs) = _split(arguments)
    numbers = _numbers(operands, targets)
    count = targets.new_empty((), dtype=torch.int64)
    return numbers[0].new_empty(()), count, *numbers, *no_values(operands, needs)


def _setup_context_of_sum(ctx, inputs, output) -> None:
    # The gradients are outputs too, for which zeros would be made.
    ctx.set_materialize_grads(False)
    *tensors, ignore_index, softcap, logit_scale, workspace_mib, smoothing, z_loss, ctx.needs = inputs
    _, count, nll, peak, log_total, *found = output
    ctx.save_for_backward(*tensors, count, nll, peak, log_total, *found)
    ctx.settings = ignore_index, softcap, logit_scale, workspace_mib
    ctx.terms = smoothing, z_loss
    # Written to by a backward, and given away.
    ctx.spent = False


def _differentiate_sum(ctx, d_total, *_):
    operators, (operands, others) = torch.ops.torchtune_lce, _split(ctx.saved_tensors)
    targets, count, nll, peak, log_total, *found = others
    needs = list(ctx.needs_input_grad[:_COUNT])
    if torch.is_grad_enabled():
        # For a second derivative, which this operator refuses when it is asked for.
        by_token = (x if x is None else d_total * x for x in by_sum(peak + log_total, *ctx.terms))
        arguments = *operands, targets, nll, peak, log_total, *ctx.settings, needs
        found = operators.compiled_backward(*by_token, None, *arguments)
    else:
        if ctx.spent or any(need and not made for need, made in zip(needs, ctx.needs, strict=True)):
            # Once more over the same graph; or vmap, inside which nothing seems to ask for a gradient.
            found = operators.compiled_sum(*operands, targets, *ctx.settings, *ctx.terms, needs)[-_COUNT:]
        # Of ignored tokens nothing, whatever d_total is; infinite, where it was divided by the number of all others.
        factor = (d_total * count).where(count > 0, 0)
        of_tokens = factor.where(targets != ctx.settings[0], 0)[:, None]
        factors = Operands(*[factor] * _COUNT)._replace(hidden=of_tokens, low=of_tokens)
        # A tracer may not write to what the forward has returned, and many upstream gradients need as many results.
        in_place = all(map(is_writable, (d_total, *found)))
        ctx.spent = ctx.spent or in_place
        found = [
            _scaled(made, by, in_place, ctx.settings[-1]) if need else made
            for made, by, need in zip(found, factors, needs, strict=True)
        ]
    return *_needed(found, needs), *[None] * 8


def _scaled(made: Tensor, factor: Tensor, in_place: bool, workspace_mib: int) -> Tensor:
    """``made`` [n, ...] times ``factor``, [] or [n, 1] in the accumulation dtype, which is not rounded."""
    # A factor without an axis would be rounded to 16 bits on a card.
    by = factor.expand(made.shape[0], *[1] * (made.ndim - 1))
    if not in_place:
        return (made * by).to(made.dtype)
    # To multiply two dtypes a CPU widens what it reads and what it writes, all of it.
    rows = max(workspace_mib * 2**20 // (2 * by.itemsize * made.shape[1:].numel()), 1)
    # By its data, or torch would refuse another backward, as what was saved has been written to.
    for part, some in zip(made.data.split(rows), by.split(rows), strict=True):
        part.mul_(some)
    return made.data


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(f"impl='torch_compile' has no second derivative (create_graph=True); set {TWICE_DIFFERENTIABLE}")


torch.library.register_autograd("torchtune_lce::compiled", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::compiled_sum", _differentiate_sum, setup_context=_setup_context_of_sum)
torch.library.register_autograd("torchtune_lce::compiled_backward", _refuse_second_derivative)
