"""Whether a loss and its gradients are right, before anybody looks at how fast they are."""

from dataclasses import astuple

import torch
from torch import Tensor

from torchtune_lce.commands.bench import divergence_yardstick
from torchtune_lce.commands.bench.teacher_batches import NEAR, TeacherShape, teacher_batch
from torchtune_lce.commands.shared.batches import IGNORE_INDEX, Batch, random_batch
from torchtune_lce.commands.shared.candidates import Candidate, Loss
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.trained_batches import trained_batch
from torchtune_lce.commands.shared.yardstick import UNFILTERED, Errors, Yardstick, measure, relative_error
from torchtune_lce.inputs.options import Options

# Ragged in every size, for losses that take any; then one that every kernel's alignment allows.
RAGGED, ALIGNED = Shape(200, 72, 1003), Shape(256, 128, 2048)
# For losses that filter: most of its tiles go, at a threshold that fits so small a vocabulary. No target is ignored: a
# tile of ignored tokens alone counts as left out.
PEAKED, PEAKED_EPS = Shape(320, 128, 4003), 2.0**-8
PEAKED_INTERPRETED = Shape(64, 64, 1000)
RANDOM, TRAINED = "random", "trained-like"
_LESS_WIDE = 16  # features that a teacher lacks


def checks(candidate: Candidate) -> list[tuple[str, dict]]:
    """Small data that it must be right on, and the settings of the loss for them."""
    if candidate.objective is not None:
        return [(RANDOM, {}), (NEAR, {})]
    filters = candidate.ours and candidate.filtering != UNFILTERED
    return [(RANDOM, {}), (TRAINED, {"filter_eps": PEAKED_EPS})] if filters else [(RANDOM, {})]


def small_batch(candidate: Candidate, data: str, dtype: torch.dtype, device: torch.device) -> Batch:
    """Random, or near its teacher: every seventh target ignored, if the loss takes any size; else aligned, all targets
    in use.
    """
    if data == TRAINED:
        return trained_batch(PEAKED_INTERPRETED if device.type == "cpu" else PEAKED, dtype, device)
    shape = RAGGED if candidate.any_size else ALIGNED
    if candidate.objective is None:
        batch = random_batch(shape, dtype, device)
    else:
        width = shape.hidden if data == NEAR else shape.hidden - _LESS_WIDE
        batch = teacher_batch(data, TeacherShape(*astuple(shape), width), dtype, device)
    if candidate.any_size:
        batch.targets[::7] = IGNORE_INDEX
    return batch


def yardstick(batch: Batch, candidates: list[Candidate], settings: dict | None = None) -> Yardstick:
    """For all ``candidates`` on ``batch``, which have one objective; ``settings`` go before their own.

    Of thresholds of a filter the largest counts.
    """
    objective = candidates[0].objective
    if objective is not None:
        return divergence_yardstick.measure(batch, objective)
    thresholds = [
        Options(**candidate.settings | (settings or {})).resolved_filter_eps(batch.hidden.dtype, True)
        for candidate in candidates
        if candidate.ours and candidate.filtering != UNFILTERED
    ]
    return measure(batch, max((eps for eps in thresholds if eps is not None), default=None))


def gradients(loss: Loss, batch: Batch, frozen_weight: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradient by hidden and, unless frozen, by weight."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen_weight)
    value = loss(hidden, weight, *batch.others)
    return value.detach(), torch.autograd.grad(value, [hidden] if frozen_weight else [hidden, weight])


def errors(value: Tensor, grads: tuple[Tensor, ...], right: Yardstick) -> Errors:
    """Of the mean loss and its gradients."""
    d_weight = relative_error(grads[1], right.d_weight) if len(grads) > 1 else None
    loss = abs(value.item() - right.loss) / max(abs(right.loss), 1e-6)
    return Errors(loss, relative_error(grads[0], right.d_hidden), d_weight)


def allowed(candidate: Candidate, right: Yardstick) -> Errors:
    """The most that :class:`Errors` may be: :meth:`Yardstick.allowed`, and more for other people's own kernels.

    Those sum gradients in the inputs' dtype and filter in ways of their own, with no bound on what goes: gross mistakes
    are to be caught, accuracy is in the results. Eight roundings to the dtype, 64 where it is float32; filtering leaves
    out entries below ``eps / 32`` whose sum is at most 1, so their squares add up to at most that: three times its
    root, since tokens that are predicted well have gradients smaller than 1. Their loss may be rounded to the dtype.
    """
    if right.rounded is not None and not candidate.ours:
        right = right.rounded
    bound = right.allowed(candidate.filtering, of_mean=True)
    if candidate.requires is None:
        return bound
    eps = torch.finfo(right.dtype).eps
    filters = candidate.filtering != UNFILTERED
    gradient = (64 if right.dtype == torch.float32 else 8) * eps + (3 * (eps / 32) ** 0.5 if filters else 0.0)
    return Errors(bound.loss + eps, max(bound.hidden, gradient), max(bound.weight, gradient))


def complaint(found: Errors, most: Errors) -> str | None:
    """What is wrong with the errors ``found``, or None."""
    if found.within(most):
        return None
    names = {"loss": "loss", "hidden": "hidden's gradient", "weight": "weight's gradient"}
    parts = [f"{names[name]} {error:.1e} ({getattr(most, name):.1e} allowed)" for name, error in found.parts.items()]
    return f"wrong: {', '.join(parts)}"
