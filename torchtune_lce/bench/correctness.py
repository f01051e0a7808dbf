"""Whether a loss and its gradients are right, before anybody looks at how fast they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_lce.bench.data import IGNORE_INDEX, Batch, random_batch
from torchtune_lce.bench.losses import Candidate, Loss
from torchtune_lce.bench.shapes import Shape

# Ragged in every size, for losses that take any; then one that every kernel's alignment allows.
RAGGED, ALIGNED = Shape(200, 72, 1003), Shape(256, 128, 2048)
_REFERENCE_LOGITS = 2**27  # held at a time


@dataclass(frozen=True)
class Exact:
    """Mean loss and its gradients in a wider dtype, from the inputs as they were rounded."""

    loss: float
    d_hidden: Tensor
    d_weight: Tensor


@dataclass(frozen=True)
class Errors:
    """Relative: of the loss, and in the Frobenius norm of the gradients; None for a frozen weight."""

    loss: float
    hidden: float
    weight: float | None

    @property
    def worst(self) -> float:
        """NaN as soon as one is."""
        errors = [error for error in (self.loss, self.hidden, self.weight) if error is not None]
        return next((error for error in errors if error != error), max(errors))


def small_batch(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> Batch:
    """Random data with every seventh target ignored, if the loss takes any size; else aligned, all targets in use."""
    batch = random_batch(RAGGED if candidate.any_size else ALIGNED, dtype, device)
    if candidate.any_size:
        batch.targets[::7] = IGNORE_INDEX
    return batch


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in the reference, whatever the process has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def exact(batch: Batch) -> Exact:
    """In float64 for float32 inputs, else in float32, over chunks of tokens."""
    dtype = torch.float64 if batch.hidden.dtype in (torch.float32, torch.float64) else torch.float32
    weight = batch.weight.to(dtype)
    d_hidden = torch.empty_like(batch.hidden, dtype=dtype)
    d_weight = torch.zeros_like(weight)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    count = (batch.targets != IGNORE_INDEX).sum().clamp(min=1)
    step = max(_REFERENCE_LOGITS // weight.shape[0], 1)
    with _full_float32():
        for start in range(0, batch.shape.tokens, step):
            hidden = batch.hidden[start : start + step].to(dtype)
            targets = batch.targets[start : start + step]
            rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
            logits = hidden @ weight.T
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse[rows, 0] - logits[rows, targets[rows]]).sum()
            d_logits = logits.sub_(lse).exp_()
            d_logits[rows, targets[rows]] -= 1
            d_logits.mul_((targets != IGNORE_INDEX)[:, None]).div_(count)
            torch.mm(d_logits, weight, out=d_hidden[start : start + step])
            d_weight.addmm_(d_logits.T, hidden)
    return Exact((total / count).item(), d_hidden, d_weight)


def gradients(loss: Loss, batch: Batch, frozen_weight: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradient by hidden and, unless frozen, by weight."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen_weight)
    value = loss(hidden, weight, batch.targets)
    return value.detach(), torch.autograd.grad(value, [hidden] if frozen_weight else [hidden, weight])


def errors(value: Tensor, grads: tuple[Tensor, ...], right: Exact) -> Errors:
    d_weight = relative_error(grads[1], right.d_weight) if len(grads) > 1 else None
    loss = abs(value.item() - right.loss) / max(abs(right.loss), 1e-6)
    return Errors(loss, relative_error(grads[0], right.d_hidden), d_weight)


def relative_error(actual: Tensor, right: Tensor) -> float:
    """||actual - right|| / ||right||, by slices, since a weight's gradient in float64 is large."""
    squares = torch.zeros(2, dtype=torch.float64, device=right.device)
    for a, r in zip(actual.split(8192), right.split(8192), strict=True):
        squares[0] += (a.to(r.dtype) - r).square().sum(dtype=torch.float64)
        squares[1] += r.square().sum(dtype=torch.float64)
    return (squares[0] / squares[1]).sqrt().item()


def tolerance(candidate: Candidate, dtype: torch.dtype) -> float:
    """The most that :class:`Errors` may show: gross mistakes are to be caught, accuracy is in the results.

    Eight roundings to ``dtype``, 64 where it is float32, whose long sums add up more. Filtering leaves out entries
    below ``eps / 32`` whose sum is at most 1, so their squares add up to at most that: three times its root, since
    tokens that are predicted well have gradients smaller than 1.
    """
    eps = torch.finfo(dtype).eps
    rounding = (64 if dtype in (torch.float32, torch.float64) else 8) * eps
    return rounding + (3 * (eps / 32) ** 0.5 if candidate.filters else 0.0)


def complaint(candidate: Candidate, found: Errors, dtype: torch.dtype) -> str | None:
    """What is wrong with the errors ``found``, or None."""
    allowed = tolerance(candidate, dtype)
    # Written so that a NaN is wrong.
    if found.worst <= allowed:
        return None
    weight = "" if found.weight is None else f", weight's gradient {found.weight:.1e}"
    return f"wrong: loss {found.loss:.1e}, hidden's gradient {found.hidden:.1e}{weight}, allowed {allowed:.1e}"
