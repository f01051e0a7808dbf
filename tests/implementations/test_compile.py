"""Under torch.compile and other tracers: no graph break, the same numbers, operators that keep torch's own rules."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from fused_steps import steps_as
from grid import needs_compiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torchtune_lce import linear_cross_entropy
from torchtune_lce.divergence import steps as divergence_steps
from torchtune_lce.implementations import fused
from torchtune_lce.inputs import filtering
from torchtune_lce.kernels import autograd  # noqa: F401, defines the operators

TOKENS, VOCABULARY, WIDTH = 70, 300, 24
IMPLS = ["auto", "cce", "cce_exact", "chunked", "torch_compile", "reference"]
TRACED = ["cce", "chunked", "reference"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def make_inputs(device, tokens=TOKENS, ignored=9):
    hidden = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, device=device) / 3).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,), device=device)
    targets[:ignored] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_with_the_same_numbers(impl, reduction, device):
    def loss_and_lse(hidden, weight, targets):
        loss, lse = linear_cross_entropy(
            hidden * 2, weight, targets, impl=impl, reduction=reduction, softcap=9.0, shift=1, return_lse=True
        )
        return (loss * 3).sum() + lse.mean()

    hidden, weight, targets = make_inputs(device)
    traced = torch.compile(loss_and_lse, fullgraph=True, backend="aot_eager")
    with steps_as():
        ours = torch.autograd.grad(traced(hidden, weight, targets), (hidden, weight))
        eager = torch.autograd.grad(loss_and_lse(hidden, weight, targets), (hidden, weight))
    for graph, plain in zip(ours, eager, strict=True):
        torch.testing.assert_close(graph, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("impl", "smoothing"), [("cce", 0.1), ("cce_exact", 0.0), ("chunked", 0.0), ("chunked", 0.1)])
def test_dynamic_shapes_compile_once(impl, smoothing, device):
    def run(*inputs):
        return linear_cross_entropy(*inputs, impl=impl, label_smoothing=smoothing)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    traced = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    # Three row blocks of any configuration, and more: torch takes an axis of length 1 for a constant.
    for tokens, ignored in ((270, 9), (281, 0), (430, 60)):
        inputs = make_inputs(device, tokens, ignored)
        loss = traced(*inputs)
        assert torch.equal(loss, run(*inputs))
        loss.backward()
        compilations.append(counter.frame_count)
    # The first may take two: torch begins anew where it finds that a number among the settings is a constant.
    assert compilations[0] in (1, 2)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "chunked"])
def test_exports_with_any_number_of_tokens(impl, device):
    """Traced with fewer than a block of them."""

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, targets):
            return linear_cross_entropy(hidden, weight, targets, impl=impl)

    tokens = {0: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(
        Loss(), make_inputs(device, tokens=12, ignored=2), dynamic_shapes=(tokens, None, tokens)
    )
    inputs = make_inputs(device, tokens=300)
    torch.testing.assert_close(exported.module()(*inputs), Loss()(*inputs), rtol=1e-6, atol=0)


def test_recording_has_no_compiled_calls(device):
    def loss(*inputs):
        return linear_cross_entropy(*inputs, impl="cce")

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with filtering.recording() as records:
        for call in (loss, traced, traced):
            call(*make_inputs(device)).backward()
    assert len(records) == 1


@pytest.mark.parametrize("impl", [*TRACED, "torch_compile"])
def test_fake_tensors(impl, device):
    """Shapes without values, as a planner of memory asks for them."""
    with FakeTensorMode():
        hidden, weight, targets = make_inputs(device)
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
        losses.sum().backward()
    assert losses.shape == targets.shape
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("tracer", ["real", "symbolic", "jit"])
@pytest.mark.parametrize("impl", TRACED)
def test_a_trace_checks_targets_in_later_calls(impl, tracer, device):
    """The values that a tracer sees are not those of later calls, whose bad targets must not pass for good ones."""

    def losses(*inputs):
        return linear_cross_entropy(*inputs, reduction="none", impl=impl)

    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    if tracer == "jit":
        # Its own check compares NaN with NaN.
        traced = torch.jit.trace(losses, (hidden, weight, targets), check_trace=False)
    else:
        traced = make_fx(losses, tracing_mode=tracer)(hidden, weight, targets)
    torch.testing.assert_close(traced(hidden, weight, targets), losses(hidden, weight, targets))
    bad = targets.clone()
    bad[[10, 20]] = torch.tensor([VOCABULARY, -1], device=device)
    assert traced(hidden, weight, bad).isnan().nonzero().flatten().tolist() == [10, 20]


@pytest.fixture
def counted_compilations():
    """Of the steps of ``impl="torch_compile"``, whose graphs run as they are."""
    counter = torch._dynamo.testing.CompileCounter()
    compile_with_counter = partial(torch.compile, backend=counter)
    of_any_tokens = fused.of_any_tokens
    with mock.patch.object(torch, "compile", compile_with_counter), steps_as(of_any_tokens):
        yield counter


VARIANTS = list(itertools.product((torch.float32, torch.bfloat16, torch.float64), (None, 9.0), (False, True)))


def run_variants(device):
    for dtype, softcap, with_bias in VARIANTS:
        hidden, weight, targets = make_inputs(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = weight[:, 0] if with_bias else None
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets, bias, softcap=softcap, impl="torch_compile")


def test_every_variant_is_compiled(counted_compilations, device):
    """More than ten in one process; torch's own limit for a function is eight, past which it runs uncompiled."""
    # What a card multiplies as it is, a CPU widens.
    widened = 0 if device.type == "cuda" else sum(not bias for dtype, _, bias in VARIANTS if dtype == torch.bfloat16)
    limit = torch._dynamo.config.recompile_limit
    for _ in range(2):
        run_variants(device)
        # Passes over logits; and for either dtype of sums what is made of a token's.
        assert counted_compilations.frame_count == len(VARIANTS) - widened + 2
    assert torch._dynamo.config.recompile_limit == limit


@torch._dynamo.config.patch(accumulated_recompile_limit=2)
def test_a_variant_too_many_is_refused(counted_compilations, device):
    # By a class of Dynamo's that has changed its name.
    with pytest.raises(Exception, match="fullgraph|limit"):
        run_variants(device)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_ragged_batches_compile_once(frozen, counted_compilations, device):
    """Whatever the number of tokens, of those in use, of pieces and of a piece; a lone one would be a constant."""
    compilations, pieces, lone = [], [], []
    divide = fused.divide

    def spy(tokens, *arguments, **settings):
        division = divide(tokens, *arguments, **settings)
        pieces.append(-(-tokens // division.tokens))
        lone.append(tokens % division.tokens == 1)
        return division

    with mock.patch.object(fused, "divide", spy):
        for tokens, ignored in ((430, 9), (270, 0), (2, 0), (91, 3), (9, 9), (177, 1), (429, 0), (874, 0)):
            hidden = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
            weight = torch.randn(2345, WIDTH, device=device, requires_grad=not frozen)
            targets = torch.randint(0, 2345, (tokens,), device=device)
            targets[:ignored] = -100
            for reduction in ("mean", "none"):
                loss = linear_cross_entropy(
                    hidden, weight, targets, impl="torch_compile", reduction=reduction, workspace_mib=1
                )
                loss.sum().backward()
            compilations.append(counted_compilations.frame_count)
    assert len(set(pieces)) > 4
    assert any(lone)
    # Statistics; what is made of them for a mean, and for one upstream gradient a token; the gradient by the logits.
    assert set(compilations) == {4}


@needs_compiler
def test_another_number_is_compiled_anew():
    """The shares of a distillation, label smoothing and the like: told to compile for any number, torch 2.13 went on
    with one that it had seen before, in some of the places that it stands in."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 7, 50)
    for share in (0.5, 0.3):
        compiled, plain = (
            divergence_steps.steps(fused).of_rows(logits, teacher, None, None, share, 1 - share, True)
            for fused in (True, False)
        )
        torch.testing.assert_close(compiled, plain)


def test_a_caller_that_compiles_sees_one_operator(counted_compilations, device):
    """His own graph would hold whole logits."""

    def loss(*inputs):
        return linear_cross_entropy(*inputs, impl="torch_compile")

    inputs = make_inputs(device)
    alone = loss(*inputs)
    counter = torch._dynamo.testing.CompileCounter()
    traced = torch.compile(loss, fullgraph=True, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(traced(*inputs), alone)
    assert counter.frame_count == 1
    assert counted_compilations.frame_count == 3


def test_an_impl_that_cannot_run_says_so_when_compiled_too(device):
    hidden, weight, targets = make_inputs(device)
    traced = torch.compile(lambda *inputs: linear_cross_entropy(*inputs, impl="fast"), backend="eager")
    # Dynamo wraps what is raised while it traces; the sentence is in it.
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="impl must be one of auto"):
        traced(hidden, weight, targets)


@pytest.mark.parametrize(
    ("adapter", "frozen", "eps"),
    [
        ("none", False, 2.0**-6),
        ("none", True, 2.0**-6),
        ("none", True, None),
        ("LoRA", True, 2.0**-6),
        ("DoRA", True, 2.0**-6),
    ],
)
def test_operators_of_cce_keep_the_rules(adapter, eps, frozen, device):
    hidden, weight, targets = make_inputs(device)
    bias = torch.randn(VOCABULARY, device=device, requires_grad=not frozen)
    weight.requires_grad_(not frozen)
    low, up = (torch.randn(rows, 3, device=device, requires_grad=True) for rows in (len(hidden), len(weight)))
    scale = torch.randn(VOCABULARY, device=device, requires_grad=True)
    low_rank = {"none": (None, None, None), "LoRA": (low, up, None), "DoRA": (low, up, scale)}[adapter]
    # Of logits that a softcap takes the means too.
    softcap = 9.0 if adapter == "DoRA" else None
    settings = (targets, -100, softcap, 0.5, eps, True, True, True, softcap is not None, 64)
    arguments = (hidden, weight, bias, *low_rank, *settings)
    torch.library.opcheck(torch.ops.torchtune_lce.cut_cross_entropy.default, arguments)


@pytest.mark.parametrize("adapter", ["none", "LoRA", "DoRA"])
@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
def test_operators_in_torch_keep_the_rules(impl, adapter, device):
    hidden, weight, targets = make_inputs(device)
    low, up, scale = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((len(targets), 3), (VOCABULARY, 3), VOCABULARY)
    )
    low_rank = {"none": (None, None, None), "LoRA": (low, up, None), "DoRA": (low, up, scale)}[adapter]
    arguments = (hidden, weight, None, *low_rank, targets, -100, 30.0, 0.5, 64)
    needs = [x is not None for x in (hidden, weight, None, *low_rank)]
    operators = torch.ops.torchtune_lce
    if impl == "chunked":
        of_losses, of_a_sum = operators.chunked.default, operators.chunked_sum.default
        trained, frozen = (adapter != "LoRA", False), (False, True)
    else:
        of_losses, of_a_sum = operators.compiled.default, operators.compiled_sum.default
        trained, frozen = ("means" if adapter != "LoRA" else "losses",), ("directions",)
    with steps_as():
        torch.library.opcheck(of_losses, (*arguments, *trained))
        for tensor in (weight, up, scale):
            tensor.requires_grad_(False)
        torch.library.opcheck(of_losses, (*arguments, *frozen))
        for tensor in (weight, up, scale):
            tensor.requires_grad_()
        # Of one token: the backward scales in place what the forward has returned, gradients by a mean.
        targets[:-1] = -100
        torch.library.opcheck(of_a_sum, (*arguments, 0.1, 1e-3, needs))
