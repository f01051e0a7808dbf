"""Students and teachers for tests of the divergences, and torchtune's own losses and formulas beside them."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchtune.modules.loss
from tiny_distillation import OURS, STOCK

import torchtune_lce
from torchtune_lce.divergence import steps as divergence_steps
from torchtune_lce.divergence.function import divergence
from torchtune_lce.divergence.operands import Head, Shares
from torchtune_lce.inputs.low_rank import LowRank

# With 1 MiB of workspace several pieces of tokens, of several blocks each, and several chunks of the vocabulary.
TOKENS, ENTRIES, WIDTH, TEACHER_WIDTH = (3, 37), 3001, 24, 40

_COMPILE = torch.compile  # before a test puts another in its place

SHARES = {"Forward": Shares(1.0, 0.0), "Reverse": Shares(0.0, 1.0), "Symmetric": Shares(0.3, 0.7)}


def torchtunes(name: str, ignore_index: int = -100) -> torch.nn.Module:
    ratio = {"sym_kd_ratio": SHARES[name].forward} if name == "Symmetric" else {}
    return getattr(torchtune.modules.loss, STOCK[name].rpartition(".")[2])(ignore_index=ignore_index, **ratio)


def ours(name: str, **settings) -> torch.nn.Module:
    ratio = {"sym_kd_ratio": SHARES[name].forward} if name == "Symmetric" else {}
    return getattr(torchtune_lce, OURS[name].rpartition(".")[2])(**ratio, **settings)


def make_heads(dtype=torch.float32, device="cpu", bias=True, trained=("hidden", "weight", "bias"), scale=1.0):
    """Student and teacher, who agree in part, and labels. ``trained``: what of the student wants a gradient."""

    def normal(*shape, by=1.0):
        return (torch.randn(*shape, device=device) * by).to(dtype)

    student = {
        "hidden": normal(*TOKENS, WIDTH),
        "weight": normal(ENTRIES, WIDTH, by=scale / 2),
        "bias": normal(ENTRIES) if bias else None,
    }
    teacher = Head(
        "teacher",
        normal(*TOKENS, TEACHER_WIDTH),
        normal(ENTRIES, TEACHER_WIDTH, by=scale / 3),
        normal(ENTRIES) if bias else None,
    )
    for name, tensor in student.items():
        if tensor is not None:
            tensor.requires_grad_(name in trained)
    labels = torch.randint(0, ENTRIES, TOKENS, device=device)
    labels[:, 5:9] = -100
    labels[1, ::3] = -100
    return Head("student", **student), teacher, labels


def near_heads(dtype, device, tokens, entries, width, trained=("hidden",), adapter=False):
    """As late in a distillation: the student is its teacher but for 1%; labels, one of them ignored."""

    def normal(*shape):
        return torch.randn(*shape, device=device)

    parts = {
        "hidden": normal(tokens, width),
        "weight": normal(entries, width) / width**0.5 * 3,
        "bias": normal(entries),
    }
    if adapter:
        parts |= {"low": normal(tokens, 3), "up": normal(entries, 3)}
    near = {key: (x + 1e-2 * x.square().mean().sqrt() * torch.randn_like(x)).to(dtype) for key, x in parts.items()}
    parts = {key: x.to(dtype) for key, x in parts.items()}
    for name in trained:
        near[name].requires_grad_()
    heads = [
        Head(name, x["hidden"], x["weight"], x["bias"], LowRank(x["low"], x["up"], None) if adapter else None)
        for name, x in (("student", near), ("teacher", parts))
    ]
    labels = torch.randint(0, entries, (tokens,), device=device)
    labels[1] = -100
    return *heads, labels


def compute(student, teacher, labels, name, impl="chunked", normalize=True, workspace_mib=1, ignore_index=-100):
    return divergence(
        student,
        teacher,
        labels,
        SHARES[name],
        ignore_index=ignore_index,
        workspace_mib=workspace_mib,
        impl=impl,
        normalize=normalize,
    )


def logits_of(head: Head) -> torch.Tensor:
    """All of them, in the dtype of the hidden states, where torchtune's output layers round as well."""
    logits = F.linear(head.hidden, head.weight, head.bias)
    if head.low_rank is None:
        return logits
    low, up, scale = head.low_rank
    logits = logits + F.linear(low, up).reshape(logits.shape)
    return logits if scale is None else logits * scale.to(logits.dtype)


def by_formula(student, teacher, labels, name, normalize=True):
    """In the dtype of the heads; the formulas as they stand in divergence/function.py."""
    log_q, log_p = (logits_of(head).log_softmax(-1) for head in (student, teacher))
    forward = -(log_p.exp() * log_q).sum(-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    total = (SHARES[name].forward * forward + SHARES[name].reverse * reverse)[labels != -100].sum()
    return total / (labels != -100).sum() if normalize else total


def in_float64(head: Head) -> Head:
    exact = [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in head.operands]
    return Head(head.name, *exact[:3], head.low_rank and LowRank(*exact[3:]))


def gradients(loss, head: Head, upstream: float = 1.0) -> list[torch.Tensor]:
    trained = [x for x in head.operands if x is not None and x.requires_grad]
    return list(torch.autograd.grad(loss, trained, torch.full_like(loss, upstream)))


def relative_error(actual, exact) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_heads_as_accurate(impl, name, heads_and_labels):
    student, teacher, labels = heads_and_labels
    dtype = student.hidden.dtype
    exact_student, exact_teacher = in_float64(student), in_float64(teacher)
    eps, tokens = torch.finfo(dtype).eps, (labels != -100).sum()
    largest = max(logits_of(head).abs().max() for head in (student, teacher)).double()
    for normalize in (True, False):
        loss = compute(student, teacher, labels, name, impl, normalize)
        logits = [logits_of(head).flatten(0, 1) for head in (student, teacher)]
        native = torchtunes(name)(*logits, labels.flatten(), normalize)
        exact = by_formula(exact_student, exact_teacher, labels, name, normalize)
        assert loss.dtype == torch.float32
        # 3 stands for what a recipe multiplies by.
        pairs = zip(gradients(loss, student, 3.0), gradients(native, student, 3.0), strict=True)
        # Four standard deviations of a mean of logits that are each rounded, and sums in float32; torchtune's own error
        # may be small by luck.
        rounded = 4 * eps / 2 * largest * (tokens**-0.5 if normalize else tokens**0.5)
        assert abs(loss - exact) <= 2 * abs(native - exact) + rounded + 4 * torch.finfo(torch.float32).eps * exact
        for (actual, torchtune_), expected in zip(pairs, gradients(exact, exact_student, 3.0), strict=True):
            # Rounded once for each product, once as a result, once more when scaled; all of it twice, for sums in
            # another order. The reverse divergence, which the gradient contains, is a difference of three numbers as
            # large as the logits.
            allowed = 2 * relative_error(torchtune_, expected) + 2 * 3 * eps / 2
            allowed += 3 * torch.finfo(torch.float32).eps / 2 * largest.item()
            assert relative_error(actual, expected) <= allowed


@cache
def _traced(function, **settings):
    """Kept, as a process keeps it: what one test has traced, the next need not."""
    return _COMPILE(function, backend="aot_eager", **settings)


@contextmanager
def traced_steps():
    """A list of the functions that ``torch_compile`` traces, without the seconds that generating code takes."""
    compiled = []

    def tracing(function, **settings):
        compiled.append(function.__name__)
        return _traced(function, **settings)

    divergence_steps.steps.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", tracing)
            yield compiled
    finally:
        divergence_steps.steps.cache_clear()


def assert_operator_keeps_the_rules(student, teacher, labels):
    student, teacher = student.flat(), teacher.flat()
    needs = [x is not None and x.requires_grad for x in student.operands]
    arguments = (*student.operands, *teacher.operands, labels.flatten(), -100, 0.3, 0.7, 1, False, needs)
    torch.library.opcheck(torch.ops.torchtune_lce.chunked_divergence.default, arguments)
