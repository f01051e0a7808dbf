"""How many kernels and operations of torch a step launches: each costs the host 10 to 60 us of its time."""

import pytest
import torch

pytest.importorskip("triton")

from launches import counted

from torchtune_lce import LinearCrossEntropyLoss, linear_cross_entropy
from torchtune_lce.divergence.function import divergence
from torchtune_lce.divergence.operands import Head, Shares
from torchtune_lce.inputs import validation
from torchtune_lce.kernels import strips

TOKENS, VOCABULARY, WIDTH = 70, 300, 32
# At the most, forward and backward: Triton's kernels, and operations of torch, of which one is autograd's own.
STEPS = {
    "exact-frozen": ({"impl": "cce_exact"}, (8, 2), (1, 2)),
    "exact-both": ({"impl": "cce_exact"}, (8, 2), (5, 2)),
    "exact-both-held": ({"impl": "cce_exact"}, (8, 2), (3, 5)),
    "filtered-both": ({"impl": "cce"}, (10, 2), (10, 6)),
}
# A filtering backward with a trained head may first put hidden states in order, for a card's copy engine.
ON_A_CARD = (2, 0)


@pytest.fixture
def inputs(device, monkeypatch):
    """As on a card, where nobody looks at targets."""
    monkeypatch.setattr(validation, "is_readable", lambda _: False)
    hidden = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, device=device)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), device=device)


@pytest.mark.parametrize("way", ["function", "module"])
@pytest.mark.parametrize("step", STEPS)
def test_launches_of_a_step(step, way, inputs, monkeypatch):
    settings, *most = STEPS[step]
    hidden, weight, targets = inputs
    if step == "exact-both":
        # As of a long batch.
        monkeypatch.setattr(strips, "tiles_held", lambda *_: 0)
    weight.requires_grad_("frozen" not in step)
    loss = LinearCrossEntropyLoss(**settings)
    with counted() as forward:
        if way == "module":
            result = loss(hidden, targets, weight)
        else:
            result = linear_cross_entropy(hidden, weight, targets, **settings)
    with counted() as backward:
        result.backward()
    for launches, (kernels, operations) in zip((forward, backward), most, strict=True):
        if launches is backward and "filtered" in step and weight.is_cuda:
            kernels, operations = kernels + ON_A_CARD[0], operations + ON_A_CARD[1]
        assert len(launches.kernels) <= kernels, str(launches)
        assert len(launches.operations) <= operations, str(launches)


@pytest.mark.parametrize(("trained", "kernels", "operations"), [(False, 8, 7), (True, 9, 8)], ids=["frozen", "both"])
def test_launches_of_a_divergence(trained, kernels, operations, inputs):
    """Of one strip: another one is two kernels more, or three. The mean and the gradients' scaling are torch's."""
    hidden, weight, targets = inputs
    student = Head("student", hidden, weight.requires_grad_(trained))
    teacher = Head("teacher", hidden.detach().flip(0), weight.detach())
    settings = {"ignore_index": -100, "workspace_mib": 128, "impl": "cce_exact", "normalize": True}
    with counted() as launches:
        loss = divergence(student, teacher, targets, Shares(0.3, 0.7), **settings)
        torch.autograd.grad(loss, [hidden, weight] if trained else hidden)
    assert len(launches.kernels) <= kernels, str(launches)
    assert len(launches.operations) <= operations, str(launches)


def test_a_launch_and_its_place_are_told(device):
    with counted() as launches:
        torch.zeros(3, device=device).view(1, 3).add_(1).contiguous().to(torch.float32).to(torch.int32)
    assert launches.operations == ["zeros at autograd", "add_.Tensor at autograd", "_to_copy at autograd"]
