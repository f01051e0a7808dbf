"""What a loss and its gradients are held against, and how far from it they may be.

Against: the same in a wider dtype, from the inputs as they were rounded. How far depends on the data, so it is measured
on them: PyTorch's own error in the inputs' dtype, and what the strictest filter costs, which leaves out every softmax
entry below the threshold where the kernels keep tiles whole that hold a larger one. See :meth:`Yardstick.allowed`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.commands.shared.batches import IGNORE_INDEX, Batch
from torchtune_lce.inputs.filtering import UNFILTERED, Filtering

# Where the entries that would go hold more than this of the softmax, in the mean of a block of tokens, none of them do.
_MOST_DROPPED, _BLOCK = 0.25, 128
_LOGITS = 2**26  # held at a time, several times over
# Norms of many independent roundings are alike in any order of the sums, to a few percent. 1.25 still tells a gradient
# that is summed in bfloat16, in 64 pieces, from one that is not.
_ORDER = 1.25
# What a float32 log-sum-exp, its exponential and a target's logit are off by, in eps of the log-sum-exp.
_FLOAT32_ROUNDINGS = 4
_DEVIATIONS = 4  # of a mean of independent errors: one batch in ten thousand has more


@dataclass(frozen=True)
class Errors:
    """Relative; in the Frobenius norm of the gradients. ``weight`` None for a frozen one."""

    loss: float
    hidden: float
    weight: float | None

    @property
    def parts(self) -> dict[str, float]:
        return {name: error for name, error in vars(self).items() if error is not None}

    def within(self, allowed: "Errors") -> bool:
        # Written so that a NaN is not.
        return all(error <= getattr(allowed, name) for name, error in self.parts.items())


@dataclass(frozen=True)
class Yardstick:
    """Of one batch. Gradients are of the mean loss; "exact" is float64, or float32 beside inputs of 16 bits.

    ``own`` are PyTorch's errors and ``filtered`` the strictest filter's, their losses' taken over tokens:
    ||actual - exact|| / ||exact||. ``own_mean`` is the relative error of PyTorch's mean loss.
    """

    dtype: torch.dtype  # of the inputs
    token_losses: Tensor  # [tokens in use] exact
    d_hidden: Tensor  # [N, D] exact
    d_weight: Tensor  # [V, D] exact
    own: Errors
    own_mean: float
    filtered: Errors
    condition: float  # largest |log-sum-exp| over the losses' root mean square, at least 1
    rounded: "Yardstick | None" = None  # for those whose logits are rounded to ``dtype``, where others' may not be

    @property
    def loss(self) -> float:
        """Mean."""
        return self.token_losses.mean(dtype=torch.float64).item() if self.token_losses.numel() else 0.0

    def allowed(self, filtering: Filtering = UNFILTERED, of_mean: bool = False) -> Errors:
        """The most that an implementation's errors may be, of its tokens' losses or, ``of_mean``, of their mean.

        Gradients: PyTorch's own error, one more rounding of the result, at most eps / 2, and what the strictest filter
        costs a gradient that is filtered. They are independent, so their squares add up.

        Losses: PyTorch's own error. In the mean of N tokens independent errors shrink by the root of N: four standard
        deviations, and what PyTorch's mean is off by, where the errors of tokens have something in common.

        To each, roundings in float32: of a log-sum-exp, which are large beside the small loss and gradient of a
        confident row, and of a sum over N tokens, a random walk of N steps.
        """
        float32 = torch.finfo(torch.float32).eps
        tokens = max(self.token_losses.numel(), 1)
        rms = self.token_losses.square().mean(dtype=torch.float64).sqrt().item() if self.token_losses.numel() else 0.0
        small = float32 * (_FLOAT32_ROUNDINGS * self.condition + tokens**0.5)
        if of_mean:
            to_mean = rms / max(self.loss, torch.finfo(torch.float32).tiny)
            loss = _ORDER * self.own_mean + (_DEVIATIONS * self.own.loss / tokens**0.5 * to_mean) + small * to_mean
        else:
            loss = _ORDER * self.own.loss + small
        rounding = torch.finfo(self.dtype).eps / 2

        def gradient(own: float, filtered: float) -> float:
            return _ORDER * (own**2 + rounding**2 + filtered**2) ** 0.5 + small

        return Errors(
            loss,
            gradient(self.own.hidden, self.filtered.hidden if filtering.hidden else 0.0),
            gradient(self.own.weight, self.filtered.weight if filtering.weight else 0.0),
        )


@torch.no_grad()
def measure(batch: Batch, filter_eps: float | None = None, wide: torch.dtype | None = None) -> Yardstick:
    """By chunks of tokens. ``filter_eps`` None: nothing is filtered; ``wide`` None: float64 beside float32, else that.

    PyTorch is F.linear and F.cross_entropy on float32 logits, differentiated. Its weight's gradient is summed wide over
    the chunks: what one float32 sum over all tokens is off by besides is in :meth:`Yardstick.allowed`.
    """
    dtype = batch.hidden.dtype
    wide = wide or (torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32)
    weight = batch.weight.to(wide)
    d_hidden = torch.zeros_like(batch.hidden, dtype=wide)
    d_weight, own_weight = torch.zeros_like(weight), torch.zeros_like(weight)
    filtered_weight = None if filter_eps is None else torch.zeros_like(weight)
    rows = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    token_losses, own_losses, lses = (torch.zeros(len(rows), dtype=wide, device=rows.device) for _ in range(3))
    own_hidden = torch.zeros((), dtype=torch.float64, device=rows.device)  # square
    tail = _Tail(batch.hidden)
    step = max(_LOGITS // weight.shape[0] // _BLOCK, 1) * _BLOCK
    with full_float32():
        for start in range(0, len(rows), step):
            part, at = slice(start, start + step), rows[start : start + step]
            narrow, targets = batch.hidden[at], batch.targets[at][:, None]
            hidden = narrow.to(wide)
            logits = hidden @ weight.T
            lses[part] = logits.logsumexp(-1)
            token_losses[part] = lses[part] - logits.gather(1, targets)[:, 0]
            softmax = logits.sub_(lses[part, None]).exp_()
            if filter_eps is not None:
                left_out = left_out_by_filter(softmax, targets, filter_eps).div_(len(rows))
                tail.add(left_out.sum(1), left_out @ weight)
                filtered_weight.addmm_(left_out.T, hidden)
                del left_out
            d_logits = softmax.scatter_add_(1, targets, softmax.new_full(targets.shape, -1)).div_(len(rows))
            d_part = d_logits @ weight
            d_hidden[at] = d_part
            d_weight.addmm_(d_logits.T, hidden)
            del logits, softmax, d_logits
            own_losses[part], own_part, own_weight_part = plain_torch(narrow, batch.weight, targets[:, 0], len(rows))
            own_hidden += (own_part - d_part).square().sum(dtype=torch.float64)
            own_weight += own_weight_part
    norm = norm_of(d_hidden)
    rms = norm_of(token_losses) / max(len(rows), 1) ** 0.5
    lse = lses.abs().max().item() if len(rows) else 0.0
    filtered = Errors(0.0, 0.0, 0.0)
    if filter_eps is not None:
        filtered = Errors(0.0, ratio(tail.norm(), norm), ratio(norm_of(filtered_weight), norm_of(d_weight)))
    return Yardstick(
        dtype=dtype,
        token_losses=token_losses,
        d_hidden=d_hidden,
        d_weight=d_weight,
        own=Errors(
            relative_error(own_losses, token_losses),
            ratio(own_hidden.sqrt().item(), norm),
            relative_error(own_weight.to(dtype), d_weight),
        ),
        own_mean=ratio((own_losses - token_losses).sum().abs().item(), token_losses.sum().item()),
        filtered=filtered,
        condition=max(ratio(lse, rms), 1.0),
    )


def plain_torch(hidden: Tensor, weight: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], none ignored, and the gradients of their sum / ``count``, by F.linear and F.cross_entropy."""
    with torch.enable_grad():
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logits = F.linear(hidden, weight)
        losses = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")
        return losses.detach(), *torch.autograd.grad(losses.sum() / count, (hidden, weight))


def left_out_by_filter(softmax: Tensor, targets: Tensor, filter_eps: float) -> Tensor:
    """The softmax [N, V] where the strictest filter leaves it out, 0 elsewhere; ``targets`` is [N, 1].

    It leaves out what is below the threshold, but no target, and nothing of a block of tokens that would lose too much.
    """
    left_out = softmax.masked_fill(softmax >= filter_eps, 0).scatter_(1, targets, 0)
    for block in left_out.split(_BLOCK):
        if block.sum(-1).mean() > _MOST_DROPPED:
            block.zero_()
    return left_out


class _Tail:
    """What a filter leaves out of the hidden states' gradient, once its mean for a unit of mass has been put back.

    With a token's mass m and its part r of the gradient, and d = sum(r) / sum(m), that is r - m d; its square over all
    tokens is sum(r^2) - 2 d sum(m r) + d^2 sum(m^2), so one pass will do.
    """

    def __init__(self, hidden: Tensor):
        self.squares, self.mass, self.mass_squares = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        self.sum, self.sum_by_mass = self.squares.new_zeros(2, hidden.shape[1])

    def add(self, mass: Tensor, part: Tensor) -> None:
        """``mass`` [n] and ``part`` [n, D]."""
        mass, part = mass.double(), part.double()
        self.squares += part.square().sum()
        self.mass += mass.sum()
        self.mass_squares += mass.square().sum()
        self.sum += part.sum(0)
        self.sum_by_mass += mass @ part

    def norm(self) -> float:
        direction = self.sum / self.mass.clamp(min=torch.finfo(torch.float64).tiny)
        square = self.squares - 2 * direction @ self.sum_by_mass + direction.square().sum() * self.mass_squares
        return square.clamp(min=0).sqrt().item()


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, whatever the process has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def relative_error(actual: Tensor, right: Tensor) -> float:
    """||actual - right|| / ||right||, by slices, since a weight's gradient in float64 is large."""
    squares = torch.zeros((), dtype=torch.float64, device=right.device)
    for a, r in zip(actual.split(8192), right.split(8192), strict=True):
        squares += (a.to(r.device, r.dtype) - r).square().sum(dtype=torch.float64)
    return ratio(squares.sqrt().item(), norm_of(right))


def norm_of(tensor: Tensor) -> float:
    return torch.stack([part.square().sum(dtype=torch.float64) for part in tensor.split(8192)]).sum().sqrt().item()


def ratio(error: float, size: float) -> float:
    """0 for no error, whatever the size."""
    return 0.0 if error == 0 else error / size if size else float("inf")
