"""Errors of losses and gradients against float64, and how large they may be.

An error is relative, over all rows at once: ||actual - exact|| / ||exact||, of the tokens' losses, of the hidden
states' gradient and of the weight's, each against float64 from the inputs as they were rounded. An implementation may
be twice as far from it as PyTorch is in the inputs' dtype, plus four roundings of a result and of a float32
log-sum-exp, whose error is large beside the loss of a confident row. One that filters may also be twice as
far as the strictest filter: leaving out every entry below the threshold, where tiles are kept whole that hold a larger
one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce import linear_cross_entropy
from torchtune_lce.bench.correctness import relative_error
from torchtune_lce.bench.data import Batch
from torchtune_lce.implementations import CCE_PRESETS
from torchtune_lce.options import Options

_EPS_BEYOND_TORCH = 4
# Where the entries that would go hold more than this of the softmax, in the mean of a block of tokens, none of them do.
_MOST_DROPPED, _BLOCK = 0.25, 128
QUANTITIES = ("loss", "hidden", "weight")


@dataclass(frozen=True)
class Values:
    """Of one loss on one batch; gradients are of the mean."""

    loss: Tensor  # [N]
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]

    def errors(self, exact: "Values") -> dict[str, float]:
        """Relative, by the names of :data:`QUANTITIES`."""
        return {
            name: relative_error(getattr(self, name).to("cpu"), getattr(exact, name).to("cpu")) for name in QUANTITIES
        }


@dataclass(frozen=True)
class Row:
    """One implementation on one kind of rows in one dtype; ``allowed`` None for what others are measured by."""

    data: str
    dtype: str
    name: str
    errors: dict[str, float]
    allowed: dict[str, float] | None = None

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return self.allowed is None or all(self.errors[name] <= self.allowed[name] for name in QUANTITIES)


def plain_torch(batch: Batch, dtype: torch.dtype) -> Values:
    """F.linear and F.cross_entropy on float32 logits, or float64 ones."""
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (batch.hidden, batch.weight))
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), batch.targets, reduction="none")
    return _values(loss, hidden, weight)


def implementation(impl: str, batch: Batch) -> Values:
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (batch.hidden, batch.weight))
    loss = linear_cross_entropy(hidden, weight, batch.targets, impl=impl, reduction="none")
    return _values(loss, hidden, weight)


def _values(loss: Tensor, hidden: Tensor, weight: Tensor) -> Values:
    return Values(loss.detach(), *torch.autograd.grad(loss.mean(), (hidden, weight)))


@torch.no_grad()
def strictest_filter(batch: Batch, exact: Values) -> Values:
    """In float64, without every softmax entry below the threshold for the batch's dtype, and no target's."""
    hidden, weight = batch.hidden.double(), batch.weight.double()
    softmax = (hidden @ weight.T).softmax(-1)
    eps = Options().resolved_filter_eps(batch.hidden.dtype)
    dropped = softmax < eps
    dropped.scatter_(1, batch.targets[:, None], False)
    for block in range(0, len(softmax), _BLOCK):
        rows = slice(block, block + _BLOCK)
        if (softmax[rows] * dropped[rows]).sum(-1).mean() > _MOST_DROPPED:
            dropped[rows] = False
    d_logits = softmax.scatter_add(1, batch.targets[:, None], torch.full_like(softmax[:, :1], -1.0))
    d_logits = d_logits.masked_fill_(dropped, 0).div_(len(softmax))
    return Values(exact.loss, d_logits @ weight, d_logits.T @ hidden)


def _condition(batch: Batch, exact: Values) -> float:
    """How much larger a log-sum-exp's relative rounding is in a loss: that of a confident row is a small difference."""
    lse = (batch.hidden.double() @ batch.weight.double().T).logsumexp(-1)
    return (lse.abs().max() / exact.loss.square().mean().sqrt()).item()


def rows_of(batch: Batch, impls: list[str]) -> list[Row]:
    """PyTorch's own errors, the strictest filter's if anything filters, then those of ``impls``."""
    dtype = batch.hidden.dtype
    exact = plain_torch(batch, torch.float64)
    name = str(dtype).removeprefix("torch.")
    own = plain_torch(batch, dtype).errors(exact)
    rows = [Row(batch.data, name, "PyTorch", own)]
    filters = {impl: CCE_PRESETS[impl] for impl in impls if impl in CCE_PRESETS}
    filtered = dict.fromkeys(QUANTITIES, 0.0)
    if any(filtering.hidden or filtering.weight for filtering in filters.values()):
        filtered = strictest_filter(batch, exact).errors(exact)
        rows.append(Row(batch.data, name, "strictest filter", filtered))
    slack = _EPS_BEYOND_TORCH * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * _condition(batch, exact))
    for impl in impls:
        allowed = {quantity: 2 * own[quantity] + slack for quantity in QUANTITIES}
        for quantity in ("hidden", "weight"):
            if impl in filters and getattr(filters[impl], quantity):
                allowed[quantity] += 2 * filtered[quantity]
        rows.append(Row(batch.data, name, impl, implementation(impl, batch).errors(exact), allowed))
    return rows
