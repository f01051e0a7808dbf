"""What makes Triton's interpreter faster here gives the numbers that it gives itself, in each bit."""

import pytest
import torch
from replayed import nothing_replayed

from torchtune_lce import linear_cross_entropy

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
semantic = pytest.importorskip("triton.language.semantic")


@pytest.mark.parametrize(
    ("impl", "dtype", "trained", "settings"),
    [
        pytest.param("cce", torch.float16, 3, {"softcap": 20.0, "z_loss": 1e-3}, id="cce"),
        pytest.param("cce", torch.float32, 1, {"filter_eps": 1e-3}, id="cce-frozen-head"),
        pytest.param("cce_exact", torch.float32, 1, {"label_smoothing": 0.1}, id="cce_exact-frozen-head"),
    ],
)
def test_replayed_operations_have_the_bits_of_tritons_own(impl, dtype, trained, settings, device, monkeypatch):
    """Of a loss and its gradients, twice: what the first has recorded, the second replays."""
    if device.type != "cpu":
        pytest.skip("the kernels are compiled here")
    looked_up = []
    check = semantic.TritonSemantic.binary_op_type_checking_impl

    def counting(*arguments):
        looked_up.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(semantic.TritonSemantic, "binary_op_type_checking_impl", counting)
    hidden, weight = torch.randn(70, 40, dtype=dtype), torch.randn(150, 40, dtype=dtype)
    targets, bias = torch.randint(150, (70,)), torch.randn(150, dtype=dtype)
    targets[::7] = -100
    hidden[::2] = 3 * weight[targets[::2]]

    def results() -> list[torch.Tensor]:
        looked_up.clear()
        leaves = [tensor.detach().requires_grad_(i < trained) for i, tensor in enumerate((hidden, weight, bias))]
        losses = linear_cross_entropy(*leaves[:2], targets, leaves[2], reduction="none", impl=impl, **settings)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves[:trained])]

    recorded, replayed, looked_up_then = results(), results(), len(looked_up)
    with nothing_replayed():
        own = results()
    assert looked_up_then < len(looked_up) / 10
    for first, second, expected in zip(recorded, replayed, own, strict=True):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


@triton.jit
def _kernel(first, second, scalars, out, ZERO: tl.constexpr):
    at = tl.arange(0, 16)
    a, b = tl.load(first + at), tl.load(second + at)
    other, nothing = tl.load(scalars), tl.load(scalars + 1)
    tl.store(out + at, a * ZERO)
    tl.store(out + 16 + at, a * a)
    tl.store(out + 32 + at, a * b)
    tl.store(out + 48 + at, tl.where(a > b, other, tl.load(second + at, mask=at < 0, other=other)))
    tl.store(out + 64 + at, tl.load(first, mask=nothing > 0, other=other) + tl.zeros((16,), tl.float32))
    tl.store(out + 80 + at, tl.reduce(tl.join(a, b), 1, _second))


@triton.jit
def _second(first, second):
    return 3 * first - second


def test_a_recording_is_of_no_more_than_the_next_call_shares(device):
    """A zero of the other sign, one block given twice, and scalars of which one is zero and the next is not."""
    if device.type != "cpu":
        pytest.skip("the kernels are compiled here")
    a, b = torch.randn(16), torch.randn(16)

    def run(zero: float, other: float) -> torch.Tensor:
        scalars, out = torch.tensor([other, 0.0]), torch.empty(6, 16)
        _kernel[(1,)](a, b, scalars, out, ZERO=zero)
        # 0.0 equals -0.0, but not its bits.
        return out.view(torch.int32)

    for zero in (0.0, -0.0):
        for other in (0.0, 0.0, 0.0, 0.0, 5.0):
            actual = run(zero, other)
            with nothing_replayed():
                assert torch.equal(actual, run(zero, other))
