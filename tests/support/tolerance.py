"""How wrong a result may be: torch's own error at that dtype, and what rounding must cost. No constant is made to fit.

Every quantity is compared with plain PyTorch in float64 on the same, already quantised, inputs. An implementation may
be twice as far from it as plain PyTorch is in the inputs' own dtype, plus a bound on rounding and on gradient filtering
that :func:`allowances` derives, element by element, from the exact values: small entries get small allowances.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """The arguments of linear_cross_entropy that change its value."""

    ignore_index: int = -100
    reduction: str = "mean"
    softcap: float | None = None
    shift: int = 0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Upstream:
    """Gradients that arrive at the two results; None where a result takes no part."""

    loss: Tensor | None
    lse: Tensor | None


@dataclass(frozen=True)
class Plain:
    """Results of plain PyTorch, and what the bounds are derived from. M tokens are left after the shift."""

    results: dict[str, Tensor]  # loss, lse, and gradients by the name of their input
    logits: Tensor  # [M, V], before softcap and scale
    d_logits: Tensor  # [M, V], gradient by them
    d_nll: Tensor  # [M], gradient by a token's cross-entropy
    d_lse: Tensor  # [M]
    d_sum: Tensor  # [M], by the sum of its logits
    d_token: Tensor  # [M], by its loss, which is made of these three
    hidden: Tensor  # [M, D]
    nll: Tensor  # [M]
    token_losses: Tensor  # [M]
    labels: Tensor  # [M]
    rows: Tensor  # [M], where these tokens stand in the flattened hidden


def plain_torch(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None,  # [V]
    settings: Settings,
    upstream: Upstream,
    dtype: torch.dtype,
) -> Plain:
    """F.linear and F.cross_entropy in ``dtype``, their losses in at least float32, with every gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: x.detach().to(dtype).contiguous().requires_grad_() for name, x in leaves.items() if x is not None}
    kept = slice(None, -settings.shift or None)
    numbers = torch.arange(targets.numel(), device=targets.device).reshape(targets.shape)
    labels, rows, states = targets.long(), numbers, leaves["hidden"]
    if settings.shift:
        labels, rows, states = labels[..., settings.shift :], numbers[..., kept], states[..., kept, :]
    shape = labels.shape
    labels, rows, states = labels.reshape(-1), rows.reshape(-1), states.reshape(-1, hidden.shape[-1])

    logits = F.linear(states, leaves["weight"], leaves.get("bias")).to(wide)
    capped = logits if settings.softcap is None else settings.softcap * torch.tanh(logits / settings.softcap)
    capped = capped * settings.logit_scale
    nll = F.cross_entropy(capped, labels, ignore_index=settings.ignore_index, reduction="none")
    lse = capped.logsumexp(-1).masked_fill(labels == settings.ignore_index, 0)
    logit_sum = capped.sum(-1).masked_fill(labels == settings.ignore_index, 0)
    smoothing = settings.label_smoothing
    losses = nll
    # Not nothing times what may be infinite.
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (lse - logit_sum / logits.shape[1])
    if settings.z_loss:
        losses = losses + settings.z_loss * lse.square()
    for tensor in (logits, nll, lse, logit_sum, losses):
        tensor.retain_grad()

    lost = (targets.shape[-1] - shape[-1], 0) if settings.shift else ()
    results = {
        "loss": {
            "none": F.pad(losses.reshape(shape), lost),
            "sum": losses.sum(),
            "mean": losses.sum() / (labels != settings.ignore_index).sum().clamp(min=1),
        }[settings.reduction],
        "lse": F.pad(lse.reshape(shape), lost),
    }
    pulled = [(results[name], gradient) for name, gradient in vars(upstream).items() if gradient is not None]
    torch.autograd.backward([result for result, _ in pulled], [g.to(result.dtype) for result, g in pulled])
    # Not every leaf is reached: an upstream of zeros for a result without tokens reaches none.
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    by_tensor = (torch.zeros_like(x) if x.grad is None else x.grad for x in (logits, nll, lse, logit_sum, losses))
    results = {name: result.detach() for name, result in results.items()} | grads
    values = states.detach(), nll.detach(), losses.detach()
    return Plain(results, logits.detach(), *by_tensor, *values, labels, rows)


def allowances(
    exact: Plain,  # in float64
    weight: Tensor,
    bias: Tensor | None,
    settings: Settings,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    filter_eps: float | None = None,
    filtered: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Bounds on the error of each result, in its shape, to first order in the rounding unit.

    Logits are rounded to ``logits_dtype``; softmax entries below ``filter_eps`` may be missing from the gradients named
    in ``filtered``, or in that of hidden be replaced by their mean.
    """
    wide = torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(wide).eps
    hidden, weight = exact.hidden.abs(), weight.detach().double().abs()
    magnitude = hidden @ weight.T + (0 if bias is None else bias.detach().double().abs())
    d_logit = sum_error(hidden.shape[1], wide) * magnitude
    # The same in forward and backward, unlike the error of the sums, which may be taken in another order there.
    # F.linear rounds what it has added the bias to, `chunked` the product that it adds a bias to.
    product = exact.logits if bias is None else exact.logits - bias.detach().double()
    rounded = rounding(torch.maximum(exact.logits.abs(), product.abs()), logits_dtype)
    capped, slope, d_slope = exact.logits, 1.0, 0.0
    if settings.softcap is not None:
        capped = settings.softcap * torch.tanh(exact.logits / settings.softcap)
        slope = 1 - (capped / settings.softcap).square()
        # 2 sigmoid(2x) - 1 takes four roundings of values up to 2.
        d_logit = d_logit + 8 * eps * settings.softcap
        d_slope = 2 * (d_logit + rounded) / settings.softcap + 4 * eps
    # What follows is of scaled logits, and its slope the derivative by what they are before cap and scale.
    scale = settings.logit_scale
    capped, d_logit, rounded, slope, d_slope = (scale * x for x in (capped, d_logit, rounded, slope, d_slope))
    softmax = capped.softmax(-1)
    target = exact.labels.where(exact.labels != settings.ignore_index, 0)[:, None]
    # The exponent of each term is rounded, in base e or 2, then the sum and its logarithm.
    exponent = capped.abs() + capped.amax(-1, keepdim=True).abs()
    d_lse = (softmax * (d_logit + 2 * eps * exponent)).sum(-1) + 4 * eps * (1 + capped.logsumexp(-1).abs())
    d_nll = d_lse + d_logit.gather(-1, target)[:, 0] + eps * (capped.gather(-1, target)[:, 0].abs() + exact.nll.abs())
    # What rounded logits r move in log softmax_v, r_v - sum of p r: its own r counted once, so small where p is near 1.
    by_rounded = (softmax * rounded).sum(-1, keepdim=True)
    moved = (1 - 2 * softmax) * rounded + by_rounded
    d_softmax = (exact.d_nll + exact.d_lse).abs()[:, None]
    error = softmax * (d_logit + d_lse[:, None] + 2 * eps * exponent + 8 * eps + moved)
    error *= d_softmax * slope
    error += eps * exact.d_nll.abs()[:, None] * F.one_hot(target[:, 0], capped.shape[1]) * slope
    # Where the softcap is saturated the slope itself is rounding noise.
    before_slope = softmax * d_softmax + exact.d_nll.abs()[:, None] * F.one_hot(target[:, 0], capped.shape[1])
    uniform = exact.d_sum.abs()[:, None]
    error += (before_slope + uniform) * d_slope
    # A log-sum-exp's gradient, which the z-loss makes of it, and the sum of those that belong to the softmax.
    z_gradient = 2 * settings.z_loss * exact.d_token.abs()
    d_lse_rounded = d_lse + by_rounded[:, 0]
    parts = z_gradient * d_lse_rounded + 4 * eps * (exact.d_nll.abs() + exact.d_lse.abs() + z_gradient)
    error += softmax * slope * parts[:, None] + 4 * eps * slope * uniform

    dropped = torch.zeros_like(softmax)
    if filter_eps is not None:
        # The implementation compares its own rounded softmax.
        dropped = (softmax * d_softmax * slope).where(softmax < filter_eps * (1 + 2**-8), 0)
    tokens, vocabulary = softmax.shape
    # The uniform part may be summed on its own.
    summed = exact.d_logits.abs() + uniform * slope
    by_hidden = error + sum_error(vocabulary, wide) * summed + (dropped if "hidden" in filtered else 0)
    by_weight = error + sum_error(tokens, wide) * summed + (dropped if "weight" in filtered else 0)
    # Rounded to the inputs' dtype for the product, and a piece of the sum rounded to it once more.
    twice = 2**0.5 * rounding(exact.d_logits, dtype)
    # In place of what is dropped comes as much of the dropped rows' mean, which may point elsewhere, and which is told
    # by the difference between 1 and a sum.
    rounded_sum = 4 * eps * d_softmax
    instead = (dropped.sum(-1, keepdim=True) + rounded_sum) * weight.max(0).values if "hidden" in filtered else 0
    bounds = {
        "hidden": by_hidden @ weight + instead + independent_errors(twice, weight),
        "weight": by_weight.T @ hidden + independent_errors(twice.T, hidden),
        "bias": by_weight.sum(0) + independent_errors(twice.T, torch.ones_like(hidden[:, :1]))[:, 0],
    }
    if settings.label_smoothing:
        # Rounded on its own too, and so is what it is added to.
        parts = {
            "hidden": scale * uniform * weight.sum(0),
            "weight": scale * (uniform * hidden).sum(0),
            "bias": scale * uniform.sum(),
        }
        bounds = {name: bound + 2 * rounding(parts[name], dtype) for name, bound in bounds.items()}
    bounds["hidden"] = _scatter(bounds["hidden"], exact.rows, exact.results["hidden"])
    for name in exact.results.keys() & bounds.keys():
        bounds[name] = bounds[name] + rounding(exact.results[name], dtype)
    d_nll = d_nll + moved.gather(-1, target)[:, 0]
    d_loss = d_nll
    if settings.label_smoothing or settings.z_loss:
        lse = capped.logsumexp(-1).abs()
        d_sum = (d_logit + rounded + sum_error(vocabulary, wide) * scale * magnitude).sum(-1)
        share, z_loss = settings.label_smoothing, settings.z_loss
        d_loss = (1 - share) * d_nll + share * (d_lse_rounded + d_sum / vocabulary) + 2 * z_loss * lse * d_lse_rounded
        size = exact.nll.abs() + lse + share * capped.mean(-1).abs() + z_loss * lse.square()
        d_loss = d_loss + 4 * eps * size
    total = d_loss.sum() + sum_error(tokens, wide) * exact.token_losses.abs().sum()
    kept = (exact.labels != settings.ignore_index).sum().clamp(min=1)
    shift = min(settings.shift, exact.results["lse"].shape[-1]) if exact.results["lse"].ndim else 0
    per_token = {"none": _at_targets(d_loss, exact, shift), "sum": total, "mean": total / kept}
    bounds["loss"] = per_token[settings.reduction]
    bounds["lse"] = _at_targets(d_lse + by_rounded[:, 0], exact, shift)
    return bounds


def sum_error(length: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of ``length`` products: 4 sqrt(n) roundings of half an eps.

    The errors of the terms are independent, so they grow with the root of their number, and four standard deviations
    hold for all entries of the sizes tested here (Higham and Mary 2019, "A new approach to probabilistic rounding error
    analysis").
    """
    return 4 * max(length, 1) ** 0.5 * torch.finfo(dtype).eps / 2


def independent_errors(errors: Tensor, matrix: Tensor) -> Tensor:
    """Error of ``values @ matrix`` where each value was rounded, ``errors`` being the most that it can be off.

    Rounding errors are uniform, so their standard deviation is that over the root of 3: six of these, or all at their
    worst where that is less.
    """
    six_deviations = 6 / 3**0.5 * (errors.square() @ matrix.square()).sqrt()
    return torch.minimum(six_deviations, errors @ matrix)


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of rounding to ``dtype``: half an eps of the value, half a step where it is subnormal."""
    info = torch.finfo(dtype)
    return (values.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)


def assert_as_accurate_as_torch(name: str, actual: Tensor, native: Tensor, exact: Tensor, allowance: Tensor) -> None:
    """Fails unless ``|actual - exact| <= 2 max|native - exact| + allowance``, the max over the last axis.

    The max is taken over a row since plain PyTorch is sometimes right by luck in a single entry.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if not exact.numel():
        return
    error = (actual.double() - exact).abs()
    natively = (native.double() - exact).abs()
    natively = natively.amax(-1, keepdim=True) if natively.ndim > 1 else natively.max()
    allowed = 2 * natively + allowance
    # Written so that a NaN fails.
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = (error - allowed).nan_to_num(nan=torch.inf).argmax()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {error.numel()} entries are further from float64 than allowed; "
            f"the worst, number {worst.item()}, is {actual.flatten()[worst].item():.6g} where "
            f"{exact.flatten()[worst].item():.6g} is right: an error of {error.flatten()[worst].item():.3g}, "
            f"allowed {allowed.expand_as(error).flatten()[worst].item():.3g}"
        )


def _scatter(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Rows of ``values`` at their places in a zero tensor shaped as ``like``, [..., D]."""
    flat = torch.zeros(like.numel() // like.shape[-1], like.shape[-1], dtype=values.dtype, device=values.device)
    flat[rows] = values
    return flat.reshape(like.shape)


def _at_targets(values: Tensor, exact: Plain, shift: int) -> Tensor:
    """Values of the M tokens in the shape of targets, 0 where shifted off."""
    shape = exact.results["lse"].shape
    if not shift:
        return values.reshape(shape)
    return F.pad(values.reshape(*shape[:-1], shape[-1] - shift), (shift, 0))
