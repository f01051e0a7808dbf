"""An eager call of a kernel's operator goes past torch's dispatcher; whoever listens to operators sees one."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, operation, _, arguments=(), settings=None):
        if operation.namespace == "torchtune_lce":
            self.heard.append(operation.name().removeprefix("torchtune_lce::"))
        return operation(*arguments, **(settings or {}))


@pytest.mark.parametrize(
    ("trained", "impl", "name"),
    [
        (False, "cce_exact", "strip_cross_entropy"),
        (True, "cce_exact", "strip_cross_entropy"),
        (True, "cce", "cut_cross_entropy"),
    ],
)
def test_both_ways_are_one(trained, impl, name, device):
    hidden, weight = torch.randn(70, 32, device=device, requires_grad=True), torch.randn(300, 32, device=device)
    weight.requires_grad_(trained)
    targets = torch.randint(0, 300, (70,), device=device)

    def step():
        loss, lse = linear_cross_entropy(hidden, weight, targets, impl=impl, return_lse=True)
        return [loss, lse, *torch.autograd.grad(loss + lse.sum(), (hidden, weight) if trained else hidden)]

    with profile(activities=[ProfilerActivity.CPU]) as events:
        plain = step()
    assert not [event.key for event in events.key_averages() if event.key.startswith("torchtune_lce::")]
    with Listener() as listener:
        heard = step()
    assert listener.heard == [name, f"{name}_backward"]
    for mine, theirs in zip(plain, heard, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("trained", "impl"), [(False, "cce"), (True, "cce"), (True, "cce_exact")])
def test_what_torch_negates_later(trained, impl, device):
    """The imaginary part of a conjugate is the memory of another number's, to be negated where it is read."""

    def imaginary(values):
        return torch.complex(torch.zeros_like(values), -values).conj().imag

    hidden, weight, bias = torch.randn(70, 32), torch.randn(300, 32), torch.randn(300)
    leaves = [x.to(device).requires_grad_(x is hidden or trained) for x in (hidden, weight, bias)]
    targets, upstream = torch.randint(0, 300, (70,), device=device), torch.randn(70, device=device)
    results = []
    for given in (lambda values: values, imaginary):
        with torch.no_grad():
            copies = [given(x) for x in leaves]
        copies = [x.detach().requires_grad_(leaf.requires_grad) for x, leaf in zip(copies, leaves, strict=True)]
        hidden, weight, bias = copies
        losses = linear_cross_entropy(hidden, weight, targets, bias, impl=impl, reduction="none")
        needed = [x for x in copies if x.requires_grad]
        results.append((losses, *torch.autograd.grad(losses, needed, given(upstream))))
    assert hidden.is_neg()
    assert imaginary(upstream).is_neg()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
