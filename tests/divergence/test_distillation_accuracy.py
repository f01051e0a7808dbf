"""Distillation losses where digits are at stake, against float64 of the same tensors: a student near its teacher,
logits that share a large value, a masked vocabulary; and heads that autocast casts."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from divergence_cases import (
    OURS,
    by_formula,
    compute,
    gradients,
    in_float64,
    logits_of,
    near_heads,
    relative_error,
    torchtunes,
    traced_steps,
)

from torchtune_lce.divergence.operands import Head

IMPLS = ["chunked", "torch_compile", "reference"]
KERNELS = "cce_exact"
# The first walks tokens, the second the vocabulary.
TRAINED = {"frozen": ("hidden",), "trained": ("hidden", "weight")}
both_ways = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())


def compiling(impl: str):
    return traced_steps() if impl == "torch_compile" else nullcontext()


# ---- a student near its teacher


def assert_near_the_teacher(impl, heads_and_labels):
    """1e-2: the gradient by the logits is rounded once, by hidden once, which bfloat16 does to 0.2% each.

    Losses are scaled, as training in float16 scales them: most of such a gradient would else be below 1e-6, where
    float16 has steps of 6e-8.
    """
    student, teacher, labels = heads_and_labels
    exact_student, exact_teacher = in_float64(student), in_float64(teacher)
    for name in OURS:
        loss = 1024 * compute(student, teacher, labels, name, impl)
        exact = 1024 * by_formula(exact_student, exact_teacher, labels, name)
        # The reverse divergence is a small difference of logits, each with the error of a sum in float32.
        assert abs(loss - exact) <= 1e-3 * abs(exact)
        for actual, expected in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
            assert relative_error(actual, expected) < 1e-2


@both_ways
@pytest.mark.parametrize(
    ("impl", "dtype"), [*itertools.product(IMPLS, [torch.bfloat16, torch.float16]), (KERNELS, torch.float16)]
)
def test_near_the_teacher(impl, dtype, trained, device):
    """Logits that are rounded before they are compared made the hidden states' gradient a quarter off."""
    with compiling(impl):
        entries = 900 if impl == KERNELS else 3001
        where = device if impl == KERNELS else "cpu"
        assert_near_the_teacher(impl, near_heads(dtype, where, 70, entries, 48, trained))


@both_ways
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_near_the_teacher_with_adapters(impl, trained):
    assert_near_the_teacher(
        impl, near_heads(torch.bfloat16, "cpu", 70, 3001, 48, (*trained, "low", "up"), adapter=True)
    )


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", [*IMPLS, KERNELS])
def test_near_the_teacher_on_a_card(impl, dtype, trained, device):
    assert_near_the_teacher(impl, near_heads(dtype, device, 600, 16_000, 1024, trained))


# ---- logits that share a large value


@both_ways
@pytest.mark.parametrize(("impl", "shared"), [*itertools.product(IMPLS, [1e3, 65_536.0, 2.0**20]), (KERNELS, 2.0**20)])
def test_a_large_common_logit(impl, shared, trained, device):
    """The student's and the teacher's share different ones. Their multiples of 1/8 are exact in float32 up to 2^20."""
    student, teacher, labels = common_logits(shared, device, trained)
    exact_student, exact_teacher = in_float64(student), in_float64(teacher)
    with compiling(impl) if device.type == "cpu" else nullcontext():
        for name in OURS:
            loss = compute(student, teacher, labels, name, impl)
            exact = by_formula(exact_student, exact_teacher, labels, name)
            assert relative_error(loss, exact) < 1e-6
            for actual, expected in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
                assert relative_error(actual, expected) < 1e-5


def common_logits(shared: float, device, trained):
    """Two features, of which the first makes the shared part; with 1 MiB three chunks, their peaks in any order."""
    tokens, entries = 40, 2500

    def head(name, shared):
        hidden = torch.randint(1, 4, (tokens, 2), device=device).float()
        hidden[:, 0] = shared
        weight = torch.randint(-12, 13, (entries, 2), device=device) / 8
        weight[:, 0] = 1
        return Head(name, hidden, weight)

    student, teacher = head("student", shared), head("teacher", shared / 2)
    for name in trained:
        getattr(student, name).requires_grad_()
    return student, teacher, torch.zeros(tokens, dtype=torch.int64, device=device)


# ---- a masked vocabulary


@both_ways
@pytest.mark.parametrize("masked", ["first", "last", "scattered"])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *((impl, torch.float32) for impl in (*IMPLS, KERNELS)),
        ("chunked", torch.bfloat16),
        ("chunked", torch.float16),
    ],
)
def test_a_masked_vocabulary(impl, dtype, masked, trained, device):
    """By the lowest number of the dtype, in student and teacher, so that whole chunks hold nothing else."""
    student, teacher, labels = near_heads(dtype, device, 70, 3001, 24, trained)
    part = {"first": slice(1600), "last": slice(1500, None), "scattered": slice(3, None, 2)}[masked]
    with torch.no_grad():
        for head in (student, teacher):
            head.bias[part] = torch.finfo(dtype).min
    exact_student, exact_teacher = in_float64(student), in_float64(teacher)
    wide = [logits_of(replace(head, **in_float32(head))) for head in (student, teacher)]
    for name in OURS if impl not in ("torch_compile", KERNELS) else ["Symmetric"]:
        with compiling(impl) if device.type == "cpu" else nullcontext():
            loss = compute(student, teacher, labels, name, impl)
        exact = by_formula(exact_student, exact_teacher, labels, name)
        assert torchtunes(name)(*wide, labels).item() == pytest.approx(exact.item(), rel=1e-3)
        assert abs(loss - exact) <= 1e-3 * abs(exact)
        for actual, expected in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
            assert relative_error(actual, expected) < 1e-2


def in_float32(head: Head) -> dict[str, torch.Tensor]:
    return {key: getattr(head, key).detach().float() for key in ("hidden", "weight", "bias")}


@both_ways
@pytest.mark.parametrize("impl", ["chunked", KERNELS])
def test_a_chunk_of_the_teacher_without_any_probability(impl, trained, device):
    """Logits of -inf there: the forward divergence asks nothing about what the teacher never says."""
    student, teacher, labels = near_heads(torch.float32, device, 70, 3001, 24, trained)
    teacher.bias[:1600] = -torch.inf
    loss = compute(student, teacher, labels, "Forward", impl)
    exact_student = in_float64(student)
    p = logits_of(in_float64(teacher)).softmax(-1)
    exact = -(p * logits_of(exact_student).log_softmax(-1)).sum(-1)[labels != -100].mean()
    assert relative_error(loss, exact) < 1e-6
    for actual, expected in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
        assert relative_error(actual, expected) < 1e-5


# ---- autocast


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("mixed", ["student", "teacher", "both"])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_takes_a_body_and_a_head_of_two_dtypes(impl, mixed, adapter):
    """As F.linear does. torchtune's losses see the same logits, rounded."""
    trained = ("hidden", "weight", "bias", *(("low", "up") if adapter else ()))
    student, teacher, labels = near_heads(torch.float32, "cpu", 50, 700, 24, trained, adapter)
    # Far from the student, or torchtune's gradients would be all rounding.
    teacher = replace(teacher, weight=teacher.weight.flip(0))
    if mixed in ("student", "both"):
        student = replace(student, hidden=student.hidden.detach().bfloat16().requires_grad_())
    if mixed in ("teacher", "both"):
        teacher = replace(teacher, hidden=teacher.hidden.bfloat16())
    named = "teacher" if mixed == "teacher" else "student"
    with pytest.raises(TypeError, match=f"^{named}_weight must have the dtype .* under torch.autocast$"):
        compute(student, teacher, labels, "Forward", impl)
    for name in OURS if impl != "torch_compile" else ["Symmetric"]:
        with compiling(impl), torch.autocast("cpu", torch.bfloat16):
            loss = compute(student, teacher, labels, name, impl)
            expected = torchtunes(name)(logits_of(student), logits_of(teacher), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
        for actual, wanted in zip(gradients(loss, student), gradients(expected, student), strict=True):
            assert actual.dtype == wanted.dtype
            assert relative_error(actual, wanted.double()) < 2e-2
