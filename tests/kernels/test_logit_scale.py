"""A factor on the logits is another base of the exponentials: a power of two of it moves no bit.

Weight, bias and softcap times 4 make the logits that ``logit_scale=4`` makes, rounding for rounding, so that every
result of both calls must be the same but for that factor (and what is subnormal), in every way through the kernels.
"""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.calls import compute
from tests.support.hard_rows import CONFIDENT, MISTAKEN, TOKENS, VOCABULARY, hard_inputs
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options

FACTOR = 4.0
# With a filter and a trained head by tiles, else by strips; an adapter goes by tiles.
WAYS = {
    "tiles": {"impl": "cce"},
    "trained": {"impl": "cce_exact"},
    "frozen": {"impl": "cce", "is_frozen": True},
    "exact-frozen": {"impl": "cce_exact", "is_frozen": True},
    "adapter": {"impl": "cce", "is_frozen": True, "rank": 3},
}


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Inputs this small keep most of their tiles, and all would be computed."""
    monkeypatch.setattr("torchtune_lce.kernels.plan.DENSE_FRACTION", 1.0)


def results_of(inputs: dict[str, torch.Tensor], way: dict, factor: float, softcap: float | None) -> dict:
    """With ``factor`` on the logits by the operands, and the rest of FACTOR by ``logit_scale``."""
    frozen = ("weight", "bias") if way.get("is_frozen") else ()
    inputs = dict(inputs)
    for name in ("weight", "bias", "up"):
        if name in inputs:
            inputs[name] = inputs[name] * factor
    leaves = {
        name: x.clone().requires_grad_() for name, x in inputs.items() if name != "targets" and name not in frozen
    }
    inputs |= leaves
    low_rank = LowRank(inputs.pop("low"), inputs.pop("up"), None) if "low" in inputs else None
    options = Options(softcap=softcap and softcap * factor, logit_scale=FACTOR / factor, filter_eps=1e-2)
    loss, lse = compute(
        **inputs, options=options, impl=way["impl"], reduction="none", return_lse=True, low_rank=low_rank
    )
    weights = torch.arange(1, TOKENS + 1, device=loss.device) / TOKENS
    # A masked target's loss is infinite: its gradient is not asked for by loss alone.
    pulled = loss.where(loss.isfinite(), 0) * weights + lse / 2
    gradients = dict(zip(leaves, torch.autograd.grad(pulled.sum(), leaves.values()), strict=True))
    for name in ("weight", "bias", "up"):
        if name in gradients:
            gradients[name] = gradients[name] * factor
    return {"loss": loss.detach(), "lse": lse.detach(), **gradients}


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("way", WAYS)
def test_by_the_operands_or_by_the_option(way, softcap, device):
    inputs, rank = hard_inputs(device), WAYS[way].get("rank")
    if rank:
        inputs["low"] = torch.randn(TOKENS, rank, device=device)
        inputs["up"] = torch.randn(VOCABULARY, rank, device=device) / 8
    scaled, plain = (results_of(inputs, WAYS[way], factor, softcap) for factor in (1.0, FACTOR))
    assert plain["loss"][MISTAKEN].gt(100).all()
    assert plain["loss"][CONFIDENT].lt(1e-6).all()
    for name, wanted in plain.items():
        torch.testing.assert_close(
            scaled[name], wanted, rtol=0, atol=1e-38, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
