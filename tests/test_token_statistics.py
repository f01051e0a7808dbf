"""Entropy and accuracy of each token against plain PyTorch on full logits."""

import pytest
import torch
import torch.nn.functional as F
from test_memory import MIB, Shape, make_inputs, usage
from torch.profiler import ProfilerActivity, profile

from torchtune_lce import linear_token_statistics
from torchtune_lce.options import Options
from torchtune_lce.token_statistics import token_statistics

# With 1 MiB of workspace several chunks of the vocabulary.
TOKENS, ENTRIES, WIDTH = (3, 41), 3001, 24


def make_tensors(dtype=torch.float32, device="cpu", bias=True):
    hidden = torch.randn(*TOKENS, WIDTH, device=device).to(dtype)
    weight = (torch.randn(ENTRIES, WIDTH, device=device) / 2).to(dtype)
    bias = torch.randn(ENTRIES, device=device).to(dtype) if bias else None
    best = F.linear(hidden, weight, bias).argmax(-1)
    # About half of them right, at both ends of the vocabulary too.
    targets = torch.where(
        torch.rand(TOKENS, device=device) < 0.5, best, torch.randint(0, ENTRIES, TOKENS, device=device)
    )
    targets[:, 5:8] = -100
    return hidden, weight, targets, bias


def plain(hidden, weight, bias, softcap=None):
    """Entropy and the most likely entry of each token, in float64, on logits rounded as the inputs' product is."""
    logits = F.linear(hidden, weight, bias).double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.distributions.Categorical(logits=logits).entropy(), logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0}, {"bias": False}], ids=["bias", "softcap", "plain"])
def test_equals_plain(settings, dtype):
    assert_equals_plain(settings, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_on_a_card(dtype):
    assert_equals_plain({"bias": False}, dtype, "cuda")


def assert_equals_plain(settings, dtype, device):
    hidden, weight, targets, bias = make_tensors(dtype, device, settings.get("bias", True))
    softcap = settings.get("softcap")
    entropy, correct = linear_token_statistics(hidden, weight, targets, bias, softcap=softcap, workspace_mib=1)
    expected, best = plain(hidden, weight, bias, softcap)
    valid = targets != -100
    assert entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert entropy.shape == correct.shape == targets.shape
    # A logit is rounded where the bias is added, here or in torch; entropy moves by the logits' own size at most.
    largest = F.linear(hidden, weight, bias).abs().max().item()
    error = (entropy - expected.where(valid, 0)).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * largest * (largest if dtype == torch.bfloat16 else 4)
    assert (entropy[~valid] == 0).all()
    assert not correct[~valid].any()
    sure = _by_margin(hidden, weight, bias, dtype)
    assert sure.float().mean() > 0.4
    assert torch.equal((correct & sure)[valid], ((best == targets) & sure)[valid])
    assert 0.2 < correct[valid].float().mean() < 0.8


def _by_margin(hidden, weight, bias, dtype):
    """Tokens whose first two entries are further apart than the rounding of their logits."""
    two = F.linear(hidden, weight, bias).double().topk(2).values
    return two[..., 0] - two[..., 1] > 4 * torch.finfo(dtype).eps * two[..., 0].abs()


def test_shift_and_ranks():
    hidden, weight, targets, bias = make_tensors()
    entropy, correct = linear_token_statistics(hidden, weight, targets, bias, shift=1)
    plain_entropy, plain_correct = linear_token_statistics(hidden[:, :-1], weight, targets[:, 1:].int(), bias)
    torch.testing.assert_close(entropy, F.pad(plain_entropy, (1, 0)))
    assert torch.equal(correct, F.pad(plain_correct, (1, 0)))
    flat = linear_token_statistics(hidden.flatten(0, 1), weight, targets.flatten(), bias)
    assert torch.equal(flat.correct, linear_token_statistics(hidden, weight, targets, bias).correct.flatten())


def test_extremes():
    """One certain token, one that knows nothing, an entry that cannot be, NaN; a tie goes to the first."""
    weight = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-200.0, 0.0]])
    hidden = torch.tensor([[5.0, 0.0], [0.0, 1.0], [torch.nan, 0.0], [-5.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    entropy, correct = linear_token_statistics(hidden, weight, torch.tensor([0, 0, 0, 0]), bias)
    assert entropy[0] == entropy[3] == 0
    assert entropy[1].item() == pytest.approx(torch.tensor(3.0).log().item())
    assert entropy[2].isnan()
    assert correct.tolist() == [True, True, False, False]
    assert not linear_token_statistics(hidden[:2], weight, torch.tensor([1, 1]), bias).correct.any()
    assert linear_token_statistics(hidden[:0], weight, torch.tensor([]).long()).entropy.shape == (0,)


def test_a_chunk_whose_entries_cannot_be():
    hidden, weight, targets, bias = make_tensors()
    bias[:1500] = -torch.inf
    expected, best = plain(hidden, weight, bias)
    targets = best.where(targets != -100, -100)
    entropy, correct = linear_token_statistics(hidden, weight, targets, bias, workspace_mib=1)
    valid = targets != -100
    torch.testing.assert_close(entropy[valid].double(), expected[valid], rtol=1e-5, atol=0)
    assert torch.equal(correct, valid)


def test_a_tie_of_two_chunks_goes_to_the_first():
    hidden, weight, targets, _ = make_tensors(bias=False)
    hidden[0, 0] = 9 * weight[10]
    weight[2000] = weight[10]
    for target, expected in ((10, True), (2000, False)):
        targets[0, 0] = target
        assert linear_token_statistics(hidden, weight, targets, workspace_mib=1).correct[0, 0] == expected


def test_no_gradient_and_one_graph():
    hidden, weight, targets, _ = make_tensors()
    hidden.requires_grad_()
    weight.requires_grad_()
    statistics = linear_token_statistics(hidden, weight, targets)
    assert not statistics.entropy.requires_grad
    compiled = torch.compile(linear_token_statistics, fullgraph=True, backend="aot_eager")(hidden, weight, targets)
    assert torch.equal(compiled.correct, statistics.correct)
    arguments = (hidden.detach().flatten(0, 1), weight.detach(), None, None, None, None, 3.0, 1)
    torch.library.opcheck(torch.ops.torchtune_lce.predictions.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    shape = Shape(tokens=256, vocabulary=8200, width=32)
    inputs = make_inputs(shape, dtype, torch.device("cpu"))
    linear_token_statistics(inputs["hidden"], inputs["weight"], inputs["targets"], workspace_mib=1)
    used = usage(
        lambda: linear_token_statistics(inputs["hidden"], inputs["weight"], inputs["targets"], workspace_mib=1),
        torch.device("cpu"),
        False,
    )
    assert used.peak <= MIB + 2 * shape.vectors()


def test_never_waits_for_the_device():
    """What would make a card wait, by the names that the profiler has for it; in the call below on a card itself."""
    hidden, weight, targets, bias = make_tensors()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        token_statistics(hidden.flatten(0, 1), weight, bias, targets.flatten(), Options(softcap=3.0, workspace_mib=1))
    names = {event.key for event in recorded.key_averages()}
    assert "aten::mm" in names
    assert not names & {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"}


@pytest.mark.gpu
def test_never_waits_for_the_card():
    hidden, weight, targets, bias = make_tensors(device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_token_statistics(hidden, weight, targets, bias, softcap=3.0, workspace_mib=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_input():
    hidden, weight, targets, bias = make_tensors()
    with pytest.raises(ValueError, match=r"targets must be ignore_index \(-100\) or in \[0, 3001\)"):
        linear_token_statistics(hidden, weight, targets + ENTRIES)
    with pytest.raises(ValueError, match="weight must have shape"):
        linear_token_statistics(hidden, weight.T, targets)
    with pytest.raises(ValueError, match="workspace_mib must be at least 1, got 0"):
        linear_token_statistics(hidden, weight, targets, workspace_mib=0)
