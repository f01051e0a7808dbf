"""The entropy that a pass of the kernels leaves beside its losses."""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.hard_rows import CONFIDENT, IGNORED, hard_inputs
from torchtune_lce import linear_token_logprobs
from torchtune_lce.kernels import strips

# What has a gradient decides between strips and tiles, and whether bits are recorded.
WAYS = {
    "strips": ("hidden",),
    "trained-strips": ("hidden", "weight"),
    "sparse-strips": ("hidden",),
    "tiles": ("hidden", "weight"),
    "unrecorded-tiles": (),
}
EPS = {"sparse-strips": 1e-2, "tiles": 1e-2}


def exact_entropy(hidden, weight, bias, targets, softcap, scale):
    logits = hidden.double() @ weight.double().T + bias.double()
    logits = scale * (logits if softcap is None else softcap * torch.tanh(logits / softcap))
    return torch.distributions.Categorical(logits=logits).entropy().where(targets != -100, 0)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.5), (30.0, 3.0)])
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_float64(way, softcap, scale, device):
    inputs = hard_inputs(device)
    wanted = exact_entropy(**inputs, softcap=softcap, scale=scale)
    for name in WAYS[way]:
        inputs[name].requires_grad_()
    options = {"softcap": softcap, "logit_scale": scale, "filter_eps": EPS.get(way), "impl": "cce"}
    logprobs, entropy = linear_token_logprobs(**inputs, **options, return_entropy=True)
    assert not entropy.requires_grad
    assert not entropy[IGNORED].any()
    # Of a term its exponent is off by some roundings of the logit; the sum of terms, and its logarithm, by some more.
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-4, atol=2e-6)
    if softcap is None and way.endswith("strips"):
        # No digit of a confident token's is lost to a sum with 1.
        torch.testing.assert_close(entropy[CONFIDENT].double(), wanted[CONFIDENT], rtol=1e-3, atol=0)
    assert torch.equal(logprobs, linear_token_logprobs(**inputs, **options))


def test_the_same_in_pieces(device, monkeypatch):
    """Bit for bit, whatever tokens and tiles are walked at once."""
    inputs = hard_inputs(device)
    inputs["hidden"].requires_grad_()
    _, whole = linear_token_logprobs(**inputs, impl="cce_exact", return_entropy=True)
    divide = strips.divide
    monkeypatch.setattr(strips, "divide", lambda *args: divide(*args[:6], args[6] // 2000, *args[7:]))
    _, parts = linear_token_logprobs(**inputs, impl="cce_exact", return_entropy=True)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_infinite_logits_have_none(requires_grad, device):
    """As in linear_token_statistics: an entry that is infinitely likely is so more than itself."""
    inputs = hard_inputs(device)
    inputs["bias"][50] = torch.inf
    inputs["hidden"].requires_grad_(requires_grad)
    _, entropy = linear_token_logprobs(**inputs, impl="cce_exact", return_entropy=True)
    assert entropy.isnan().equal(inputs["targets"] != -100)
