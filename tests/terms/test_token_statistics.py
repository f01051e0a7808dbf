"""Entropy and accuracy of each token against plain PyTorch on full logits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from allocations import MIB, Shape, make_inputs, usage
from common_logits import COMMON, inputs_with_a_common_logit
from torch.profiler import ProfilerActivity, profile

from torchtune_lce import linear_token_statistics
from torchtune_lce.implementations import walk
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.token_statistics import token_statistics

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


def plain(hidden, weight, bias, softcap=None, scale=1.0):
    """Entropy and the most likely entry of each token, in float64, on logits rounded as the inputs' product is."""
    logits = F.linear(hidden, weight, bias).double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = scale * logits
    return torch.distributions.Categorical(logits=logits).entropy(), logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 3.0, "scale": 1.7}, {"bias": False, "scale": 0.6}], ids=["bias", "softcap", "plain"]
)
def test_equals_plain(settings, dtype):
    assert_equals_plain(settings, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_on_a_card(dtype):
    assert_equals_plain({"bias": False}, dtype, "cuda")


def assert_equals_plain(settings, dtype, device):
    hidden, weight, targets, bias = make_tensors(dtype, device, settings.get("bias", True))
    softcap, scale = settings.get("softcap"), settings.get("scale", 1.0)
    options = {"softcap": softcap, "logit_scale": scale, "workspace_mib": 1}
    entropy, correct = linear_token_statistics(hidden, weight, targets, bias, **options)
    expected, best = plain(hidden, weight, bias, softcap, scale)
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


@pytest.mark.parametrize("where", ["bias", "logits", "all of them"])
@pytest.mark.parametrize("common", COMMON)
def test_a_common_logit_costs_no_digits(common, where, device):
    hidden, weight, bias, targets = inputs_with_a_common_logit(common, where, device)
    # The common column's gradient is a sum that cancels; where all logits are equal so is any.
    column = slice(None) if where == "bias" else slice(1, None)
    assert_as_in_float64(hidden, weight, bias, targets, column, 1e-6, gradients=where != "all of them")


@pytest.mark.parametrize("mask", [-torch.inf, *(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16))])
@pytest.mark.parametrize("first", [True, False])
def test_whole_chunks_whose_entries_cannot_be(mask, first, device):
    """Padding rows of a vocabulary, or all that the first chunk has."""
    hidden, weight, targets, bias = make_tensors(device=device)
    part = slice(None, 1500) if first else slice(1500, None)
    bias[part] = mask
    targets = targets.where(targets == -100, 1500 + first)
    assert_as_in_float64(hidden.flatten(0, 1), weight, bias, targets.flatten(), slice(None), 2e-6)


def test_a_certain_token_costs_no_digits(device):
    """1 - p near 1e-5: the entropy is what the others have."""
    weight, targets = F.normalize(torch.randn(ENTRIES, 64, device=device), dim=-1), torch.arange(40, device=device)
    bias = torch.zeros(ENTRIES, device=device)
    entropy = assert_as_in_float64(22 * weight[targets], weight, bias, targets, slice(None), 2e-5)
    assert 1e-6 < entropy.median() < 1e-3


def assert_as_in_float64(hidden, weight, bias, targets, column, tolerance, gradients=True):
    """The exact entropy [N], which ours and its gradients agree with."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        if dtype == torch.float32:
            entropy, _ = linear_token_statistics(*leaves[:2], targets, leaves[2], workspace_mib=1)
        else:
            log_softmax = F.linear(*leaves).log_softmax(-1)
            # No product with what is infinite.
            log_softmax = log_softmax.masked_fill(log_softmax < -1000, -1000)
            entropy = -(log_softmax.exp() * log_softmax).sum(-1).where(targets != -100, 0)
        d_hidden, d_weight, d_bias = torch.autograd.grad(entropy.sum(), leaves)
        results.append([entropy.detach(), *([d_hidden[:, column], d_weight[:, column], d_bias] if gradients else [])])
    for name, ours, exact in zip(("entropy", "hidden", "weight", "bias"), *results, strict=False):
        error = ((ours.double() - exact).norm() / exact.norm()).item()
        assert error < tolerance, f"{name} is {error:.1e} off"
    return results[1][0]


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize(
    "case", [{"logit_scale": 0.6}, {"softcap": 3.0, "logit_scale": 1.7}, {"shift": 2}, {"dtype": torch.bfloat16}]
)
def test_gradient_of_the_entropy(case, frozen):
    assert_gradient_of_the_entropy(dict(case), frozen, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_entropy_on_a_card(dtype):
    assert_gradient_of_the_entropy({"dtype": dtype, "softcap": 3.0}, (), "cuda")


def assert_gradient_of_the_entropy(case, frozen, device):
    """Against autograd through full logits in float64, from an upstream gradient that differs from token to token."""
    dtype = case.pop("dtype", torch.float32)
    hidden, weight, targets, bias = make_tensors(dtype, device)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with torch.no_grad():
        hidden[0, 5] = torch.nan  # ignored
    upstream = torch.randn(TOKENS, device=device)
    entropy, correct = linear_token_statistics(**leaves, targets=targets, workspace_mib=1, **case)
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    found = torch.autograd.grad(entropy, trained, upstream.to(entropy.dtype))
    assert not correct.requires_grad

    wide = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    logits = F.linear(wide["hidden"].nan_to_num(), wide["weight"], wide["bias"])
    if "softcap" in case:
        logits = case["softcap"] * torch.tanh(logits / case["softcap"])
    logits = logits * case.get("logit_scale", 1)
    exact = torch.distributions.Categorical(logits=logits).entropy()
    shift = case.get("shift", 0)
    exact = F.pad(exact[:, : exact.shape[1] - shift], (shift, 0)).where(targets != -100, 0)
    expected = torch.autograd.grad(exact, [leaf for leaf in wide.values() if leaf.requires_grad], upstream.double())
    # Rounded logits, up to 9 here, whose error is e's; gradients rounded for the products and the results: a few
    # roundings of either.
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert wanted.norm() > 0
        assert (ours.double() - wanted).norm() <= 10 * torch.finfo(dtype).eps * wanted.norm()


def test_gradient_of_the_entropy_at_extremes():
    """Of a certain token and beside entries that cannot be: no NaN, and none where nothing moves it."""
    weight = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-200.0, 0.0]])
    hidden = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.01, 1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    entropy, _ = linear_token_statistics(hidden, weight, torch.tensor([0, 0, 0]), bias)
    (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
    assert (gradient[0] == 0).all()
    leaf = hidden.detach()[1:].double().requires_grad_()
    exact = torch.distributions.Categorical(logits=F.linear(leaf, weight[[0, 1, 3]].double())).entropy()
    (expected,) = torch.autograd.grad(exact.sum(), leaf)
    torch.testing.assert_close(gradient[1:].double(), expected, rtol=1e-5, atol=1e-5)
    none, _ = linear_token_statistics(hidden, weight, torch.tensor([-100, -100, -100]), bias)
    assert not torch.autograd.grad(none.sum(), hidden)[0].any()


def test_derivatives_that_there_are_not():
    hidden, weight, targets, _ = make_tensors()
    hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_token_statistics(hidden, weight, targets).entropy.requires_grad
    (gradient,) = torch.autograd.grad(
        linear_token_statistics(hidden, weight, targets)[0].sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="the entropy of linear_token_statistics has no second derivative"):
        torch.autograd.grad(gradient.sum(), hidden)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: linear_token_statistics(x, weight, targets)[0], (hidden,), (hidden,))


def test_one_graph():
    hidden, weight, targets, _ = make_tensors()
    hidden.requires_grad_()
    weight.requires_grad_()
    statistics = linear_token_statistics(hidden, weight, targets)
    compiled = torch.compile(linear_token_statistics, fullgraph=True, backend="aot_eager")(hidden, weight, targets)
    assert torch.equal(compiled.correct, statistics.correct)
    gradients = (torch.autograd.grad(x.entropy.sum(), (hidden, weight)) for x in (statistics, compiled))
    for eager, graph in zip(*gradients, strict=True):
        assert torch.equal(eager, graph)
    constants = (hidden.detach().flatten(0, 1), weight.detach(), None, None, None, None)
    torch.library.opcheck(torch.ops.torchtune_lce.predictions.default, (*constants, 3.0, 0.5, 1))
    largest, _, others, disorder = torch.ops.torchtune_lce.predictions(*constants, 3.0, 0.5, 1)
    trained = (constants[0].clone().requires_grad_(), weight, *constants[2:])
    arguments = (*trained, targets.flatten(), largest, others, disorder, -100, 3.0, 0.5, 1)
    torch.library.opcheck(torch.ops.torchtune_lce.entropy.default, arguments)


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


def test_memory_of_what_is_widened():
    """A CPU widens hidden states of 16 bits: some at a time, as all would not fit."""
    shape = Shape(tokens=192, vocabulary=700, width=1024)
    inputs = make_inputs(shape, torch.bfloat16, torch.device("cpu"))
    arguments = inputs["hidden"], inputs["weight"], inputs["targets"]
    entropy, _ = linear_token_statistics(*arguments, workspace_mib=1)
    used = usage(lambda: linear_token_statistics(*arguments, workspace_mib=1), torch.device("cpu"), False)
    assert used.peak <= MIB + 2 * shape.vectors()
    exact, _ = plain(inputs["hidden"].double(), inputs["weight"].double(), None)
    torch.testing.assert_close(entropy.double(), exact.where(inputs["targets"] != -100, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bytes_of_entry"), [(torch.float32, 2 * 4), (torch.bfloat16, 2 * 4 + 2)], ids=str)
def test_strips_as_wide_as_the_workspace_holds(dtype, bytes_of_entry, monkeypatch):
    """However large the hidden states are, which a card takes as they are: each strip is some launches."""
    monkeypatch.setattr(walk, "_WIDENING", ())
    shape = Shape(tokens=256, vocabulary=2000, width=2048)
    inputs = make_inputs(shape, dtype, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.no_grad():
        linear_token_statistics(inputs["hidden"], inputs["weight"], inputs["targets"], workspace_mib=1)
    strips = next(event.count for event in recorded.key_averages() if event.key == "aten::mm")
    # Of whole 64 entries.
    assert strips == math.ceil(shape.vocabulary / (MIB // (shape.tokens * bytes_of_entry) // 64 * 64))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_memory_of_the_gradient(softcap):
    shape = Shape(tokens=256, vocabulary=8200, width=32)
    inputs = make_inputs(shape, torch.float32, torch.device("cpu"))
    settings = {"softcap": softcap, "workspace_mib": 1}
    entropy, _ = linear_token_statistics(inputs["hidden"], inputs["weight"], inputs["targets"], **settings)
    used = usage(entropy.sum().backward, torch.device("cpu"), False)
    states = 4 * shape.tokens * shape.width
    gradients = 4 * shape.vocabulary * shape.width + states
    assert gradients <= used.peak <= MIB + gradients + 3 * states + 2 * shape.vectors()


def test_a_target_that_nobody_could_look_at_is_not_correct():
    """As on a card: a label out of range becomes entry 0, which is here the most likely one."""
    hidden, weight = torch.ones(3, 4), torch.zeros(ENTRIES, 4)
    weight[0] = 1
    call = checked(hidden, weight, torch.tensor([0, -100, 0]), None, options=Options())
    labels = torch.tensor([0, -100, ENTRIES])
    _, correct = token_statistics(replace(call, labels=labels, in_range=False))
    assert correct.tolist() == [True, False, False]


def test_never_waits_for_the_device():
    """What would make a card wait, by the names that the profiler has for it; in the call below on a card itself."""
    hidden, weight, targets, bias = make_tensors()
    # The check does wait: it looks at the targets, which lie on a CPU here.
    call = checked(hidden, weight, targets, bias, options=Options(softcap=3.0, workspace_mib=1))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        token_statistics(call)
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
