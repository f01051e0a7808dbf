"""What autograd lets anyone do with a loss: backward twice, any upstream gradient, hooks, checkpointing, transforms."""

import pytest
import torch
import torch.nn.functional as F
from fused_steps import steps_as
from grid import each
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchtune_lce import linear_cross_entropy
from torchtune_lce.implementations.capabilities import CAPABILITIES

TRIED = ("reference", "chunked", "torch_compile", "cce")
EACH, OPERATORS = each(*TRIED), each(*(name for name in TRIED if CAPABILITIES[name].own_backward))
TOKENS, VOCABULARY, WIDTH = 21, 83, 12
# float32 sums of 12 products and 83 exponentials; filtering at finfo(float32).eps / 45 is far below.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _uncompiled():
    """What a compiler fuses is the same to autograd."""
    with steps_as():
        yield


def make_inputs(device):
    hidden = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, device=device, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), device=device)
    targets[::5] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, reduction="mean"):
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction)


@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-20, 2.0**60, 0.0])
@pytest.mark.parametrize("impl", EACH)
def test_gradients_are_linear_in_the_upstream(impl, upstream, device):
    """Powers of two and nought: exactly; GradScaler multiplies by such."""
    hidden, weight, targets = make_inputs(device)
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    (loss * upstream).backward()
    for leaf, gradient in zip((hidden, weight), once, strict=True):
        if upstream in (1.0, 2.0**60, 0.0):
            assert torch.equal(leaf.grad, gradient * upstream)
        else:
            torch.testing.assert_close(leaf.grad / upstream, gradient, **TOLERANCE)


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("impl", EACH)
def test_ignored_tokens_have_no_gradient_of_any_upstream(impl, frozen, reduction, upstream, device):
    """As of a scaled loss that has overflowed; of a token's own loss, other tokens' gradients stay what they are."""
    hidden, weight, targets = make_inputs(device)
    weight.requires_grad_(not frozen)
    ignored = targets == -100
    losses = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl)
    losses.backward(torch.ones_like(losses).masked_fill(ignored if reduction == "none" else ~losses.isnan(), upstream))
    assert not hidden.grad[ignored].any()
    assert hidden.grad.isfinite().all(-1).tolist() == (ignored | (reduction == "none")).tolist()
    assert frozen or weight.grad.isfinite().all() == (reduction == "none")


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("impl", EACH)
def test_a_batch_without_labels_has_no_gradient_of_any_upstream(impl, reduction, frozen, device):
    """As of a sum over a step's batches that is divided by how many labels these have: none."""
    hidden, weight, targets = make_inputs(device)
    bias = torch.zeros(len(weight), device=device).requires_grad_(not frozen)
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden, weight, targets.fill_(-100), bias, reduction=reduction, impl=impl)
    loss.backward(torch.full_like(loss, torch.inf))
    for leaf in [hidden] if frozen else [hidden, weight, bias]:
        assert not leaf.grad.any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
def test_goes_back_in_parts_and_again(impl, frozen, device):
    """Gradients that the forward has made are given away once; another backward over the graph makes the same ones."""
    hidden, weight, targets = make_inputs(device)
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    loss = linear_cross_entropy(hidden, weight, targets, softcap=9.0, z_loss=0.1, label_smoothing=0.0, impl=impl)
    together = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [gradient.clone() for gradient in together]
    torch.autograd.grad(loss, leaves, loss.new_ones(2), is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in leaves]
    for kept, copy, again in zip(together, copies, one_by_one, strict=True):
        assert torch.equal(kept, copy), "another backward has written to it"
        assert torch.equal(copy, again)
    for leaf in leaves:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
            torch.autograd.grad(gradient.square().sum(), hidden)


@pytest.mark.parametrize("impl", EACH)
def test_two_losses_over_one_graph(impl, device):
    """Two backward calls through what comes before the loss add up, each with per-token upstream gradients."""
    hidden, weight, targets = make_inputs(device)
    upstreams = torch.randn(2, TOKENS, device=device)
    states = torch.tanh(hidden)
    for upstream in upstreams:
        losses = linear_cross_entropy(states, weight, targets, reduction="none", impl=impl)
        losses.backward(upstream, retain_graph=True)
    ours = hidden.grad, weight.grad
    expected = torch.autograd.grad(
        (plain(torch.tanh(hidden), weight, targets, "none") * upstreams.sum(0)).sum(), (hidden, weight)
    )
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


class Head(nn.Module):
    """A projection with a layer before it, whose forward is the loss."""

    def __init__(self, impl: str):
        super().__init__()
        self.impl = impl
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, hidden, targets):
        states = torch.tanh(self.layer(hidden))
        if self.impl == "plain":
            return F.cross_entropy(self.output(states), targets)
        return linear_cross_entropy(states, self.output.weight, targets, self.output.bias, impl=self.impl)


def gradients_of(module, call, *inputs) -> list[torch.Tensor]:
    """By the parameters and the first input."""
    return list(torch.autograd.grad(call(*inputs), [*module.parameters(), inputs[0]]))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("impl", EACH)
def test_activation_checkpointing(impl, reentrant, device):
    """The loss itself is what is computed again; its gradients are then the same bits."""
    hidden, _, targets = make_inputs(device)
    head = Head(impl).to(device)
    straight = gradients_of(head, lambda states: head(states, targets), hidden)

    def again(states):
        return checkpoint(head, states, targets, use_reentrant=reentrant)

    if reentrant:
        # It gives gradients by `.grad` alone.
        again(hidden).backward()
        recomputed = [x.grad for x in [*head.parameters(), hidden]]
    else:
        recomputed = gradients_of(head, again, hidden)
    for actual, wanted in zip(recomputed, straight, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("impl", EACH)
def test_functional_call(impl, device):
    """With parameters from elsewhere, which get the gradients; the module's own get none."""
    hidden, _, targets = make_inputs(device)
    head, twin = Head(impl).to(device), Head("plain").to(device)
    given = dict(twin.named_parameters())
    loss = torch.func.functional_call(head, given, (hidden, targets))
    ours = torch.autograd.grad(loss, list(given.values()))
    for actual, wanted in zip(ours, torch.autograd.grad(twin(hidden, targets), list(given.values())), strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("impl", EACH)
def test_hooks(impl, device):
    """On the loss, on an intermediate result, on a leaf after its gradient is there: each once, each able to change."""
    hidden, weight, targets = make_inputs(device)
    seen = []
    states = hidden * 1
    states.register_hook(lambda gradient: seen.append("states") or gradient * 2)
    weight.register_post_accumulate_grad_hook(lambda leaf: seen.append("weight"))
    loss = linear_cross_entropy(states, weight, targets, impl=impl)
    loss.register_hook(lambda gradient: seen.append("loss") or gradient * 3)
    loss.backward()
    assert sorted(seen) == ["loss", "states", "weight"]
    for leaf, factor in ((hidden, 6), (weight, 3)):
        (expected,) = torch.autograd.grad(plain(hidden, weight, targets), leaf)
        torch.testing.assert_close(leaf.grad, factor * expected, **TOLERANCE)


@pytest.mark.parametrize("impl", EACH)
def test_saved_tensors_may_be_kept_elsewhere(impl, device):
    """As activation offloading does: everything that the backward reads passes the hooks, and nothing else is read."""
    hidden, weight, targets = make_inputs(device)
    straight = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, impl=impl), (hidden, weight))
    with save_on_cpu():
        loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), straight, strict=True):
        assert torch.equal(actual, wanted)
    packed = []
    with saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        linear_cross_entropy(hidden, weight, targets, impl=impl)
    assert any(x.shape == weight.shape or x.T.shape == weight.shape for x in packed)


@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("impl", EACH)
def test_changed_between_forward_and_backward(impl, name, device):
    """As an optimizer step too early does: torch's own complaint, never a gradient of something else."""
    hidden, weight, targets = make_inputs(device)
    inputs = {"hidden": hidden * 1, "weight": weight * 1}
    loss = linear_cross_entropy(**inputs, targets=targets, impl=impl)
    with torch.no_grad():
        inputs[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", OPERATORS)
def test_forward_mode_is_refused(impl, device):
    """A custom operator would pass for a constant there: a tangent of zero without a word."""
    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    for name in ("hidden", "weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"^impl='{impl}' has no forward-mode derivative.*'reference'"):
            torch.func.jvp(
                lambda x, name=name: linear_cross_entropy(
                    **{"hidden": hidden, "weight": weight, "targets": targets, name: x}, impl=impl
                ),
                (tangible := {"hidden": hidden, "weight": weight, "bias": weight[:, 0]}[name],),
                (tangible,),
            )
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        linear_cross_entropy(forward_ad.make_dual(hidden, hidden), weight, targets, impl=impl)


def test_reference_has_forward_mode(device):
    hidden, weight, targets = (x.detach() for x in make_inputs(device))

    def tangent(loss):
        return torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))[1]

    ours = tangent(lambda x: linear_cross_entropy(x, weight, targets, impl="reference"))
    torch.testing.assert_close(ours, tangent(lambda x: plain(x, weight, targets)), **TOLERANCE)


@pytest.mark.parametrize("impl", EACH)
def test_vmap(impl, device):
    """One by one, as torch does with an operator that has no rule for it; with gradients."""
    hidden, weight, targets = make_inputs(device)
    batch = torch.stack([hidden, hidden * 2])

    def losses(loss):
        mapped = torch.vmap(lambda states: loss(states, weight, targets))(batch)
        return mapped, *torch.autograd.grad(mapped.sum(), (hidden, weight), retain_graph=True)

    ours = losses(lambda *inputs: linear_cross_entropy(*inputs, impl=impl))
    for actual, wanted in zip(ours, losses(plain), strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_batches_of_upstream_gradients(impl, frozen, reduction, device):
    """Several at once, as torch.autograd.functional.jacobian(vectorize=True) gives them to the backward."""
    hidden, weight, targets = make_inputs(device)
    leaves = (hidden,) if frozen else (hidden, weight)
    weight.requires_grad_(not frozen)
    ours = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl)
    theirs = plain(hidden, weight, targets, reduction)
    upstreams = torch.randn(3, *ours.shape, device=device)
    batched = torch.autograd.grad(ours, leaves, upstreams, is_grads_batched=True)
    one_by_one = (torch.autograd.grad(theirs, leaves, upstream, retain_graph=True) for upstream in upstreams)
    for actual, wanted in zip(batched, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)

    def loss(*inputs):
        return linear_cross_entropy(*inputs, *(() if len(inputs) > 1 else (weight,)), targets, impl=impl)

    jacobian = torch.autograd.functional.jacobian(loss, leaves, vectorize=True)
    for actual, wanted in zip(jacobian, torch.autograd.grad(plain(hidden, weight, targets), leaves), strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


@pytest.mark.parametrize("impl", EACH)
def test_vmap_over_targets(impl, device):
    """Nobody can look at those, so a bad one makes its own loss NaN, as on a card."""
    hidden, weight, targets = make_inputs(device)
    batch = torch.stack([targets, targets.flip(0)])

    def losses(loss):
        mapped = torch.vmap(lambda labels, states: loss(states, weight, labels))(batch, torch.stack([hidden, hidden]))
        return mapped, *torch.autograd.grad(mapped.sum(), (hidden, weight))

    ours = losses(lambda *inputs: linear_cross_entropy(*inputs, impl=impl))
    for actual, wanted in zip(ours, losses(plain), strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    batch[1, 0] = VOCABULARY
    mapped, *_ = losses(lambda *inputs: linear_cross_entropy(*inputs, impl=impl))
    assert mapped.isnan().tolist() == [False, True]


def by_grad(loss, hidden):
    return torch.func.grad(loss)(hidden)


def by_vjp(loss, hidden):
    value, pull = torch.func.vjp(loss, hidden)
    return pull(torch.ones_like(value))[0]


def by_jacrev(loss, hidden):
    return torch.func.jacrev(loss)(hidden)


def by_grad_of_each(loss, hidden):
    """Of a batch of one."""
    return torch.vmap(torch.func.grad(loss))(hidden[None])[0]


def by_grad_of_all(loss, hidden):
    return torch.func.grad(lambda batch: torch.vmap(loss)(batch).sum())(hidden[None])[0]


@pytest.mark.parametrize("differentiate", [by_grad, by_vjp, by_jacrev, by_grad_of_each, by_grad_of_all])
@pytest.mark.parametrize("impl", EACH)
def test_gradients_of_torch_func(impl, differentiate, device):
    """They need a loss that autograd differentiates itself; the operators say which impl is one."""
    hidden, weight, targets = (x.detach() for x in make_inputs(device))

    def loss(states):
        return linear_cross_entropy(states, weight, targets, impl=impl)

    if CAPABILITIES[impl].transforms:
        expected = torch.func.grad(lambda x: plain(x, weight, targets))(hidden)
        torch.testing.assert_close(differentiate(loss, hidden), expected, **TOLERANCE)
    else:
        with pytest.raises(RuntimeError, match=rf"^impl='{impl}' has no derivative by torch.func .* impl='reference'"):
            differentiate(loss, hidden)


@pytest.mark.parametrize("impl", EACH)
def test_constant_under_a_transform(impl, device):
    """What is not differentiated needs no derivative."""
    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    gradient = torch.func.grad(lambda x: x.sum() * linear_cross_entropy(hidden, weight, targets, impl=impl))(weight)
    torch.testing.assert_close(gradient, plain(hidden, weight, targets).expand_as(weight), **TOLERANCE)


@pytest.mark.parametrize("impl", EACH)
def test_nothing_asks_for_a_gradient(impl, device):
    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    loss, lse = linear_cross_entropy(hidden, weight, targets, impl=impl, return_lse=True)
    assert not loss.requires_grad
    assert not lse.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets))
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("impl", EACH)
def test_results_of_inference_mode_stay_out_of_autograd(impl, device):
    """What it gives is a constant; its inputs, used again outside, are as they were."""
    hidden, weight, targets = make_inputs(device)
    with torch.inference_mode():
        loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
        made = torch.randn(TOKENS, WIDTH, device=device)
    assert loss.is_inference()
    with pytest.raises(RuntimeError, match="[Ii]nference tensors? cannot"):
        linear_cross_entropy(made, weight, targets, impl=impl)
    assert linear_cross_entropy(hidden, weight, targets, impl=impl).requires_grad
