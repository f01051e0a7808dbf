"""Errors of losses and gradients against float64, and how large they may be.

An error is relative, over all rows at once: ||actual - exact|| / ||exact||, of the tokens' losses, of the hidden
states' gradient and of the weight's, each against float64 from the inputs as they were rounded. How large it may be is
:meth:`torchtune_lce.commands.shared.yardstick.Yardstick.allowed`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_lce import linear_cross_entropy
from torchtune_lce.commands.shared import yardstick
from torchtune_lce.commands.shared.batches import Batch
from torchtune_lce.commands.shared.yardstick import Errors, relative_error
from torchtune_lce.implementations.capabilities import CAPABILITIES
from torchtune_lce.inputs.filtering import UNFILTERED
from torchtune_lce.inputs.options import Options

QUANTITIES = ("loss", "hidden", "weight")  # of :class:`Errors`


@dataclass(frozen=True)
class Row:
    """One implementation on one kind of rows in one dtype; ``allowed`` None for what others are measured by."""

    data: str
    dtype: str
    name: str
    errors: Errors
    allowed: Errors | None = None

    @property
    def passed(self) -> bool:
        return self.allowed is None or self.errors.within(self.allowed)


def implementation(impl: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N] and the gradients of their mean by hidden and weight."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (batch.hidden, batch.weight))
    loss = linear_cross_entropy(hidden, weight, batch.targets, impl=impl, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss.mean(), (hidden, weight))


def rows_of(batch: Batch, impls: list[str]) -> list[Row]:
    """PyTorch's own errors, the strictest filter's if anything filters, then those of ``impls``; no target ignored."""
    dtype = batch.hidden.dtype
    name = str(dtype).removeprefix("torch.")
    filters = {impl: CAPABILITIES[impl].filtering for impl in impls}
    filtering = any(found != UNFILTERED for found in filters.values())
    right = yardstick.measure(batch, Options().resolved_filter_eps(dtype, True) if filtering else None, torch.float64)
    rows = [Row(batch.data, name, "PyTorch", right.own)]
    if filtering:
        rows.append(Row(batch.data, name, "strictest filter", right.filtered))
    for impl in impls:
        exact = right.token_losses, right.d_hidden, right.d_weight
        errors = Errors(*map(relative_error, implementation(impl, batch), exact))
        rows.append(Row(batch.data, name, impl, errors, right.allowed(filters[impl])))
    return rows
