"""The entropy that a pass of the kernels leaves beside its losses."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.support.hard_rows import CONFIDENT, IGNORED, hard_inputs
from torchtune_lce import linear_token_logprobs
from torchtune_lce.functional import logprobs_and_entropy
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.options import Options
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


@pytest.mark.parametrize(
    ("softcap", "scale", "is_reversed"), [(None, 1.0, False), (None, 0.5, True), (30.0, 3.0, False)]
)
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_float64(way, softcap, scale, is_reversed, device):
    inputs = hard_inputs(device)
    if is_reversed:
        # What is probable comes last, when sums have been measured from another logit.
        targets = inputs["targets"]
        inputs["targets"] = torch.where(targets == -100, -100, len(inputs["weight"]) - 1 - targets)
        inputs |= {name: inputs[name].flip(0) for name in ("weight", "bias")}
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


@pytest.mark.parametrize("common", [0, 512, 32_768])
@pytest.mark.parametrize("way", WAYS)
def test_a_common_logit_costs_no_digit(way, common, device):
    """All of these float32 holds exactly; an exponent of 2 of so many digits it does not."""
    hidden = torch.randint(-8, 9, (16, 4)) / 8
    inputs = {
        "hidden": hidden.to(device),
        "weight": (torch.randint(-8, 9, (64, 4)) / 8).to(device),
        "bias": (common + torch.randint(-64, 65, (64,)) / 64).to(device),
        "targets": torch.randint(0, 64, (16,), device=device),
    }
    wanted = exact_entropy(**inputs, softcap=None, scale=1.0)
    for name in WAYS[way]:
        inputs[name].requires_grad_()
    _, entropy = linear_token_logprobs(**inputs, filter_eps=EPS.get(way), impl="cce", return_entropy=True)
    torch.testing.assert_close(entropy.double(), wanted, rtol=2e-6, atol=0)


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
def test_of_huge_logits(requires_grad, device):
    """Rows that are done again, in which more than one entry has a share: float32 holds every fourth number here."""
    bias = torch.full((301,), -torch.inf, device=device)
    bias[7], bias[11], bias[200] = 5e7, 5e7 - 4, 5e7 - 8
    inputs = torch.zeros(3, 8, device=device, requires_grad=requires_grad), torch.zeros(301, 8, device=device)
    targets = torch.tensor([7, 11, 200], device=device)
    _, entropy = linear_token_logprobs(*inputs, targets, bias, impl="cce_exact", return_entropy=True)
    exact = torch.distributions.Categorical(logits=torch.tensor([0.0, -4.0, -8.0])).entropy()
    torch.testing.assert_close(entropy, exact.to(device).expand(3))


@pytest.mark.parametrize("is_recorded", [False, True])
def test_of_sure_tokens_with_unlikely_targets(is_recorded, device):
    """Small ones, from exponentials that are measured from a logit far below the largest; none is negative."""
    torch.manual_seed(0)
    hidden, weight = 80 * torch.randn(256, 16, device=device), torch.randn(301, 16, device=device) / 4
    targets = torch.arange(256, device=device)
    hidden.requires_grad_(is_recorded)
    logprobs, entropy = linear_token_logprobs(hidden, weight, targets, impl="cce", return_entropy=True)
    exact = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T).entropy()
    assert (logprobs < -20).sum() > 50
    assert exact.min() < 1e-9
    assert (entropy >= 0).all()
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-3, atol=4e-5)


@pytest.mark.parametrize("impl", ["cce", "chunked"])
def test_where_a_label_names_no_entry_it_is_no_number(impl, device):
    call = hard_inputs(device)
    call["targets"][3] = 301
    options = Options()
    given = replace(checked(**(call | {"targets": call["targets"].clamp(max=300)}), options=options), in_range=False)
    given = replace(given, labels=call["targets"])
    assert given.labels.max() == 301
    _, entropy = logprobs_and_entropy(given, impl)
    assert entropy.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_infinite_logits_have_none(requires_grad, device):
    """As in linear_token_statistics: an entry that is infinitely likely is so more than itself."""
    inputs = hard_inputs(device)
    inputs["bias"][50] = torch.inf
    inputs["hidden"].requires_grad_(requires_grad)
    _, entropy = linear_token_logprobs(**inputs, impl="cce_exact", return_entropy=True)
    assert entropy.isnan().equal(inputs["targets"] != -100)
