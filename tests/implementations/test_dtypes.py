"""Which dtypes go together, what autocast makes of them, and training in float16 with a gradient scaler."""

import dtype_table
import pytest
import torch
import torch.nn.functional as F
from grid import each, needs_triton
from torch import nn

from torchtune_lce import linear_cross_entropy
from torchtune_lce.divergence.function import divergence
from torchtune_lce.divergence.operands import Head, Shares
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.token_statistics import token_statistics

EACH = each("reference", "chunked", "cce")
TOKENS, VOCABULARY, WIDTH = 20, 40, 16


def make_inputs(device, dtype=torch.float32):
    hidden = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, device=device, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), device=device)


def test_the_page_is_what_the_code_does():
    assert dtype_table.written() == dtype_table.table()


@pytest.mark.parametrize("mode", dtype_table.MODES)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_promotes_as_linear_does(impl, mode):
    """The same dtype of the product for every mix, and the same mixes refused."""
    outcomes = [dtype_table.product_dtype(mix, mode, impl) for mix in dtype_table.mixes()]
    assert outcomes == [dtype_table.plain_product_dtype(mix, mode) for mix in dtype_table.mixes()]
    assert len(set(outcomes)) > 2


@needs_triton
@pytest.mark.parametrize("mix", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_kernels_take_what_autocast_makes(mix, device):
    hidden, weight, targets = make_inputs(device)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x, dtype in zip((hidden, weight), mix, strict=True))
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden.*torch.autocast"):
        linear_cross_entropy(hidden, weight, targets, impl="cce")
    with torch.autocast(device.type, torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets, impl="cce")
    loss.backward()
    low = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    same = linear_cross_entropy(*low, targets, impl="cce")
    same.backward()
    assert torch.equal(loss, same)
    for ours, wanted in zip((hidden, weight), low, strict=True):
        assert torch.equal(ours.grad, wanted.grad.to(ours.dtype))


@pytest.mark.parametrize("impl", EACH[1:])
def test_backward_under_autocast_is_the_same(impl, device):
    """Where the forward was outside: the logits that it computes again must be the forward's."""
    hidden, weight, targets = make_inputs(device)
    loss = linear_cross_entropy(hidden, weight, targets, softcap=9.0, impl=impl)
    outside = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        inside = torch.autograd.grad(loss, (hidden, weight))
    for actual, wanted in zip(inside, outside, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("impl", EACH)
def test_autocast_switched_off_inside(impl, device):
    hidden, weight, targets = make_inputs(device)
    expected = linear_cross_entropy(hidden, weight, targets, impl=impl)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, impl=impl), expected)


@pytest.mark.parametrize("what", ["smoothed", "divergence", "entropy"])
def test_autocast_leaves_sums_alone(what):
    """What is made of inputs that have the autocast dtype already is the same inside, sums in float32 and all."""
    hidden, weight, targets = make_inputs(torch.device("cpu"), torch.bfloat16)
    # A mean logit far from 0, which a sum in bfloat16 would round to a few values.
    hidden, weight = (x.detach().add(1).requires_grad_() for x in (hidden, weight))

    def compute() -> torch.Tensor:
        if what == "smoothed":
            return linear_cross_entropy(hidden, weight, targets, label_smoothing=0.2, impl="chunked")
        if what == "entropy":
            return token_statistics(checked(hidden, weight, targets, None, options=Options()))[0].sum()
        student, teacher = Head("student", hidden, weight), Head("teacher", hidden.flip(0), weight.flip(1))
        settings = {"ignore_index": -100, "workspace_mib": 8, "impl": "chunked", "normalize": True}
        return divergence(student, teacher, targets, Shares(0.5, 0.5), **settings)

    def results() -> list[torch.Tensor]:
        result = compute()
        return [result, *(torch.autograd.grad(result, (hidden, weight)) if result.requires_grad else ())]

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        inside = results()
    for actual, wanted in zip(inside, outside, strict=True):
        assert torch.equal(actual, wanted)


class Trained(nn.Module):
    """Two linear layers in float32, the last one's product with the loss, trained under float16 autocast."""

    def __init__(self, device):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        self.to(device)

    def steps(self, impl, device, scale, count=4) -> tuple[list[float], list[float]]:
        """Losses, and the scaler's scale after each step."""
        states, _, targets = (x.detach() for x in make_inputs(device))
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        losses, scales = [], []
        for _ in range(count):
            with torch.autocast(device.type, torch.float16):
                hidden = torch.tanh(self.layer(states))
                if impl == "plain":
                    loss = F.cross_entropy(self.output(hidden).float(), targets)
                else:
                    loss = linear_cross_entropy(hidden, self.output.weight, targets, self.output.bias, impl=impl)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, scales


@pytest.mark.parametrize("scale", [2.0**10, 2.0**22], ids=["fitting", "overflowing"])
@pytest.mark.parametrize("impl", EACH)
def test_gradient_scaler(impl, scale, device):
    """Overflows are infinite, so the scaler sees them and skips just the steps that it skips for plain PyTorch."""
    losses, scales = Trained(device).steps(impl, device, scale)
    expected, expected_scales = Trained(device).steps("plain", device, scale)
    assert scales == expected_scales
    if scale > 2.0**15:
        assert scales[-1] < scale, "the scale must overflow"
        assert losses[0] == losses[1], "a step that overflowed was taken"
    else:
        assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected, rel=4 * torch.finfo(torch.float16).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce", "chunked"])
def test_float32_on_a_card_follows_torch(impl, device):
    """As exact as torch's own product where tf32 is off; where it is on visibly less so, but no worse than torch."""
    hidden = torch.randn(2048, 1024, device=device, requires_grad=True)
    weight = (torch.randn(8000, 1024, device=device) / 32).requires_grad_()
    targets = torch.randint(0, 8000, (2048,), device=device)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), targets, reduction="sum"), leaves)

    def errors(loss) -> list[float]:
        gradients = torch.autograd.grad(loss, (hidden, weight))
        return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(gradients, exact, strict=True)]

    def both() -> tuple[list[float], list[float]]:
        ours = linear_cross_entropy(hidden, weight, targets, reduction="sum", impl=impl)
        return errors(ours), errors(F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum"))

    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        exactly, torch_exactly = both()
        torch.backends.cuda.matmul.allow_tf32 = True
        coarsely, torch_coarsely = both()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    # tf32 keeps 10 bits where float32 has 23: three such products are good to a few float32 roundings.
    float32 = torch.finfo(torch.float32).eps
    for ours, plain in zip(exactly, torch_exactly, strict=True):
        assert ours <= 2 * plain + 8 * float32
    # Triton cuts operands to tf32 where cuBLAS rounds them: up to 2^-10 each, and all the same way.
    cut = 2**-10 if impl == "cce" else 0
    for ours, plain, before in zip(coarsely, torch_coarsely, exactly, strict=True):
        assert ours <= 2 * plain + cut
        assert ours > 10 * before, "tf32 was allowed and not used"
