"""Losses made of the same two numbers a token: z-loss and log-probabilities, against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from torchtune_lce import LinearCrossEntropyLoss, linear_cross_entropy, linear_token_logprobs

IMPLS = ["cce", "cce_exact", "torch_compile", "chunked", "reference"]
TOKENS, VOCABULARY, WIDTH = (3, 23), 301, 24


def make_inputs(device):
    hidden = torch.randn(*TOKENS, WIDTH, device=device)
    weight = torch.randn(VOCABULARY, WIDTH, device=device) / 3
    targets = torch.randint(0, VOCABULARY, TOKENS, device=device)
    targets[:, :4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def exact(hidden, weight, targets):
    """Leaves in float64, and each token's log-probability and log-sum-exp from them, 0 where ignored."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = F.linear(*leaves)
    lse = logits.logsumexp(-1).where(targets != -100, 0)
    logprobs = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return leaves, logprobs, lse


def assert_close(ours, wanted):
    # float32 sums of 24 products and 301 exponentials; eps / 45 of float32 filters nothing that this could see.
    for actual, expected in zip(ours, wanted, strict=True):
        assert (actual.double() - expected).norm() <= 16 * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_token_logprobs(impl, device):
    hidden, weight, targets = make_inputs(device)
    upstream = torch.randn(TOKENS, device=device)
    ours = linear_token_logprobs(hidden, weight, targets, impl=impl)
    assert ours.dtype == torch.float32
    assert ours.shape == targets.shape
    assert (ours[:, :4] == 0).all()
    leaves, logprobs, _ = exact(hidden, weight, targets)
    gradients = torch.autograd.grad(ours, (hidden, weight), upstream)
    assert_close([ours, *gradients], [logprobs, *torch.autograd.grad(logprobs, leaves, upstream.double())])


@pytest.mark.parametrize("impl", IMPLS)
def test_entropies_beside_log_probabilities(impl, device):
    """At a temperature, as reinforcement learning takes them."""
    hidden, weight, targets = make_inputs(device)
    options = {"logit_scale": 1 / 0.7, "impl": impl}
    logprobs, entropy = linear_token_logprobs(hidden, weight, targets, **options, return_entropy=True)
    leaves, _, _ = exact(hidden, weight, targets)
    logits = F.linear(*leaves) / 0.7
    wanted = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0)
    assert_close([entropy], [torch.distributions.Categorical(logits=logits).entropy().where(targets != -100, 0)])
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert_close([logprobs, *gradients], [wanted, *torch.autograd.grad(wanted.sum(), leaves)])
    assert not entropy.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_z_loss(impl, device):
    hidden, weight, targets = make_inputs(device)
    loss = LinearCrossEntropyLoss(impl=impl, z_loss=0.3)(hidden, targets, weight)
    leaves, logprobs, lse = exact(hidden, weight, targets)
    wanted = (-logprobs + 0.3 * lse.square()).sum() / (targets != -100).sum()
    ours, expected = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(wanted, leaves)
    assert_close([loss, *ours], [wanted, *expected])


def test_the_functions_take_what_the_component_takes(device):
    hidden, weight, targets = make_inputs(device)
    settings = {"z_loss": 0.3, "label_smoothing": 0.1, "impl": "chunked", "workspace_mib": 1}
    assert torch.equal(
        linear_cross_entropy(hidden, weight, targets, **settings),
        LinearCrossEntropyLoss(**settings)(hidden, targets, weight),
    )
    for function in (linear_cross_entropy, linear_token_logprobs):
        with pytest.raises(ValueError, match="workspace_mib must be at least 1, got 0"):
            function(hidden, weight, targets, workspace_mib=0)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), 1e39, 1e-46, 10**400, True, "2", None])
def test_logit_scale_must_be_a_factor_that_float32_holds(scale):
    with pytest.raises(ValueError, match=r"logit_scale must be a number from 1e-30 to 1e30, got"):
        LinearCrossEntropyLoss(logit_scale=scale)


@pytest.mark.parametrize("z_loss", [-1e-4, float("nan"), "auto"])
def test_z_loss_must_be_a_weight(z_loss):
    with pytest.raises(ValueError, match=r"z_loss must be a finite number >= 0, got"):
        LinearCrossEntropyLoss(z_loss=z_loss)
