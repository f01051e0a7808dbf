"""Distillation with LoRA or DoRA on the output of student, teacher or both, against full logits, all gradients too."""

from dataclasses import replace

import pytest
import torch
from adapters import make_output
from allocations import MIB, usage
from divergence_cases import (
    ENTRIES,
    OURS,
    assert_heads_as_accurate,
    assert_operator_keeps_the_rules,
    by_formula,
    compute,
    gradients,
    in_float64,
    make_heads,
    ours,
    relative_error,
    torchtunes,
    traced_steps,
)
from tiny_distillation import build_teacher
from tiny_models import VOCABULARY, build_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torchtune_lce import LinearForwardKLLoss
from torchtune_lce.divergence.operands import Head
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.model import output_adapter

RANK = 5
# Adapter of the student, of the teacher.
PAIRS = {
    "LoRA, none": ("LoRA", None),
    "DoRA, none": ("DoRA", None),
    "none, DoRA": (None, "DoRA"),
    "DoRA, LoRA": ("DoRA", "LoRA"),
}
ADAPTER = ("hidden", "low", "up", "scale")
TRAINED = {
    "adapter": ADAPTER,
    "all": ("weight", "bias", *ADAPTER),
    "low alone": ("low",),
    "up and scale, with the bias": ("bias", "up", "scale"),
}


def with_adapter(head: Head, kind: str | None, trained=()) -> Head:
    if kind is None:
        return head
    where, wide = head.hidden[:0], torch.promote_types(head.hidden.dtype, torch.float32)
    scale = None
    if kind == "DoRA":
        scale = 1 + 0.1 * torch.randn(ENTRIES, dtype=wide, device=where.device)
        scale[7] = 0  # by which nothing may be divided
    low = torch.randn(head.hidden[..., 0].numel(), RANK).to(where)
    adapter = {"low": low, "up": (torch.randn(ENTRIES, RANK) / 3).to(where), "scale": scale}
    for name, tensor in adapter.items():
        if tensor is not None:
            tensor.requires_grad_(name in trained)
    return replace(head, low_rank=LowRank(**adapter))


def make_adapted(pair, trained=ADAPTER, dtype=torch.float32, **settings):
    """Student, teacher, labels, with 1 MiB of workspace several pieces or chunks of them."""
    student, teacher, labels = make_heads(dtype, trained=trained, **settings)
    kinds = PAIRS[pair]
    return with_adapter(student, kinds[0], trained), with_adapter(teacher, kinds[1]), labels


# ---- values and gradients


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("impl", "name"), [*[("chunked", name) for name in OURS], ("reference", "Symmetric")])
def test_float64(impl, name, pair, trained):
    """Against the formulas, with an upstream gradient that is not 1, for the mean and the sum."""
    if PAIRS[pair][0] is None and trained != ADAPTER:
        trained = ("hidden", "weight", "bias")
    student, teacher, labels = make_adapted(pair, trained, torch.float64)
    exact_student = in_float64(student)
    for normalize in (True, False):
        loss = compute(student, teacher, labels, name, impl, normalize)
        exact = by_formula(exact_student, teacher, labels, name, normalize)
        results = [loss, *gradients(loss, student, 3.0)]
        wanted = [exact, *gradients(exact, exact_student, 3.0)]
        assert len(results) == 1 + sum(x is not None and x.requires_grad for x in student.operands)
        for actual, expected in zip(results, wanted, strict=True):
            assert actual.dtype == torch.float64
            assert relative_error(actual, expected) < 1e-13


@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER)], ids=["adapter", "all"])
@pytest.mark.parametrize("pair", ["LoRA, none", "DoRA, LoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torchtune(dtype, pair, trained):
    assert_heads_as_accurate("chunked", "Symmetric", make_adapted(pair, trained, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER)], ids=["adapter", "all"])
@pytest.mark.parametrize("pair", ["LoRA, none", "DoRA, LoRA"])
@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
def test_as_accurate_as_torchtune_on_a_card(impl, pair, trained):
    assert_heads_as_accurate(impl, "Symmetric", make_adapted(pair, trained, torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER)], ids=["adapter", "all"])
def test_torch_compile_is_as_accurate_as_torchtune(trained):
    with traced_steps() as compiled:
        assert_heads_as_accurate("torch_compile", "Symmetric", make_adapted("DoRA, LoRA", trained, torch.bfloat16))
    assert compiled == ["of_rows", "statistics", "gradient"]


@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER)], ids=["adapter", "all"])
def test_no_tokens_is_zero_with_zero_gradients(trained):
    student, teacher, labels = make_adapted("DoRA, LoRA", trained)
    loss = compute(student, teacher, labels.fill_(-100), "Symmetric")
    assert loss == 0
    found = gradients(loss, student)
    assert len(found) == len(trained)
    assert all(not gradient.any() for gradient in found)


@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER), ()], ids=["adapter", "all", "nothing"])
def test_operator_keeps_the_rules(trained):
    assert_operator_keeps_the_rules(*make_adapted("DoRA, LoRA", trained))


def test_one_graph_under_a_compiler():
    torch._dynamo.reset()
    student, teacher, labels = make_adapted("DoRA, LoRA")

    def loss(hidden, low):
        head = replace(student, hidden=hidden * 2, low_rank=student.low_rank._replace(low=low * 2))
        return compute(head, teacher, labels, "Symmetric") * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (student.hidden, student.low_rank.low)
    both = gradients(compiled(*inputs), student), gradients(loss(*inputs), student)
    for graph, eager in zip(*both, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


def test_autocast():
    """All but the scale is rounded; gradients have the dtypes of what they are by."""
    student, teacher, labels = make_adapted("DoRA, LoRA")
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute(student, teacher, labels, "Symmetric")
    rounded = [
        Head(
            h.name,
            h.hidden.bfloat16(),
            h.weight.bfloat16(),
            h.bias.bfloat16(),
            h.low_rank._replace(low=h.low_rank.low.bfloat16(), up=h.low_rank.up.bfloat16()),
        )
        for h in (student, teacher)
    ]
    assert torch.equal(loss, compute(*rounded, labels, "Symmetric"))
    assert all(gradient.dtype == torch.float32 for gradient in gradients(loss, student))


# ---- bound to models


def bound(student_output, teacher_output, impl="auto", name="Forward", **settings):
    """Both models are there to hold the outputs: hidden states of any kind may come from them."""
    models = build_model(tied=False), build_teacher()
    for model, output in zip(models, (student_output, teacher_output), strict=True):
        model.output = output
        model.tok_embeddings = nn.Embedding(output.weight.shape[0], 1)
    loss = ours(name, impl=impl, **settings)
    loss.set_model_output(models[0])
    loss.set_teacher_output(models[1])
    return models, loss


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kinds", [("LoRA", "DoRA"), ("DoRA", "LoRA")], ids=str)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_torchtunes_own_layers(impl, kinds, dropout, name):
    """In float64 as recipes have it, the base frozen; with the dropout of the same seed, the teacher's drawn first."""
    outputs = [
        make_output(kind, width=width, dropout=dropout).double() for kind, width in zip(kinds, (64, 96), strict=True)
    ]
    outputs[0].weight.requires_grad_(False)
    hidden = torch.randn(2, 9, 64, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(2, 9, 96, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (2, 9))
    labels[0, :3] = -100
    inputs = {"hidden": hidden} | {key: x for key, x in outputs[0].named_parameters() if x.requires_grad}
    assert {"hidden", "lora_a.weight", "lora_b.weight"} <= inputs.keys()

    torch.manual_seed(4)
    teacher_logits = outputs[1](teacher_hidden).detach()
    # torchtune's own works in float32; the formulas are held against it here, and the loss against the formulas.
    logits = outputs[0](hidden)
    heads = [
        Head(side, x, torch.eye(VOCABULARY).double()) for side, x in (("student", logits), ("teacher", teacher_logits))
    ]
    exact = by_formula(*heads, labels, name)
    torchtune_ = torchtunes(name)(logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(exact.float(), torchtune_.float())
    expected = torch.autograd.grad(exact, list(inputs.values()))

    models, loss = bound(*outputs, impl=impl, name=name)
    torch.manual_seed(4)
    found = loss(hidden, teacher_hidden, labels)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    found = torch.autograd.grad(found, list(inputs.values()))
    for key, actual, wanted in zip(inputs, found, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}")
    loss(hidden, teacher_hidden, labels).backward()
    assert all(parameter.requires_grad for parameter in outputs[1].parameters())
    assert all(parameter.grad is None for parameter in models[1].parameters()), "the teacher's are never trained"


def test_says_what_runs(caplog):
    caplog.set_level("INFO")
    _, loss = bound(make_output("LoRA"), make_output("DoRA", width=96, rank=2))
    loss(torch.randn(2, 9, 64), torch.randn(2, 9, 96), torch.randint(VOCABULARY, (2, 9)))
    assert "[512, 64] with LoRA of rank 4 (student) and [512, 96] with DoRA of rank 2 (teacher)" in caplog.text


def test_bad_input():
    """Named before an adapter is given it."""
    _, loss = bound(make_output("LoRA"), make_output("DoRA", width=96))
    labels = torch.randint(VOCABULARY, (2, 9))
    good = torch.randn(2, 9, 64), torch.randn(2, 9, 96)
    with pytest.raises(ValueError, match="student_hidden .* those are logits"):
        loss(torch.randn(2, 9, VOCABULARY), good[1], labels)
    with pytest.raises(TypeError, match="teacher_hidden must be a torch.Tensor, got a list of 8"):
        loss(good[0], [good[1]] * 8, labels)


# ---- memory


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_nothing_as_large_as_the_weight_is_allocated(kind, dropout, monkeypatch):
    """Neither the sum of weight and adapter nor its gradient, of either model."""
    monkeypatch.setattr(output_adapter, "NORM_BYTES", MIB)
    tokens, vocabulary, widths = 128, 9000, (512, 640)
    outputs = [make_output(kind, vocabulary=vocabulary, width=width, dropout=dropout) for width in widths]
    for output in outputs:
        output.weight.requires_grad_(False)
    hidden, teacher_hidden = (torch.randn(1, tokens, width) for width in widths)
    hidden.requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens))
    _, loss = bound(*outputs, workspace_mib=1)

    def step():
        loss(hidden, teacher_hidden, labels).backward()

    step()
    for tensor in (hidden, *outputs[0].parameters()):
        tensor.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    largest = max(e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    weight = outputs[0].weight.nbytes
    assert 0 < largest < weight / 8
    used = usage(step, torch.device("cpu"), interpreted=False)
    assert used.peak < weight / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [ADAPTER, ("weight", "bias", *ADAPTER)], ids=["adapter", "all"])
def test_the_workspace_holds(trained, dtype):
    """Beside it gradients, sums by the adapter in float32 and copies of those, and copies of states as in test_memory
    of test_distillation.py."""
    student, teacher, labels = make_adapted("DoRA, LoRA", trained, dtype)
    tokens = labels.numel()
    held = []

    def forward():
        held.append(compute(student, teacher, labels, "Symmetric"))

    forward()
    held.clear()
    used = usage(forward, torch.device("cpu"), False)
    results = sum(x.nbytes for x in student.operands if x is not None and x.requires_grad)
    adapter = (ENTRIES * (RANK + 2) + tokens * RANK * 2) * 4
    states = tokens * (student.hidden.shape[-1] * 4 * 3 + teacher.hidden.shape[-1] * dtype.itemsize)
    vectors = tokens * 64
    assert 8 * tokens * ENTRIES > 1.5 * (MIB + results + adapter + states), "the bound would hold anyway"
    assert used.peak <= MIB + results + adapter + states + vectors
    assert used.kept <= results + vectors


def test_a_frozen_adapter_is_read_but_not_trained():
    output = make_output("LoRA", dropout=0.0)
    output.requires_grad_(False)
    hidden = torch.randn(2, 9, 64, requires_grad=True)
    _, loss = bound(output, make_output("LoRA", width=96))
    labels = torch.randint(VOCABULARY, (2, 9))
    loss(hidden, torch.randn(2, 9, 96), labels).backward()
    assert hidden.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in output.parameters())
    assert type(loss) is LinearForwardKLLoss
