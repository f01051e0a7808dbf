"""What an implementation returns for a call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Of each token, [N] each in the accumulation dtype, 0 where ignored.

    The peak is the largest logit, 0 where that is not finite, and has no gradient. It stands apart because it may be
    large where all logits share a value, and a sum with it would be rounded at its size. An implementation may return
    another value less than 70 below the log-sum-exp in its place, so that exp of the difference is finite.

    For a call that is ``summed`` an implementation may return a ``total`` that is differentiable where the others then
    are not. With label smoothing s and z-loss z it is the sum of (1 - s) nll + s log_total + z lse squared.
    """

    nll: Tensor  # negative log-likelihood
    peak: Tensor
    log_total: Tensor  # log-sum-exp of the logits, less the peak
    mean: Tensor | None = None  # of the logits, less the peak; with label smoothing
    divisor: Tensor | None = None  # [] integer: tokens in use, 1 if there are none; from those that have it at hand
    total: Tensor | None = None  # []; from those that make gradients with the losses, and take any label
    entropy: Tensor | None = None  # of the prediction, in nats, without gradient; from those that have it where wanted
