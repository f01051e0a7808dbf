"""Sizes past 2^31 elements, on a card: every token's log-sum-exp, and rows of the gradients, against float64.

The reference never holds more than a block of logits, and computes only the rows of gradients that are compared.
"""

import gc
from dataclasses import dataclass

import pytest
import torch
from tolerance import sum_error
from torch import Tensor

from torchtune_lce import linear_cross_entropy
from torchtune_lce.inputs import filtering
from torchtune_lce.inputs.options import AUTO_TRAINED

TOKEN_BLOCK, ENTRY_BLOCK = 4096, 32_768
SAMPLED = 96
# Logits of the confident tokens at their targets, where all others have a deviation of 1.
CONFIDENT = 20


@dataclass(frozen=True)
class Size:
    tokens: int
    vocabulary: int
    width: int


SIZES = {
    # A 131k-token sequence: N V = 1.7e10.
    "long-sequence": Size(131_072, 128_256, 512),
    # A 500k vocabulary: V D = 2.3e9, and N V as much.
    "large-vocabulary": Size(4500, 500_009, 4608),
    # N D = 2.2e9, with as few entries as keep it quick.
    "wide-and-long": Size(525_000, 1009, 4160),
}


@dataclass(frozen=True)
class Rows:
    """Rows of a gradient in float64, for an upstream of 1, and what their allowances are made of."""

    gradient: Tensor  # [K, D]
    mass: Tensor  # [K]: sum of |gradient by a logit|
    softmax: Tensor  # [K]: sum of the softmax
    below_eps: Tensor  # [K]: of its entries that filtering may leave out


@dataclass(frozen=True)
class Exact:
    """What is compared, in float64."""

    lse: Tensor  # [N]
    nll: Tensor  # [N], 0 where ignored
    tokens: Tensor  # places of the rows of the hidden gradient
    entries: Tensor  # of the weight's
    by_hidden: Rows
    by_weight: Rows


def make_inputs(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seven of eight tokens are confident of their target: what they leave to the others is filtered away."""
    weight = torch.randn(size.vocabulary, size.width, device=device, dtype=dtype) / size.width**0.5
    hidden = torch.randn(size.tokens, size.width, device=device, dtype=dtype)
    targets = torch.randint(0, size.vocabulary, (size.tokens,), device=device)
    for block in torch.arange(size.tokens, device=device).split(TOKEN_BLOCK):
        confident = block[block % 8 > 0]
        hidden[confident] += CONFIDENT * weight[targets[confident]]
    targets[torch.rand(size.tokens, device=device) < 0.1] = -100
    return hidden, weight, targets


def sample(count: int, device: torch.device) -> Tensor:
    """Places all over a range and both its ends: an index of 32 bits comes round somewhere between."""
    ends = torch.arange(min(8, count), device=device)
    return torch.cat([ends, torch.randint(0, count, (SAMPLED,), device=device), count - 1 - ends]).unique()


def compute_exact(hidden: Tensor, weight: Tensor, targets: Tensor, eps: float) -> Exact:
    used = targets != -100
    lse, nll = [], []
    for states, labels in zip(hidden.split(TOKEN_BLOCK), targets.split(TOKEN_BLOCK), strict=True):
        states = states.double()
        parts = [(states @ entries.double().T).logsumexp(1) for entries in weight.split(ENTRY_BLOCK)]
        lse.append(torch.stack(parts).logsumexp(0))
        nll.append(lse[-1] - (states * weight[labels.clamp(min=0)].double()).sum(1))
    lse, nll = torch.cat(lse), torch.cat(nll).where(used, 0)
    tokens = sample(len(hidden), hidden.device)
    tokens = tokens[used[tokens]]
    entries = torch.cat([sample(len(weight), hidden.device), targets[tokens]]).unique()
    vocabulary = torch.arange(len(weight), device=weight.device)
    by_hidden = gradient_rows(hidden[tokens], targets[tokens], lse[tokens], weight, vocabulary, eps, True)
    by_weight = gradient_rows(hidden[used], targets[used], lse[used], weight, entries, eps, False)
    return Exact(lse.where(used, 0), nll, tokens, entries, by_hidden, by_weight)


def gradient_rows(hidden, targets, lse, weight, entries, eps: float, by_hidden: bool) -> Rows:
    """(softmax - onehot) times weight, a row a token, or its transpose times hidden, a row an entry; in blocks."""
    sums = None
    for tokens in torch.arange(len(hidden), device=hidden.device).split(TOKEN_BLOCK):
        states, labels = hidden[tokens].double(), targets[tokens]
        for chosen in entries.split(ENTRY_BLOCK):
            rows = weight[chosen].double()
            softmax = (states @ rows.T - lse[tokens][:, None]).exp()
            d_logits = softmax - (labels[:, None] == chosen[None, :]).double()
            below = softmax.where(softmax < eps * (1 + 2**-8), 0)
            gradient = d_logits @ rows if by_hidden else d_logits.T @ states
            over = 1 if by_hidden else 0
            new = [gradient, d_logits.abs().sum(over), softmax.sum(over), below.sum(over)]
            sums = new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
    return Rows(*sums)


def assert_near(
    name: str,
    actual: Tensor,
    rows: Rows,
    upstream: float,
    factors: float,
    logits: float,
    low: torch.dtype,
    length: int,
    filtered: int,
) -> None:
    """Row by row, the norm of the error.

    ``factors`` bounds the norm of what a logit's gradient is multiplied with, ``logits`` the error of a logit: it
    moves each softmax entry by that part of it, the log-sum-exp by as much again. Each gradient by a logit is rounded
    to ``low`` and so is the result; sums of ``length`` terms are float32; what filtering may leave out comes on top,
    ``filtered`` times.
    """
    eps_low = torch.finfo(low).eps
    allowed = (2 * logits * rows.softmax + (eps_low + sum_error(length, torch.float32)) * rows.mass) * factors
    allowed += rows.below_eps * factors * filtered + eps_low * rows.gradient.norm(dim=1)
    # The smallest steps of a gradient that underflows in its dtype.
    allowed = allowed * upstream + torch.finfo(low).smallest_normal * actual.shape[1] ** 0.5
    error = (actual.double() - rows.gradient * upstream).norm(dim=1)
    # Written so that a NaN fails.
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max().item():.3g} times what is allowed"


def check(impl: str, hidden: Tensor, weight: Tensor, targets: Tensor, exact: Exact) -> None:
    dtype, used = hidden.dtype, (targets != -100).sum().item()
    # A sum's error at its worst place, and rounded to the inputs' dtype where logits are not kept in float32.
    widest = hidden.float().norm(dim=1).max().item(), weight.float().norm(dim=1).max().item()
    logits = sum_error(hidden.shape[1], torch.float32) * widest[0] * widest[1]
    if impl == "chunked":
        logits += torch.finfo(dtype).eps / 2 * (2 * CONFIDENT)
    filters = impl == "cce"
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with filtering.recording() as records:
        loss, lse = linear_cross_entropy(*leaves, targets, impl=impl, return_lse=True)
        d_hidden, d_weight = torch.autograd.grad(loss, leaves)
    assert not filters or records[0].dropped_mass.any(), "nothing was filtered: this data does not test it"
    lse_error = logits + 16 * torch.finfo(torch.float32).eps * exact.lse.abs().max().item()
    assert (lse.double() - exact.lse).abs().max() <= lse_error
    mean_error = lse_error + logits + sum_error(used, torch.float32) * exact.nll.mean().item()
    assert (loss.double() - exact.nll.sum() / used).abs() <= mean_error
    shared = {"logits": logits, "low": dtype}
    # `chunked` rounds the product of each piece of the vocabulary once more.
    twice = 2 if impl == "chunked" else 1
    # In place of what is dropped from the gradient of hidden comes as much of its mean, which may point elsewhere.
    assert_near(
        "hidden",
        d_hidden[exact.tokens],
        exact.by_hidden,
        1 / used,
        twice * widest[1],
        length=len(weight),
        filtered=2 * filters,
        **shared,
    )
    assert_near(
        "weight",
        d_weight[exact.entries],
        exact.by_weight,
        1 / used,
        twice * widest[0],
        length=used,
        filtered=filters,
        **shared,
    )
    assert not d_hidden[targets == -100].any()
    assert d_weight.isfinite().all()


def compare(size: Size, impls: tuple[str, ...], dtype: torch.dtype, device: torch.device, eps: float) -> None:
    hidden, weight, targets = make_inputs(size, dtype, device)
    exact = compute_exact(hidden, weight, targets, eps)
    for impl in impls:
        check(impl, hidden, weight, targets, exact)
        gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_slices_against_float64(size, device):
    chosen = SIZES[size]
    assert max(chosen.tokens * chosen.vocabulary, chosen.width * max(chosen.tokens, chosen.vocabulary)) > 2**31
    impls = ("cce", "cce_exact", "chunked") if size == "long-sequence" else ("cce", "cce_exact")
    compare(chosen, impls, torch.bfloat16, device, torch.finfo(torch.bfloat16).eps / AUTO_TRAINED)


def test_the_comparison_itself(device, monkeypatch):
    """In small: it accepts what is right, and sees a row of a gradient that came from elsewhere."""
    low, size = torch.float16, Size(90, 300, 64)
    eps = torch.finfo(low).eps / AUTO_TRAINED
    compare(size, ("chunked",), low, device, eps)
    hidden, weight, targets = make_inputs(size, low, device)
    exact = compute_exact(hidden, weight, targets, eps)
    right = torch.autograd.grad

    def shifted(loss, leaves):
        d_hidden, d_weight = right(loss, leaves)
        return d_hidden, d_weight.roll(1, 0)

    monkeypatch.setattr(torch.autograd, "grad", shifted)
    with pytest.raises(AssertionError, match="^weight: .* times what is allowed"):
        check("chunked", hidden, weight, targets, exact)
