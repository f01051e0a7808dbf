"""Distillation losses against torchtune's own on full logits, and against their formulas in float64, with gradients."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
import torchtune.modules.loss
from allocations import MIB, usage
from divergence_cases import (
    ENTRIES,
    TEACHER_WIDTH,
    TOKENS,
    WIDTH,
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
from omegaconf import OmegaConf
from project import ROOT
from tiny_distillation import OURS, build_teacher
from tiny_models import VOCABULARY, build_model
from torchao.dtypes.nf4tensor import to_nf4
from torchtune import config

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss, LinearSymmetricKLLoss
from torchtune_lce.divergence import chunked as chunked_divergence
from torchtune_lce.divergence.operands import Head

IMPLS = ["chunked", "reference"]


TRAINED = {
    "frozen head": ("hidden",),
    "all": ("hidden", "weight", "bias"),
    "weight": ("weight",),
    "bias": ("hidden", "bias"),
}


# ---- values and gradients


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("impl", IMPLS)
def test_float64(impl, name, trained):
    """Against the formulas, with an upstream gradient that is not 1, for the mean and the sum."""
    student, teacher, labels = make_heads(torch.float64, trained=trained)
    exact_student = in_float64(student)
    for normalize in (True, False):
        loss = compute(student, teacher, labels, name, impl, normalize)
        exact = by_formula(exact_student, teacher, labels, name, normalize)
        assert loss.dtype == torch.float64
        results = [loss, *gradients(loss, student, 3.0)]
        wanted = [exact, *gradients(exact, exact_student, 3.0)]
        for actual, expected in zip(results, wanted, strict=True):
            assert relative_error(actual, expected) < 1e-13


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("impl", "name", "dtype"),
    [*itertools.product(IMPLS, OURS, [torch.float32, torch.bfloat16]), ("chunked", "Symmetric", torch.float16)],
)
def test_as_accurate_as_torchtune(impl, name, dtype, frozen):
    """On the same quantised inputs: its error twice, and a few roundings."""
    assert_as_accurate_as_torchtune(impl, name, dtype, frozen, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("impl", ["chunked", "torch_compile", "cce_exact"])
def test_as_accurate_as_torchtune_on_a_card(impl, name, dtype, frozen):
    assert_as_accurate_as_torchtune(impl, name, dtype, frozen, "cuda")


def assert_as_accurate_as_torchtune(impl, name, dtype, frozen, device):
    assert_heads_as_accurate(impl, name, make_heads(dtype, device, trained=TRAINED["frozen head" if frozen else "all"]))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_torch_compile_is_as_accurate_as_torchtune(frozen):
    with traced_steps() as compiled:
        assert_as_accurate_as_torchtune("torch_compile", "Symmetric", torch.bfloat16, frozen, "cpu")
    assert compiled == ["of_rows", "statistics", "gradient"]


@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", OURS)
def test_far_apart_and_alike(name, trained):
    """Logits of tens, where nearly all of both softmaxes is 0; and a student that is its teacher."""
    student, teacher, labels = make_heads(torch.float32, trained=trained, scale=20.0)
    exact = by_formula(in_float64(student), in_float64(teacher), labels, name)
    loss = compute(student, teacher, labels, name)
    assert relative_error(loss, exact) < 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients(loss, student))
    twin = Head("teacher", student.hidden.detach(), student.weight.detach(), student.bias.detach())
    loss = compute(student, twin, labels, name)
    entropy = by_formula(in_float64(student), in_float64(twin), labels, name)
    # Differences of logits as large as this one.
    largest = F.linear(student.hidden, student.weight, student.bias).abs().max()
    assert abs(loss - entropy) <= 8 * torch.finfo(torch.float32).eps * largest
    # q - p is 0 to the rounding of log-sum-exps that were summed in the same order.
    assert all(gradient.abs().max() < 1e-3 for gradient in gradients(loss, student))


def test_memory_layouts_and_shapes():
    """[B, S, D] or [N, D], the teacher's left as it is too; labels int32; transposes."""
    student, teacher, labels = make_heads()
    expected = compute(student, teacher, labels, "Symmetric")
    flat = [Head(h.name, h.hidden.flatten(0, 1), h.weight, h.bias) for h in (student, teacher)]
    torch.testing.assert_close(compute(*flat, labels.flatten().int(), "Symmetric"), expected)
    torch.testing.assert_close(compute(flat[0], teacher, labels.flatten(), "Symmetric"), expected)
    strided = [
        Head(h.name, h.hidden.transpose(0, 1).contiguous().transpose(0, 1), h.weight.T.contiguous().T, h.bias)
        for h in (student, teacher)
    ]
    torch.testing.assert_close(compute(*strided, labels, "Symmetric"), expected)


@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("impl", [*IMPLS, "cce_exact"])
@pytest.mark.parametrize("tokens", ["all ignored", "none"])
def test_no_tokens_is_zero_with_zero_gradients(tokens, impl, trained, device):
    """Gradients of zero, not none: ranks that have none of them wait for each other for ever."""
    student, teacher, labels = make_heads(trained=trained, device=device if impl == "cce_exact" else "cpu")
    labels = torch.full_like(labels, 7)
    if tokens == "none":
        labels = labels[:0]
        student = Head("student", student.hidden[:0].detach().requires_grad_(), student.weight, student.bias)
        teacher = Head("teacher", teacher.hidden[:0], teacher.weight, teacher.bias)
    for normalize in (True, False):
        loss = compute(student, teacher, labels, "Symmetric", impl, normalize, ignore_index=7)
        assert loss == 0
        assert all(not gradient.any() for gradient in gradients(loss, student))


def test_ignored_tokens_may_hold_anything():
    """As hidden states of padding do where attention saw nothing."""
    student, teacher, labels = make_heads()
    clean = gradients(compute(student, teacher, labels, "Symmetric"), student)
    with torch.no_grad():
        student.hidden[labels == -100] = torch.nan
        teacher.hidden[labels == -100] = torch.inf
    dirty = gradients(compute(student, teacher, labels, "Symmetric"), student)
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_and_infinity_reach_the_loss(of, value, trained):
    student, teacher, labels = make_heads(trained=trained)
    with torch.no_grad():
        (student if of == "student" else teacher).hidden[0, 1, 2] = value
    assert not compute(student, teacher, labels, "Symmetric").isfinite()


def test_two_backwards_and_none():
    student, teacher, labels = make_heads()
    loss = compute(student, teacher, labels, "Forward")
    first = torch.autograd.grad(loss, [student.hidden, student.weight], retain_graph=True)
    second = torch.autograd.grad(loss * 2, [student.hidden, student.weight])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one * 2, other, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(compute(student, teacher, labels, "Forward"), loss)


def test_second_derivative_is_refused():
    student, teacher, labels = make_heads()
    loss = compute(student, teacher, labels, "Forward")
    (gradient,) = torch.autograd.grad(loss, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"this impl has no second derivative .* set impl='reference'"):
        gradient.square().sum().backward()
    loss = compute(student, teacher, labels, "Forward", impl="reference")
    (gradient,) = torch.autograd.grad(loss, student.hidden, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"]], ids=["frozen", "trained"])
def test_one_graph_under_a_compiler(trained):
    torch._dynamo.reset()
    student, teacher, labels = make_heads(trained=trained)

    def loss(hidden, weight, bias):
        return compute(Head("student", hidden * 2, weight, bias), teacher, labels, "Symmetric") * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (student.hidden, student.weight, student.bias)
    both = gradients(compiled(*inputs), student), gradients(loss(*inputs), student)
    for graph, eager in zip(*both, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"], ()], ids=["frozen", "trained", "nothing"])
def test_operator_keeps_the_rules(trained):
    assert_operator_keeps_the_rules(*make_heads(trained=trained))


def test_autocast():
    student, teacher, labels = make_heads()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute(student, teacher, labels, "Forward")
    rounded = [Head(h.name, h.hidden.bfloat16(), h.weight.bfloat16(), h.bias.bfloat16()) for h in (student, teacher)]
    assert torch.equal(loss, compute(*rounded, labels, "Forward"))
    assert gradients(loss, student)[0].dtype == torch.float32


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [TRAINED["frozen head"], TRAINED["all"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", OURS)
def test_memory(name, trained, dtype):
    """The workspace, the gradients, which the forward keeps and the backward scales into new ones, vectors, and with a
    trained weight a copy of the hidden states in use and two of their gradient's sum."""
    student, teacher, labels = make_heads(dtype, trained=trained)
    assert 2 * labels.numel() * ENTRIES * dtype.itemsize > MIB, "the bound would hold anyway"
    compute(*make_heads(dtype, trained=trained), name).backward()
    held = []
    forward = usage(lambda: held.append(compute(student, teacher, labels, name)), torch.device("cpu"), False)
    backward = usage(lambda: held.pop().backward(), torch.device("cpu"), False)
    tokens = labels.numel()
    vectors = tokens * 64
    results = sum(x.nbytes for x in (student.hidden, student.weight, student.bias) if x.requires_grad)
    copies = tokens * (WIDTH * (4 * 3 + dtype.itemsize) + TEACHER_WIDTH * dtype.itemsize) if "weight" in trained else 0
    piece = 0 if "weight" in trained else 64 * (WIDTH * 2 + TEACHER_WIDTH) * dtype.itemsize
    assert forward.peak <= MIB + results + copies + piece + vectors
    assert forward.kept <= results + vectors
    # On a CPU a piece of a result and of its factor's product are widened.
    widened = 8 * max(results // dtype.itemsize, 1) if dtype == torch.bfloat16 else 0
    assert backward.peak <= results + min(widened, MIB) + vectors


@pytest.mark.parametrize(("name", "bytes_per_logit"), [("Forward", 17.5), ("Reverse", 21.5)])
def test_what_torchtunes_own_losses_take(name, bytes_per_logit):
    """The figures of docs/losses.md: bfloat16, frozen head, in chunks, with the cross-entropy that goes with it."""
    tokens, entries = 64, 4096
    hidden, teacher_hidden = (torch.randn(1, tokens, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    weight, teacher_weight = (torch.randn(entries, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    hidden.requires_grad_()
    labels = torch.randint(0, entries, (1, tokens))
    loss = torchtune.modules.loss.CEWithChunkedOutputLoss(8)
    kd_loss = getattr(torchtune.modules.loss, f"{name}KLWithChunkedOutputLoss")(8)
    held = []

    def both():
        logits = [F.linear(chunk, weight) for chunk in hidden.chunk(8, 1)]
        teacher_logits = [F.linear(chunk, teacher_weight) for chunk in teacher_hidden.chunk(8, 1)]
        held.append(kd_loss(logits, teacher_logits, labels) + loss(logits, labels))

    used = usage(both, torch.device("cpu"), False)
    assert used.peak / (tokens * entries) == pytest.approx(bytes_per_logit, abs=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace_mib", [128, 512])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_memory_on_a_card(trained, workspace_mib):
    """Llama 3's vocabulary, 8B into 1B: logits of both would take 4 GiB in bfloat16."""
    tokens, entries, widths = 8192, 128_256, (2048, 4096)
    heads = [
        Head(
            name,
            torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16),
            torch.randn(entries, width, device="cuda", dtype=torch.bfloat16) / 30,
        )
        for name, width in zip(("student", "teacher"), widths, strict=True)
    ]
    for what in trained:
        getattr(heads[0], what).requires_grad_()
    labels = torch.randint(0, entries, (tokens,), device="cuda")
    labels[::7] = -100
    compute(*heads, labels, "Forward", workspace_mib=workspace_mib).backward()
    results = sum(getattr(heads[0], what).nbytes for what in trained)
    if "weight" in trained:
        states = tokens * (widths[0] * (4 * 3 + 2) + widths[1] * 2)
    else:
        states = workspace_mib * MIB // (entries * 4) * (2 * widths[0] + widths[1]) * 2
    held = []
    forward = usage(
        lambda: held.append(compute(*heads, labels, "Forward", workspace_mib=workspace_mib)),
        torch.device("cuda"),
        False,
    )
    backward = usage(lambda: held.pop().backward(), torch.device("cuda"), False)
    assert forward.peak <= workspace_mib * MIB + results + states + 64 * tokens + 8 * entries
    assert forward.kept <= results + 64 * tokens
    assert backward.peak <= results + 64 * tokens + 8 * entries


def test_losses_of_the_docs_are_built():
    """Each YAML block of docs/losses.md, by torchtune."""
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    sections = [OmegaConf.create(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    built = [config.instantiate(section[key]) for section in sections for key in ("loss", "kd_loss") if key in section]
    assert [type(loss).__name__ for loss in built] == [
        "LinearCrossEntropyLoss",
        "LinearCrossEntropyLoss",
        "LinearForwardKLLoss",
    ]


# ---- bound to models


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bound_equals_torchtune_on_logits(impl, name, tied):
    """Beside the cross-entropy, as the recipes have it: both see the student's hidden states. All parameters train."""
    student, teacher = build_model(tied), build_teacher()
    tokens, labels = torch.randint(VOCABULARY, (2, 2, 9))
    labels[0, :4] = -100
    logits, teacher_logits = student(tokens), teacher(tokens)
    mixed = 0.7 * F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.3 * torchtunes(name)(
        logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1), labels.flatten()
    )
    mixed.backward()
    expected = {key: parameter.grad for key, parameter in student.named_parameters()}
    student.zero_grad()

    loss, kd_loss = LinearCrossEntropyLoss(), ours(name, impl=impl)
    loss.set_model_output(student)
    kd_loss.set_model_output(student)
    kd_loss.set_teacher_output(teacher)
    hidden = student(tokens)
    with torch.no_grad():
        teacher_hidden = teacher(tokens)
    actual = 0.7 * loss(hidden, labels) + 0.3 * kd_loss(hidden, teacher_hidden, labels)
    torch.testing.assert_close(actual, mixed)
    actual.backward()
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    # torchtune's single-device recipe leaves the teacher's parameters trainable.
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_release_gives_both_their_logits_back():
    student, teacher = build_model(), build_teacher()
    tokens = torch.randint(VOCABULARY, (2, 9))
    logits = student(tokens), teacher(tokens)
    loss = LinearForwardKLLoss()
    loss.release()
    for _ in range(2):
        loss.set_model_output(student)
        loss.set_teacher_output(teacher)
    assert student(tokens).shape[-1] == 64
    assert teacher(tokens).shape[-1] == 96
    assert not loss.state_dict()
    assert list(loss.modules()) == [loss]
    loss.release()
    loss.release()
    assert torch.equal(student(tokens), logits[0])
    assert torch.equal(teacher(tokens), logits[1])
    assert not any("_linear_cross_entropy" in name for model in (student, teacher) for name in vars(model))


def test_a_bound_loss_is_not_copied():
    loss, *_ = bound()
    with pytest.raises(TypeError, match="bound to models cannot be copied: release"):
        copy.deepcopy(loss)
    loss.release()
    assert type(copy.deepcopy(loss)) is LinearForwardKLLoss


def test_says_once_what_runs(caplog):
    caplog.set_level("INFO")
    loss, hidden, labels = bound()
    loss(*hidden, labels)
    loss(*hidden, labels)
    (said,) = [record.message for record in caplog.records if "KLLoss" in record.message]
    assert said == (
        "LinearForwardKLLoss runs impl 'chunked' (set: 'auto') on cpu in torch.float32, output projections [512, 64] "
        "(student) and [512, 96] (teacher)."
    )


# ---- bad input


def bound(**settings):
    student, teacher = build_model(), build_teacher()
    loss = LinearForwardKLLoss(**settings)
    loss.set_model_output(student)
    loss.set_teacher_output(teacher)
    return loss, (torch.randn(2, 7, 64), torch.randn(2, 7, 96)), torch.randint(VOCABULARY, (2, 7))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"impl": "cce"}, ValueError, "impl must be one of auto, .*, got 'cce': .* kernels are 'cce_exact'$"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be at least 1, got 0"),
        ({"sym_kd_ratio": 1.5}, ValueError, r"sym_kd_ratio must be a number in \[0, 1\], got 1.5"),
        ({"sym_kd_ratio": float("nan")}, ValueError, r"sym_kd_ratio must be a number in \[0, 1\], got nan"),
        ({"sym_kd_ratio": "half"}, ValueError, r"sym_kd_ratio must be a number in \[0, 1\], got 'half'"),
    ],
    ids=str,
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=f"^{message}"):
        LinearSymmetricKLLoss(**settings)


def test_unbound_loss_says_what_to_do():
    loss, hidden, labels = bound()
    loss.release()
    with pytest.raises(RuntimeError, match=r"before set_model_output\(student\).*knowledge_distillation_single_device"):
        loss(*hidden, labels)
    loss.set_model_output(build_model())
    with pytest.raises(RuntimeError, match=r"before set_teacher_output\(teacher\).*_kd_loss_fn.set_teacher_output"):
        loss(*hidden, labels)


BAD = {
    "student logits": ({0: torch.zeros(2, 7, 512)}, ValueError, r"student_hidden .*\[\.\.\., 64\].* those are logits"),
    "teacher logits": ({1: torch.zeros(2, 7, 512)}, ValueError, r"teacher_hidden .*\[\.\.\., 96\].* those are logits"),
    "swapped": ({0: torch.zeros(2, 7, 96)}, ValueError, r"student_hidden .*\[\.\.\., 64\] .* got \[2, 7, 96\]$"),
    "chunks": (
        {0: [torch.zeros(1)] * 8},
        TypeError,
        "student_hidden must be a torch.Tensor, got a list of 8: pass one",
    ),
    "teacher chunks": ({1: [torch.zeros(1)] * 8}, TypeError, "teacher_hidden must be a torch.Tensor, got a list of 8"),
    "label chunks": ({2: (torch.zeros(1),)}, TypeError, "labels must be a torch.Tensor, got a tuple of 1"),
    "labels": ({2: torch.zeros(2, 6).long()}, ValueError, r"labels .* student_hidden .*\[2, 7\], .* got \[2, 6\]"),
    "teacher tokens": ({1: torch.zeros(2, 6, 96)}, ValueError, r"labels .* teacher_hidden .*\[2, 6\], .* got \[2, 7\]"),
    "float labels": ({2: torch.zeros(2, 7)}, TypeError, "labels must be one of int64, int32, got torch.float32"),
    "half": (
        {0: torch.zeros(2, 7, 64).half()},
        TypeError,
        "student_weight must have the dtype .*float16, got .*float32",
    ),
    "integers": ({1: torch.zeros(2, 7, 96).long()}, TypeError, "teacher_hidden must be one of float32, .*int64"),
    "device": (
        {1: torch.zeros(2, 7, 96, device="meta")},
        ValueError,
        "teacher_weight must be on the device of teacher_h",
    ),
    "label device": (
        {2: torch.zeros(2, 7, device="meta").long()},
        ValueError,
        "labels must be on the device of student",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(changed, error, message):
    loss, hidden, labels = bound()
    arguments = [changed.get(place, good) for place, good in enumerate((*hidden, labels))]
    with pytest.raises(error, match=f"^{message}"):
        loss(*arguments)


def test_vocabularies_must_be_the_same():
    student, teacher, labels = make_heads(bias=False)
    teacher = Head("teacher", teacher.hidden, teacher.weight[:-1])
    with pytest.raises(ValueError, match=r"the same vocabulary, got output projections \[3001, 24\] and \[3000, 40\]"):
        compute(student, teacher, labels, "Forward")


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_models_of_unlike_vocabularies_are_not_bound(first):
    """The second one of them, which is then as it was; another pair takes a release."""
    student, teacher = build_model(tied=False), build_teacher()
    teacher.output = torch.nn.Linear(96, VOCABULARY - 12)
    loss = LinearForwardKLLoss()
    binds = {"student": lambda: loss.set_model_output(student), "teacher": lambda: loss.set_teacher_output(teacher)}
    binds.pop(first)()
    (second,) = binds
    rows = {"student": VOCABULARY, "teacher": VOCABULARY - 12}
    with pytest.raises(
        ValueError, match=rf"same vocabulary, got a {second} .* {rows[second]} rows, and {rows[first]} "
    ):
        binds[second]()
    models = {"student": student, "teacher": teacher}
    tokens = torch.randint(VOCABULARY, (1, 5))
    assert models[second](tokens).shape[-1] == rows[second]
    assert models[first](tokens).shape[-1] != rows[first]
    loss.release()
    binds[second]()
    loss.release()


@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "nested"])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_head_that_is_not_dense_is_refused(of, layout):
    heads = dict(zip(("student", "teacher"), make_heads(bias=False, trained=("hidden",))[:2], strict=True))
    weight = heads[of].weight
    converted = {
        "sparse": weight.to_sparse,
        "mkldnn": weight.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor([weight]),
    }
    heads[of] = Head(of, heads[of].hidden, converted[layout]())
    with pytest.raises(TypeError, match=rf"^{of}_weight must be a dense tensor \(torch.strided\), got .*{layout}"):
        compute(*heads.values(), torch.zeros(TOKENS, dtype=torch.int64), "Forward")


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_no_features_are_refused(of):
    *heads, labels = make_heads(bias=False)
    empty = [Head(head.name, head.hidden[..., :0], head.weight[:, :0]) if head.name == of else head for head in heads]
    with pytest.raises(ValueError, match=rf"{of}_weight must have shape \[V, D\] .* got \[3001, 0\]"):
        compute(*empty, labels, "Forward")


@pytest.mark.parametrize("impl", IMPLS)
def test_meta(impl):
    """What a planner of memory asks: no data, no autocast."""
    student, teacher, labels = make_heads(device="meta")
    loss = compute(student, teacher, labels, "Symmetric", impl)
    assert loss.is_meta
    for gradient, tensor in zip(gradients(loss, student), (student.hidden, student.weight, student.bias), strict=True):
        assert gradient.is_meta
        assert gradient.shape == tensor.shape


def test_quantised_head_is_refused():
    student, teacher, labels = make_heads(bias=False)
    weight = to_nf4(torch.randn(64, WIDTH * 8), block_size=64, scaler_block_size=1)
    with pytest.raises(TypeError, match="student_weight must be a plain tensor, got NF4Tensor: .* quantised"):
        compute(Head("student", student.hidden, weight), teacher, labels, "Forward")


def test_workspace_is_used(monkeypatch):
    """Fewer, larger pieces with more of it."""
    pieces = []
    real = chunked_divergence._piece
    monkeypatch.setattr(
        chunked_divergence, "_piece", lambda *arguments: pieces.append(len(arguments[2])) or real(*arguments)
    )
    student, teacher, labels = make_heads(trained=("hidden",))
    for workspace_mib in (1, 64):
        compute(student, teacher, labels, "Forward", workspace_mib=workspace_mib)
        pieces.append(None)
    assert pieces[-2:] == [int((labels != -100).sum()), None]
    assert pieces.index(None) > 2
