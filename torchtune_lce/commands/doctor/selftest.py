"""A small problem, computed by the implementation under test and by plain PyTorch in float64 and in its own dtype."""

import time
from dataclasses import dataclass

import torch

from torchtune_lce import linear_cross_entropy

TOKENS, VOCABULARY, WIDTH = 384, 5003, 256
# Beyond torch's own error in the same dtype, in float32's eps, in which sums are taken: a few hundred terms in another
# order. Nothing is filtered here: a tile of so flat a softmax has entries over the threshold.
_EPS_BEYOND_TORCH = 4


@dataclass(frozen=True)
class Outcome:
    """Relative errors against float64 by name, those of plain PyTorch in the same dtype beside them."""

    errors: dict[str, float]
    torch_errors: dict[str, float]
    dtype: torch.dtype
    seconds: float

    @property
    def passed(self) -> bool:
        slack = dict.fromkeys(self.errors, _EPS_BEYOND_TORCH * torch.finfo(torch.float32).eps)
        for gradient in ("dE", "dC"):  # one more rounding to the dtype
            slack[gradient] += torch.finfo(self.dtype).eps / 2
        return all(error <= 2 * self.torch_errors[name] + slack[name] for name, error in self.errors.items())


def run(impl: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Loss and both gradients; the first call's compilation counts in the seconds."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(device, dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * (2 / WIDTH**0.5)).to(device, dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[: TOKENS // 8] = -100
    targets = targets.to(device)
    started = time.perf_counter()
    ours = _results(impl, hidden, weight, targets)
    seconds = time.perf_counter() - started
    # In float64 on the CPU: not every device has it.
    exact = _results("reference", hidden.double().cpu(), weight.double().cpu(), targets.cpu())
    plain = _results("reference", hidden, weight, targets)
    return Outcome(
        {name: _error(ours[name], exact[name]) for name in exact},
        {name: _error(plain[name], exact[name]) for name in exact},
        dtype,
        seconds,
    )


def _results(impl: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return {name: value.double().cpu() for name, value in (("loss", loss.detach()), ("dE", d_hidden), ("dC", d_weight))}


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()
