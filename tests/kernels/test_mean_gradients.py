"""Gradients by means of capped logits, added to those that are there: in pieces of tokens, parts of the vocabulary, and
beside what is not finite."""

import dataclasses
import gc

import pytest
import torch
from allocations import MIB, WORKSPACE_MIB, Shape, gradient_bytes, make_inputs, usage
from calls import compute

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy
from torchtune_lce.inputs.options import Options
from torchtune_lce.kernels import autograd, mean_gradients, tuning
from torchtune_lce.kernels.operands import Gradients, Operands
from torchtune_lce.kernels.places import compact

TOKENS, ENTRIES, WIDTH, RANK = 300, 200, 48, 5
SOFTCAP, SCALE = 2.0, 1.5
NAMES = ("hidden", "weight", "bias", "low", "up", "scale")


def values_of(device, dtype, adapter, ignored):
    """Of every operand, and the targets; hidden states of ignored tokens are NaN, where there are any."""
    sizes = {"hidden": (TOKENS, WIDTH), "weight": (ENTRIES, WIDTH), "bias": (ENTRIES,)}
    if adapter:
        sizes |= {"low": (TOKENS, RANK), "up": (ENTRIES, RANK), "scale": (ENTRIES,)}
    values = {name: (torch.randn(sizes[name]) / 3).to(device, dtype) for name in sizes}
    targets = torch.randint(0, ENTRIES, (TOKENS,), device=device)
    if ignored:
        targets[::3] = -100
        values["hidden"][::3] = torch.nan
    if adapter:
        values["scale"] = 1 + values["scale"].float()
        values["scale"][7] = 0  # nothing may be divided by it
    return values, targets


def exact(values, valid, upstream):
    """By all operands, in float64."""
    leaves = {name: x.double().requires_grad_() for name, x in values.items()}
    logits = leaves["hidden"].where(valid[:, None], 0) @ leaves["weight"].T + leaves["bias"]
    if "low" in leaves:
        logits = (logits + leaves["low"] @ leaves["up"].T) * leaves["scale"]
    means = (SCALE * SOFTCAP * torch.tanh(logits / SOFTCAP)).mean(-1).where(valid, 0)
    return dict(zip(leaves, torch.autograd.grad(means, [*leaves.values()], upstream.double()), strict=True))


def by_kernels(values, targets, upstream, workspace, config):
    """Added to ones."""
    rows, _, count, _ = compact(targets, -100, ENTRIES)
    bias, low, up, scale = (values.get(name) for name in ("bias", "low", "up", "scale"))
    operands = Operands(values["hidden"], values["weight"], bias, low, up, SOFTCAP, SCALE, scale)
    wide = {"low": torch.float32}
    made = {name: torch.ones_like(x, dtype=wide.get(name, x.dtype)) for name, x in values.items()}
    gradients = Gradients(*(made.get(name) for name in NAMES))
    mean_gradients.add_mean_gradients(upstream, operands, rows, count, gradients, workspace, config)
    return made


@pytest.mark.parametrize(
    ("dtype", "adapter", "workspace", "copies"),
    [
        (torch.float32, False, 2**13, False),  # ten pieces
        (torch.float32, True, 2**26, False),
        (torch.float16, True, 2**13, False),  # and parts of the vocabulary
        (torch.float16, False, 2**26, True),
        (torch.float32, False, 2**15, True),  # pieces of which the last is the shortest
        pytest.param(torch.bfloat16, True, 2**26, False, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, False, 2**20, False, marks=pytest.mark.gpu),
    ],
)
def test_equal_float64(dtype, adapter, workspace, copies, device):
    """With an adapter and without; ``copies`` by the copy engine, which the interpreter is made to use."""
    config = tuning.config_for(device, dtype)
    if copies:
        config = dataclasses.replace(config, tma=True, stores_transposed=True)
    values, targets = values_of(device, dtype, adapter, ignored=workspace != 2**15)
    valid, upstream = targets != -100, torch.linspace(-1, 3, TOKENS, device=device)
    made = by_kernels(values, targets, upstream, workspace, config)
    eps = torch.finfo(dtype).eps
    for name, gradient in exact(values, valid, upstream).items():
        error = (made[name].double() - 1 - gradient).abs()
        # What it is added to, and is rounded with, is 1.
        assert error.max() <= eps * (1 + 2 * gradient.abs().max()) + 1e-6, name
        if name in ("hidden", "low"):
            assert (made[name][~valid] == 1).all()


def inputs(device, frozen=()):
    tensors = {
        "hidden": torch.randn(70, WIDTH, device=device),
        "weight": torch.randn(ENTRIES, WIDTH, device=device),
        "bias": torch.randn(ENTRIES, device=device),
    }
    tensors = {name: x.requires_grad_(name not in frozen) for name, x in tensors.items()}
    targets = torch.randint(0, ENTRIES, (70,), device=device)
    targets[5:20] = -100
    return tensors, targets


SETTINGS = {"label_smoothing": 0.2, "softcap": SOFTCAP, "logit_scale": SCALE, "reduction": "none"}


@pytest.mark.parametrize(
    ("where", "value"),
    [("bias", -torch.inf), ("bias", torch.nan), ("weight", torch.nan), ("hidden", torch.nan), ("hidden", torch.inf)],
)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
def test_what_is_not_finite_goes_as_far_as_in_chunked(frozen, where, value, device):
    """And ignored tokens stay nothing. What a softcap masks has a logit of -softcap, and no gradient."""
    tensors, targets = inputs(device, frozen)
    with torch.no_grad():
        tensors[where][33] = value
    trained = [x for x in tensors.values() if x.requires_grad]
    results, upstream = [], torch.linspace(1, 2, 70, device=device)
    for impl in ("cce", "chunked"):
        losses = linear_cross_entropy(**tensors, targets=targets, impl=impl, filter_eps=None, **SETTINGS)
        results.append([losses.detach(), *torch.autograd.grad(losses, trained, upstream)])
        assert not results[-1][0][5:20].any()
        assert not results[-1][1][5:20].any()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
def test_a_second_backward(frozen, device):
    """With other upstream gradients, also by a log-sum-exp, what is saved has not changed."""
    tensors, targets = inputs(device, frozen)
    trained = [x for x in tensors.values() if x.requires_grad]

    def step():
        return linear_cross_entropy(**tensors, targets=targets, impl="cce", return_lse=True, **SETTINGS)

    ones = torch.ones(70, device=device)
    results = step()
    torch.autograd.grad(results, trained, (ones, ones), retain_graph=True)
    upstream = torch.randn(70, device=device), torch.randn(70, device=device)
    for again, once in zip(
        torch.autograd.grad(results, trained, upstream), torch.autograd.grad(step(), trained, upstream), strict=True
    ):
        assert torch.equal(again, once)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
def test_one_graph_under_a_compiler(frozen, device):
    torch._dynamo.reset()
    tensors, targets = inputs(device, frozen)
    trained = [x for x in tensors.values() if x.requires_grad]

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias, impl="cce", **SETTINGS).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both = [torch.autograd.grad(function(*tensors.values()), trained) for function in (compiled, loss)]
    for graph, eager in zip(*both, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "trained"),
    [
        pytest.param(Shape(256, 1300, 32), True, id="long"),
        pytest.param(Shape(8192, 128_256, 2048), True, marks=pytest.mark.gpu, id="trained-large"),
        pytest.param(Shape(8192, 128_256, 2048), False, marks=pytest.mark.gpu, id="frozen-large"),
    ],
)
def test_memory(shape, trained, device, monkeypatch):
    """The bounds without smoothing: one workspace, no second gradient of a trained weight."""
    on_card = device.type == "cuda"
    inputs = make_inputs(shape, torch.bfloat16 if on_card else torch.float32, device, bias=True)
    for name in ("weight", "bias"):
        inputs[name].requires_grad_(trained)
    workspace_mib = 128 if on_card else WORKSPACE_MIB
    options = Options(workspace_mib=workspace_mib, softcap=SOFTCAP, label_smoothing=0.2)

    if not on_card:
        add = autograd.add_mean_gradients

        def collected(*arguments):
            # Or the arguments of the interpreter's kernels before would be there too.
            gc.collect()
            add(*arguments)

        monkeypatch.setattr(autograd, "add_mean_gradients", collected)

    def loss():
        return compute(**inputs, options=options, impl="cce")

    loss().backward()
    for tensor in inputs.values():
        tensor.grad = None
    held = []
    forward = usage(lambda: held.append(loss()), device, not on_card)
    backward = usage(lambda: held.pop().backward(), device, not on_card)
    kept = 0 if trained else inputs["hidden"].nbytes
    bits = -(-shape.tokens // 32) * (shape.vocabulary + 1024) // 8
    assert forward.kept <= kept + shape.vectors() + bits
    assert forward.peak <= workspace_mib * MIB + kept + 2 * shape.vectors()
    assert backward.peak <= workspace_mib * MIB + gradient_bytes(inputs) + 2 * shape.vectors()


def test_nothing_is_added_without_a_gradient(device):
    """A loss alone, of which no mean has an upstream gradient: as without smoothing."""
    tensors, targets = inputs(device)
    settings = SETTINGS | {"reduction": "mean"}
    _, lse = linear_cross_entropy(**tensors, targets=targets, impl="cce", return_lse=True, **settings)
    _, plain = linear_cross_entropy(
        **tensors, targets=targets, impl="cce", return_lse=True, **settings | {"label_smoothing": 0.0}
    )
    ones = torch.ones(70, device=device)
    for one, other in zip(
        torch.autograd.grad(lse, [*tensors.values()], ones),
        torch.autograd.grad(plain, [*tensors.values()], ones),
        strict=True,
    ):
        assert torch.equal(one, other)
