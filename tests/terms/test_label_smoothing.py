"""Label smoothing in every implementation, against F.cross_entropy's in float64 on full logits, with gradients."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from allocations import MIB, WIDE, WORKSPACE_MIB, Shape, gradient_bytes, make_inputs, usage
from calls import compute
from fused_steps import steps_as
from torch.profiler import ProfilerActivity, profile

from torchtune_lce import LinearCrossEntropyLoss, linear_cross_entropy
from torchtune_lce.implementations import chunked
from torchtune_lce.inputs import dtypes
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.label_smoothing import smooth, with_mean_logits

TOKENS, ENTRIES, WIDTH = (3, 23), 301, 40
SMOOTHING = 0.2


def make_tensors(device, dtype=torch.float32, frozen=()):
    tensors = {
        "hidden": torch.randn(*TOKENS, WIDTH, device=device),
        "weight": torch.randn(ENTRIES, WIDTH, device=device) / 3,
        "bias": torch.randn(ENTRIES, device=device),
    }
    tensors = {name: tensor.to(dtype).requires_grad_(name not in frozen) for name, tensor in tensors.items()}
    targets = torch.randint(0, ENTRIES, TOKENS, device=device)
    targets[:, 3:7] = -100
    return tensors, targets


def plain(
    tensors, targets, dtype, *, shift=0, reduction="mean", z_loss=0.0, smoothing=SMOOTHING, softcap=None, scale=1.0
):
    """The loss in ``dtype`` on full logits, and the leaves that it was made of."""
    leaves = {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in tensors.items()}
    labels = targets[:, shift:].flatten()
    logits = F.linear(leaves["hidden"][:, : targets.shape[1] - shift].flatten(0, 1), leaves["weight"], leaves["bias"])
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits * scale
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square().where(labels != -100, 0)
    if reduction == "none":
        return F.pad(losses.view(targets.shape[0], -1), (shift, 0)), leaves
    return (losses.sum() / (labels != -100).sum() if reduction == "mean" else losses.sum()), leaves


def pulled(loss, tensors) -> list[torch.Tensor]:
    """The loss and all gradients, from an upstream gradient that is neither 1 nor the same for every token."""
    upstream = torch.linspace(1, 3, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    trained = [x for x in tensors.values() if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, upstream)]


def assert_as_accurate_as_torch(ours, native, exact, dtype) -> None:
    for actual, torchs, expected in zip(ours, native, exact, strict=True):
        errors = [((result.double() - expected).norm() / expected.norm()).item() for result in (actual, torchs)]
        # torch's own error may be small by luck: a few roundings more.
        assert errors[0] <= 2 * errors[1] + 3 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float64).eps


# Its weight's gradient is many times the workspace of 1 MiB.
HEAVY = Shape(tokens=64, vocabulary=3000, width=512)
CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none, shift": {"reduction": "none", "shift": 2},
    "z-loss": {"z_loss": 0.3, "shift": 1},
    "uniform alone": {"smoothing": 1.0},
    "softcap": {"softcap": 2.0, "reduction": "sum"},
    "scale": {"scale": 0.6, "z_loss": 0.3},
    "scale, softcap": {"scale": 1.7, "softcap": 2.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["chunked", "torch_compile", "reference"])
def test_equals_cross_entropy(impl, case):
    with steps_as():
        assert_equals_cross_entropy(impl, CASES[case], *make_tensors("cpu"))


@pytest.mark.parametrize(
    ("impl", "case"), [("cce", "none, shift"), ("cce", "z-loss"), ("cce_exact", "sum"), ("cce", "scale")]
)
def test_kernels_equal_cross_entropy(impl, case, device):
    """Not every case: each takes Triton's interpreter seconds, and what is on top of them is the same code."""
    assert_equals_cross_entropy(impl, CASES[case], *make_tensors(device))


@pytest.mark.parametrize(
    ("impl", "dtype", "frozen", "case"),
    [
        ("cce", torch.float32, (), {"z_loss": 0.3, "scale": 1.7}),
        ("cce", torch.float16, ("weight", "bias"), {"reduction": "none", "shift": 2}),
        ("cce", torch.float16, ("bias",), {"reduction": "sum"}),
        ("cce_exact", torch.float16, (), {}),
        ("cce_exact", torch.float32, ("hidden", "weight"), {"scale": 0.6, "reduction": "sum"}),
        ("cce_kahan_full_e", torch.float32, ("weight",), {"smoothing": 1.0}),
    ],
)
def test_kernels_beside_a_softcap(impl, dtype, frozen, case, device):
    """The mean of capped logits is a sum over all of them, in either way that the kernels take."""
    assert_equals_cross_entropy(impl, {"softcap": 2.0, **case}, *make_tensors(device, dtype, frozen))


FROZEN = [("weight", "bias"), ("hidden",), ("bias",), ("hidden", "weight")]


@pytest.mark.parametrize(
    ("impl", "frozen"),
    [
        *itertools.product(["chunked", "reference"], FROZEN),
        *itertools.product(["cce"], FROZEN[:2]),
        ("cce_exact", FROZEN[0]),
    ],
)
def test_frozen_inputs(impl, frozen, device):
    tensors, targets = make_tensors(device, frozen=frozen)
    assert_equals_cross_entropy(impl, {}, tensors, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", ["chunked", "torch_compile", "reference"])
def test_dtypes(impl, dtype):
    with steps_as():
        assert_equals_cross_entropy(impl, {}, *make_tensors("cpu", dtype))


@pytest.mark.parametrize("frozen", [(), FROZEN[0]], ids=["trained", "frozen"])
def test_on_a_device_without_float64(frozen, monkeypatch, tmp_path):
    """As MPS, which makes no such tensor: none is made here, and the loss is as accurate."""
    monkeypatch.setattr(dtypes, "_WITHOUT_FLOAT64", ("cpu",), raising=False)
    tensors, targets = make_tensors("cpu", frozen=frozen)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        linear_cross_entropy(**tensors, targets=targets, label_smoothing=SMOOTHING, impl="chunked").backward()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    types = types_of_matrices_and_vectors(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert "float" in types
    assert "double" not in types
    assert_equals_cross_entropy("chunked", {}, tensors, targets)


def types_of_matrices_and_vectors(events: list[dict]) -> set[str]:
    """A number of Python's is a double of no dimension in a trace."""
    calls = [event["args"] for event in events if "Input type" in event.get("args", {})]
    inputs = (zip(call["Input type"], call["Input Dims"], strict=True) for call in calls)
    return {kind for arguments in inputs for kind, shape in arguments if shape}


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("impl", ["cce", "cce_exact", "chunked", "reference", "torch_compile"])
def test_bfloat16_on_a_card(impl, softcap, device):
    case = {"reduction": "sum", "softcap": softcap}
    assert_equals_cross_entropy(impl, case, *make_tensors(device, torch.bfloat16))


def assert_equals_cross_entropy(impl, case, tensors, targets) -> None:
    settings = {"smoothing": SMOOTHING} | case
    dtype = tensors["hidden"].dtype
    options = Options(
        label_smoothing=settings["smoothing"],
        z_loss=settings.get("z_loss", 0.0),
        softcap=settings.get("softcap"),
        logit_scale=settings.get("scale", 1.0),
        workspace_mib=1,
    )
    loss = compute(
        **tensors,
        targets=targets,
        options=options,
        reduction=settings.get("reduction", "mean"),
        shift=settings.get("shift", 0),
        impl=impl,
        return_lse=False,
    )
    native, exact = (plain(tensors, targets, wanted, **settings) for wanted in (dtype, torch.float64))
    assert_as_accurate_as_torch(pulled(loss, tensors), pulled(*native), pulled(*exact), dtype)


@pytest.mark.parametrize("mask", [-torch.inf, *(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16))])
@pytest.mark.parametrize("impl", ["cce", "chunked", "reference"])
def test_beside_a_masked_vocabulary(impl, mask, device):
    """A token aims at what is masked too: its loss is infinite, or as large as the bias is small."""
    tensors, targets = make_tensors(device)
    with torch.no_grad():
        tensors["bias"][:270] = mask
    targets = targets.where(targets == -100, 280)
    loss = linear_cross_entropy(**tensors, targets=targets, label_smoothing=SMOOTHING, impl=impl, reduction="none")
    ours = pulled(loss, tensors)
    exact = pulled(*plain(tensors, targets, torch.float64, reduction="none"))
    assert torch.equal(ours[0].isinf(), exact[0].isinf())
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            actual.double(), expected, rtol=2e-6, atol=2e-6 * expected[expected.isfinite()].abs().max()
        )


@pytest.mark.parametrize("impl", ["cce", "chunked", "reference"])
def test_all_ignored_and_no_tokens(impl, device):
    tensors, targets = make_tensors(device)
    for tokens in (slice(None), slice(0)):
        hidden = tensors["hidden"].detach()[tokens].requires_grad_()
        ignored = torch.full_like(targets[tokens], -100)
        loss = linear_cross_entropy(hidden, tensors["weight"], ignored, label_smoothing=SMOOTHING, impl=impl)
        assert loss == 0
        for gradient in torch.autograd.grad(loss, (hidden, tensors["weight"])):
            assert not gradient.any()


@pytest.mark.parametrize("impl", ["chunked", "cce"])
def test_ignored_tokens_may_hold_nan(impl, device):
    """As hidden states of padding do where attention saw nothing."""
    tensors, targets = make_tensors(device)
    results = []
    for value in (0.0, torch.nan):
        with torch.no_grad():
            tensors["hidden"][targets == -100] = value
        loss = linear_cross_entropy(**tensors, targets=targets, label_smoothing=SMOOTHING, impl=impl)
        results.append(pulled(loss, tensors))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_uniform_part_is_never_filtered(device):
    """With a threshold that leaves out whole tiles, the rows of their entries get the uniform part, and it alone."""
    weight = torch.zeros(512, WIDTH, device=device)
    weight[:64] = torch.randn(64, WIDTH, device=device) * 3
    # What is not among the first 64 is never probable.
    hidden = torch.randn(64, WIDTH, device=device)
    hidden[:, 0] = 30.0
    weight[:64, 0], weight[64:, 0] = 1.0, -1.0
    weight.requires_grad_()
    targets = torch.randint(0, 64, (64,), device=device)
    loss = linear_cross_entropy(hidden, weight, targets, label_smoothing=SMOOTHING, impl="cce", filter_eps=0.02)
    (gradient,) = torch.autograd.grad(loss, weight)
    uniform = -SMOOTHING / 512 * hidden.mean(0)
    torch.testing.assert_close(gradient[256:], uniform.expand(256, -1), rtol=1e-5, atol=1e-9)


def test_log_sum_exp_is_not_smoothed(device):
    tensors, targets = make_tensors(device)
    _, lse = linear_cross_entropy(**tensors, targets=targets, label_smoothing=SMOOTHING, return_lse=True)
    _, expected = linear_cross_entropy(**tensors, targets=targets, return_lse=True)
    assert torch.equal(lse, expected)
    for one, other in zip(pulled(lse, tensors), pulled(expected, tensors), strict=True):
        assert torch.equal(one, other)


def test_second_derivatives():
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 3])

    def loss(hidden, weight, impl="reference"):
        return linear_cross_entropy(hidden, weight, targets, label_smoothing=0.3, impl=impl)

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("impl", ["chunked", "cce"])
@pytest.mark.parametrize("way", ["grad", "backward", "hessian"])
def test_second_derivatives_are_refused(way, impl, device):
    """In the words that each has without smoothing, however they are asked for."""
    tensors, targets = make_tensors(device)

    def loss(hidden):
        settings = {"label_smoothing": SMOOTHING, "impl": impl}
        return linear_cross_entropy(hidden, tensors["weight"], targets, tensors["bias"], **settings)

    def second():
        if way == "hessian":
            return torch.autograd.functional.hessian(loss, tensors["hidden"].detach())
        value = loss(tensors["hidden"])
        (gradient,) = torch.autograd.grad(value, tensors["hidden"], create_graph=True)
        penalised = value + gradient.square().sum()
        return penalised.backward() if way == "backward" else torch.autograd.grad(penalised, [*tensors.values()])

    with pytest.raises(RuntimeError, match=rf"impl='{impl}' .*no second derivative \(create_graph=True\); set impl="):
        second()


def test_derivatives_of_the_sums():
    hidden, row = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), 3))
    valid = torch.tensor([True, True, False, True, True])

    def products(hidden, row):
        return torch.ops.torchtune_lce.row_products(hidden, row, valid, 1)

    assert torch.autograd.gradcheck(products, (hidden, row))
    assert torch.autograd.gradgradcheck(products, (hidden, row))
    arguments = [x.detach().requires_grad_() for x in (hidden, row)]
    torch.library.opcheck(torch.ops.torchtune_lce.row_products.default, (*arguments, valid, 1))
    scale = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: torch.ops.torchtune_lce.row_sum(*given, 1), (hidden, scale))
    assert torch.autograd.gradgradcheck(lambda *given: torch.ops.torchtune_lce.row_sum(*given, 1), (hidden, scale))
    for factors in (None, scale.detach().requires_grad_()):
        torch.library.opcheck(torch.ops.torchtune_lce.row_sum.default, (arguments[0], factors, 1))


def test_vmap(device):
    tensors, targets = make_tensors(device)

    def loss(hidden):
        settings = {"label_smoothing": SMOOTHING, "impl": "cce"}
        return linear_cross_entropy(hidden, tensors["weight"].detach(), targets[0], **settings)

    hidden = tensors["hidden"].detach()
    torch.testing.assert_close(torch.vmap(loss)(hidden), torch.stack([*map(loss, hidden)]))


def test_bits_of_a_token_depend_on_it_alone(device):
    """Neither on the workspace, which cuts the sums into pieces, nor on the other tokens."""
    tokens, width = 300, 1024
    hidden = torch.randn(tokens, width, device=device)
    row = torch.ops.torchtune_lce.row_sum(torch.randn(200, width, device=device), None, 1)
    valid = torch.ones(tokens, dtype=torch.bool, device=device)

    def products(tokens: int, workspace_mib: int) -> torch.Tensor:
        # Rounded, as the loss has them.
        return torch.ops.torchtune_lce.row_products(hidden[:tokens], row, valid[:tokens], workspace_mib).float()

    whole = products(tokens, 128)
    assert torch.equal(products(tokens, 1), whole)
    for some in (1, 43):
        assert torch.equal(products(some, 128), whole[:some])


@pytest.mark.parametrize(
    ("impl", "frozen"),
    [("chunked", ()), ("reference", ("weight", "bias")), pytest.param("cce", (), marks=pytest.mark.gpu)],
)
def test_one_graph_under_a_compiler(impl, frozen, device):
    torch._dynamo.reset()
    tensors, targets = make_tensors(device, frozen=frozen)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias, label_smoothing=SMOOTHING, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both = [pulled(function(*tensors.values()), tensors) for function in (compiled, loss)]
    for graph, eager in zip(*both, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(WIDE, torch.float32), (HEAVY, torch.float32), (HEAVY, torch.bfloat16)],
    ids=["wide-float32", "heavy-float32", "heavy-bfloat16"],
)
def test_memory(shape, trained, dtype):
    """The bounds of test_memory.py for the implementation without it: no second [V, D], no second [N, D]."""
    inputs = make_inputs(shape, dtype, torch.device("cpu"))
    inputs["weight"].requires_grad_(trained)
    options = Options(workspace_mib=WORKSPACE_MIB, label_smoothing=SMOOTHING)

    def loss():
        return compute(**inputs, options=options, reduction="mean", shift=0, impl="chunked", return_lse=False)

    held = []
    forward = usage(lambda: held.append(loss()), torch.device("cpu"), False)
    backward = usage(lambda: held.pop().backward(), torch.device("cpu"), False)
    vectors = shape.vectors() + 16 * shape.width
    copies = shape.tokens * shape.width * (dtype.itemsize + 8)
    # Made by the forward, or by the backward; with a frozen head by both.
    gradients = gradient_bytes(inputs)
    assert forward.kept <= gradients + vectors
    assert forward.peak - forward.kept <= WORKSPACE_MIB * MIB + copies + vectors
    most = WORKSPACE_MIB * MIB + copies + gradients + vectors
    assert forward.kept + backward.peak <= most + (0 if trained else gradients)


@pytest.mark.parametrize("shape", [WIDE, HEAVY], ids=["wide", "heavy"])
def test_memory_around_an_implementation(shape):
    """What `cce` gets: no second [V, D] for the sums' gradient, and one [N, D] once the implementation's are gone."""
    inputs = make_inputs(shape, torch.float32, torch.device("cpu"))
    options = Options(workspace_mib=WORKSPACE_MIB, label_smoothing=SMOOTHING)

    def plain_losses(call):
        return chunked.token_losses(replace(call, options=replace(options, label_smoothing=0.0)))

    def loss():
        return smooth(with_mean_logits(plain_losses)(checked(**inputs, options=options)), options).sum()

    held = []
    forward = usage(lambda: held.append(loss()), torch.device("cpu"), False)
    backward = usage(lambda: held.pop().backward(), torch.device("cpu"), False)
    states = 4 * shape.tokens * shape.width
    vectors = 2 * shape.vectors() + 32 * shape.width
    assert forward.kept <= vectors
    assert forward.peak <= WORKSPACE_MIB * MIB + states + vectors
    assert backward.peak <= WORKSPACE_MIB * MIB + 3 * states + gradient_bytes(inputs) + vectors


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce", "chunked"])
def test_memory_on_a_card(impl, device):
    """Beyond the workspace, which a forward need not fill without, smoothing adds next to nothing to the peaks; the
    weight's gradient alone is 512 MiB, and a copy of it in float64 would be 2 GiB."""
    hidden = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128_256, 2048, device=device) / 30).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 128_256, (4096,), device=device)
    peaks = []
    for smoothing in (0.0, SMOOTHING):
        losses, options = [], {"label_smoothing": smoothing, "impl": impl}

        def forward(losses=losses, options=options):
            losses.append(linear_cross_entropy(hidden, weight, targets, **options))

        for _ in range(2):
            hidden.grad = weight.grad = None
            used = usage(forward, device, False), usage(lambda losses=losses: losses.pop().backward(), device, False)
        peaks.append([x.peak for x in used])
    for plain, smoothed in zip(*peaks, strict=True):
        assert smoothed <= max(plain, 128 * MIB) + 64 * MIB


def test_comes_from_the_component(device):
    tensors, targets = make_tensors(device)
    loss = LinearCrossEntropyLoss(label_smoothing=SMOOTHING)(tensors["hidden"], targets, tensors["weight"])
    expected = linear_cross_entropy(tensors["hidden"], tensors["weight"], targets, label_smoothing=SMOOTHING)
    assert torch.equal(loss, expected)
    assert loss != linear_cross_entropy(tensors["hidden"], tensors["weight"], targets)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan"), "auto", True, None])
def test_must_be_a_share(smoothing):
    with pytest.raises(ValueError, match=r"^label_smoothing must be a number in \[0, 1\], got"):
        LinearCrossEntropyLoss(label_smoothing=smoothing)


@pytest.mark.parametrize("impl", ["cce", "chunked"])
def test_ignored_tokens_stay_nothing_beside_a_bad_weight(impl, device):
    hidden = torch.randn(9, 16, device=device, requires_grad=True)
    weight, targets = torch.randn(40, 16, device=device), torch.randint(0, 40, (9,), device=device)
    weight[3, 1] = torch.nan
    targets[::2] = -100
    losses = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert not losses[::2].any()
    assert not gradient[::2].any()
    assert losses[1::2].isnan().all()
