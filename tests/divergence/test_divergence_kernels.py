"""The divergences' kernels: any division of tokens and vocabulary against float64, and what they refuse."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from allocations import MIB, usage
from divergence_cases import (
    SHARES,
    by_formula,
    compute,
    gradients,
    in_float64,
    logits_of,
    near_heads,
    relative_error,
    torchtunes,
)

from torchtune_lce.divergence.choice import choose
from torchtune_lce.divergence.function import divergence_and_cross_entropy
from torchtune_lce.divergence.operands import Head
from torchtune_lce.inputs.low_rank import LowRank

pytest.importorskip("triton")

from torchtune_lce.kernels import (
    divergence_gradients,
    divergence_operators,
    divergence_rows,
    divergence_walk,
    tuning,
)
from torchtune_lce.kernels.divergence_tiles import divergence_configs
from torchtune_lce.kernels.divergence_walk import DivergenceDivision, Needs, Sizes

KERNELS = "cce_exact"
TRAINED = {
    "frozen": ("hidden",),
    "all": ("hidden", "weight", "bias"),
    "weight": ("weight",),
    "bias": ("hidden", "bias"),
}
# Of neither row blocks of 32 tokens, tiles of 64 entries nor steps of 32 features.
TOKENS, ENTRIES, WIDTH, TEACHER_WIDTH = 75, 205, 17, 40


def small_heads(dtype=torch.float32, device="cpu", trained=("hidden",), bias=True):
    """Far from each other; a third of the tokens is ignored."""

    def head(name, width):
        parts = torch.randn(TOKENS, width), torch.randn(ENTRIES, width) / 3, torch.randn(ENTRIES)
        hidden, weight, own_bias = (x.to(device, dtype) for x in parts)
        return Head(name, hidden, weight, own_bias if bias else None)

    student, teacher = head("student", WIDTH), head("teacher", TEACHER_WIDTH)
    for name in trained:
        getattr(student, name).requires_grad_()
    labels = torch.randint(0, ENTRIES, (TOKENS,), device=device)
    labels[::3] = -100
    return student, teacher, labels


def assert_exact(student, teacher, labels, name, *, tolerance, normalize=True, **settings):
    exact_student = in_float64(student)
    loss = compute(student, teacher, labels, name, KERNELS, normalize, **settings)
    exact = by_formula(exact_student, in_float64(teacher), labels, name, normalize)
    assert loss.dtype == torch.float32
    # A card's products are summed towards zero, those of float32 made of three parts each.
    assert relative_error(loss, exact) < (2e-5 if loss.is_cuda else 1e-6)
    if loss.is_cuda and student.hidden.dtype == torch.float32:
        tolerance *= 10
    results = gradients(loss, student, 3.0)
    for actual, expected in zip(results, gradients(exact, exact_student, 3.0), strict=True):
        assert relative_error(actual, expected) < tolerance
    return loss, results


# ---- values and gradients


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float16, 1e-3), pytest.param(torch.bfloat16, 8e-3, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("name", SHARES)
def test_float64(name, trained, dtype, tolerance, device):
    """Rounded thrice: the gradient by logits, a product of it, and that scaled."""
    for normalize in (True, False):
        assert_exact(
            *small_heads(dtype, device, trained, bias="bias" in trained), name, tolerance=tolerance, normalize=normalize
        )


# Tokens of a piece and tiles of a strip, by bytes.
DIVISIONS = {
    "frozen": {1: (32, 1), 48_000: (32, 4), MIB: (96, 4)},
    "all": {1: (32, 1), MIB: (96, 4)},
}


@pytest.mark.parametrize(
    ("trained", "workspace"), [(trained, size) for trained, sizes in DIVISIONS.items() for size in sizes]
)
def test_any_division(trained, workspace, device, monkeypatch):
    """As many programs as make segments of the vocabulary, that are added up."""
    if device.type == "cpu":
        for module in (divergence_rows, divergence_gradients, divergence_walk):
            monkeypatch.setattr(module, "programs", lambda _: 3)
    found = []
    divide, walk = divergence_walk.divide, divergence_walk.walk
    monkeypatch.setattr(divergence_walk, "divide", lambda *sizes: found.append(divide(*sizes)) or found[-1])
    monkeypatch.setattr(divergence_operators, "walk", lambda *arguments: walk(*arguments[:-1], workspace))
    assert_exact(*small_heads(device=device, trained=TRAINED[trained]), "Symmetric", tolerance=2e-6)
    if device.type == "cpu":
        assert found == [DivergenceDivision(*DIVISIONS[trained][workspace])]


def test_student_and_teacher_of_two_dtypes(device):
    student, teacher, labels = small_heads(torch.float16, device, ("hidden", "weight"))
    teacher = Head("teacher", teacher.hidden.float(), teacher.weight.float(), None)
    assert_exact(student, teacher, labels, "Symmetric", tolerance=1e-3)


@pytest.mark.parametrize("trained", [TRAINED["frozen"], TRAINED["all"]], ids=["frozen", "all"])
def test_ignored_tokens_may_hold_anything(trained, device):
    student, teacher, labels = small_heads(device=device, trained=trained)
    clean = gradients(compute(student, teacher, labels, "Symmetric", KERNELS), student)
    with torch.no_grad():
        student.hidden[labels == -100] = torch.nan
        teacher.hidden[labels == -100] = torch.inf
    dirty = gradients(compute(student, teacher, labels, "Symmetric", KERNELS), student)
    assert not clean[0][labels == -100].any()
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 1.5e-3), pytest.param(torch.bfloat16, 6e-3, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_near_the_teacher_only_the_difference_is_rounded(trained, dtype, tolerance, device):
    """Not q and p before, which would be some 30 times as much. Scaled, as training in float16 scales losses."""
    student, teacher, labels = near_heads(dtype, device, 60, 400, 48, trained)
    exact_student = in_float64(student)
    for name in SHARES:
        loss = 1024 * compute(student, teacher, labels, name, KERNELS)
        exact = 1024 * by_formula(exact_student, in_float64(teacher), labels, name)
        for actual, expected in zip(gradients(loss, student), gradients(exact, exact_student), strict=True):
            assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_and_infinity_reach_the_loss(of, value, device):
    """And of the other tokens' gradients none."""
    student, teacher, labels = small_heads(device=device)
    with torch.no_grad():
        (student if of == "student" else teacher).hidden[1, 2] = value
    loss = compute(student, teacher, labels, "Symmetric", KERNELS)
    assert not loss.isfinite()
    (d_hidden,) = gradients(loss, student)
    assert d_hidden.isfinite().all(-1).tolist() == [token != 1 for token in range(TOKENS)]


def test_a_twin_has_no_gradient(device):
    student, _, labels = small_heads(device=device, trained=TRAINED["all"])
    twin = Head("teacher", student.hidden.detach(), student.weight.detach(), student.bias.detach())
    for name in SHARES:
        for gradient in gradients(compute(student, twin, labels, name, KERNELS), student):
            assert gradient.abs().max() < 1e-6


def test_memory_layouts_and_shapes(device):
    """[B, S, D]; labels int32; strides; one vocabulary entry alone."""
    student, teacher, labels = small_heads(device=device, bias=False)
    expected = compute(student, teacher, labels, "Symmetric", KERNELS)
    shaped = [replace(head, hidden=head.hidden.view(3, 25, -1)) for head in (student, teacher)]
    torch.testing.assert_close(compute(*shaped, labels.view(3, 25).int(), "Symmetric", KERNELS), expected)
    strided = [
        replace(head, hidden=head.hidden.T.contiguous().T, weight=head.weight.T.contiguous().T)
        for head in (student, teacher)
    ]
    torch.testing.assert_close(compute(*strided, labels.repeat_interleave(2)[::2], "Symmetric", KERNELS), expected)
    one = [replace(head, weight=head.weight[:1]) for head in (student, teacher)]
    assert compute(*one, labels, "Symmetric", KERNELS) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [TRAINED["frozen"], TRAINED["all"]], ids=["frozen", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_are_equal_in_every_bit(dtype, trained, device):
    student, teacher, labels = near_heads(dtype, device, 1000, 20_000, 256, trained)
    results = []
    for _ in range(2):
        loss = compute(student, teacher, labels, "Symmetric", KERNELS, workspace_mib=8)
        results.append([loss.detach(), *gradients(loss, student)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 5, 8, 16), (129, 1031, 100, 36), (515, 4097, 896, 1536), (2048, 32_000, 64, 72)])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
def test_ragged_sizes_on_a_card(trained, sizes, device):
    """Where rows are no whole 16 bytes the copy engine reads nothing."""
    tokens, entries, width, teacher_width = sizes
    heads = [
        Head(
            name,
            torch.randn(tokens, size, device=device, dtype=torch.bfloat16),
            torch.randn(entries, size, device=device, dtype=torch.bfloat16) / size**0.5,
            torch.randn(entries, device=device, dtype=torch.bfloat16),
        )
        for name, size in (("student", width), ("teacher", teacher_width))
    ]
    for name in trained:
        getattr(heads[0], name).requires_grad_()
    labels = torch.randint(0, entries, (tokens,), device=device)
    labels[1::7] = -100
    for workspace_mib in (1, 128):
        assert_exact(*heads, labels, "Symmetric", tolerance=8e-3, workspace_mib=workspace_mib)


# ---- with the labels' cross-entropy

DIVERGENCE_SHARE = 0.3


def both_losses(student, teacher, labels, name, workspace_mib=1, ignore_index=-100):
    """The divergence and the cross-entropy."""
    settings = {"ignore_index": ignore_index, "workspace_mib": workspace_mib, "divergence_share": DIVERGENCE_SHARE}
    losses = divergence_and_cross_entropy(student, teacher, labels, SHARES[name], **settings)
    return losses.unbind()


def mixed(of_divergence, of_labels):
    """As torchtune's recipes mix them."""
    return DIVERGENCE_SHARE * of_divergence + (1 - DIVERGENCE_SHARE) * of_labels


def assert_both_exact(student, teacher, labels, name, tolerance, **settings):
    exact_student = in_float64(student)
    losses = both_losses(student, teacher, labels, name, **settings)
    exact = (
        by_formula(exact_student, in_float64(teacher), labels, name),
        F.cross_entropy(logits_of(exact_student), labels),
    )
    for actual, expected in zip(losses, exact, strict=True):
        assert relative_error(actual, expected) < (2e-5 if actual.is_cuda else 1e-6)
    if losses[0].is_cuda and student.hidden.dtype == torch.float32:
        tolerance *= 10
    results = gradients(mixed(*losses), student, 3.0)
    for actual, expected in zip(results, gradients(mixed(*exact), exact_student, 3.0), strict=True):
        assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float16, 1e-3), pytest.param(torch.bfloat16, 8e-3, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED.keys())
@pytest.mark.parametrize("name", SHARES)
def test_float64_with_cross_entropy(name, trained, dtype, tolerance, device):
    heads = small_heads(dtype, device, trained, bias="bias" in trained)
    assert_both_exact(*heads, name, tolerance)


@pytest.mark.parametrize("trained", DIVISIONS)
def test_cross_entropy_in_any_division(trained, device, monkeypatch):
    """Of pieces and groups of tokens, and of strips: each label is found in its own."""
    walk = divergence_walk.walk
    for workspace in DIVISIONS[trained]:
        monkeypatch.setattr(divergence_operators, "walk", lambda *arguments, own=workspace: walk(*arguments[:-1], own))
        assert_both_exact(*small_heads(device=device, trained=TRAINED[trained]), "Symmetric", 2e-6)


def test_surprised_and_confident_students(device):
    """Losses of some 70 to 1e-6."""
    student, teacher, labels = small_heads(device=device, bias=False)
    with torch.no_grad():
        towards = student.weight[labels.clamp(min=0)]
        lead = torch.linspace(-70, 15, TOKENS, device=device)[:, None]
        student.hidden.add_(lead * towards / towards.square().sum(-1, keepdim=True))
    assert_both_exact(student, teacher, labels, "Forward", 2e-6)


def test_what_all_logits_share_costs_no_digit(device):
    """Logits of 2^14 and multiples of 2^-8, which float32 holds."""
    student, teacher, labels = small_heads(device=device, bias=False)
    with torch.no_grad():
        for x in (student.hidden, student.weight):
            x.copy_((x * 16).round() / 16)
        student.hidden[:, 0], student.weight[:, 0] = 1, 2**14
    _, of_labels = both_losses(student, teacher, labels, "Forward")
    exact = F.cross_entropy(logits_of(in_float64(student)), labels)
    assert relative_error(of_labels, exact) < 1e-6


def test_a_label_without_an_entry_spoils_its_own_token(device):
    student, teacher, labels = small_heads(device=device)
    labels[1] = ENTRIES
    of_divergence, of_labels = both_losses(student, teacher, labels, "Symmetric")
    assert of_divergence.isfinite()
    assert of_labels.isnan()
    (d_hidden,) = gradients(mixed(of_divergence, of_labels), student)
    assert d_hidden.isfinite().all(-1).tolist() == [token != 1 for token in range(TOKENS)]


def test_other_shares_than_were_asked_for_are_nan(device):
    """Those that float32 rounds are the same."""
    student, teacher, labels = small_heads(device=device)
    of_divergence, of_labels = both_losses(student, teacher, labels, "Forward")

    def d_hidden(loss):
        return torch.autograd.grad(loss, student.hidden, retain_graph=True)[0]

    for factor in (1e-6, 0.0, 3.0, 1e4):
        scaled = d_hidden(mixed(of_divergence * factor, of_labels * factor))
        torch.testing.assert_close(scaled, factor * d_hidden(mixed(of_divergence, of_labels)), rtol=1e-4, atol=0)
    for loss in (of_divergence, of_labels, of_divergence + of_labels, mixed(of_divergence, of_labels * 1.001)):
        assert d_hidden(loss)[1].isnan().all()


@pytest.mark.parametrize("ignored", [True, False])
def test_no_labels_have_no_cross_entropy(ignored, device):
    student, teacher, labels = small_heads(device=device)
    if ignored:
        labels[:] = -100
    else:
        student, teacher = (
            replace(head, hidden=head.hidden.detach()[:0].requires_grad_(head is student))
            for head in (student, teacher)
        )
        labels = labels[:0]
    losses = both_losses(student, teacher, labels, "Symmetric")
    assert [loss.item() for loss in losses] == [0, 0]
    assert not gradients(mixed(*losses), student)[0].any()


@pytest.mark.gpu
def test_cross_entropy_waits_for_nothing_and_repeats(device):
    heads = near_heads(torch.bfloat16, device, 1000, 20_000, 256, ("hidden", "weight"))
    results = []
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = both_losses(*heads, "Symmetric", workspace_mib=8)
            results.append([*losses, *gradients(mixed(*losses), heads[0])])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- as an operator


def test_backward_twice_and_without_a_graph(device):
    student, teacher, labels = small_heads(device=device, trained=TRAINED["all"])
    loss = compute(student, teacher, labels, "Forward", KERNELS)
    trained = [student.hidden, student.weight, student.bias]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss * 2, trained)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one * 2, other, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(compute(student, teacher, labels, "Forward", KERNELS), loss)


def test_other_derivatives_are_refused(device):
    student, teacher, labels = small_heads(device=device)
    loss = compute(student, teacher, labels, "Forward", KERNELS)
    (gradient,) = torch.autograd.grad(loss, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* set impl='reference'"):
        gradient.square().sum().backward()

    def of_hidden(hidden):
        return compute(replace(student, hidden=hidden), teacher, labels, "Forward", KERNELS)

    with pytest.raises(RuntimeError, match=r"impl='cce_exact' has no derivative by torch.func .* set impl='reference'"):
        torch.func.grad(of_hidden)(student.hidden.detach())


@pytest.mark.parametrize("trained", [TRAINED["frozen"], TRAINED["all"]], ids=["frozen", "all"])
def test_one_graph_under_a_compiler(trained, device):
    torch._dynamo.reset()
    student, teacher, labels = small_heads(device=device, trained=trained)

    def loss(hidden, weight, bias):
        return compute(Head("student", hidden * 2, weight, bias), teacher, labels, "Symmetric", KERNELS) * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (student.hidden, student.weight, student.bias)
    both = gradients(compiled(*inputs), student), gradients(loss(*inputs), student)
    for graph, eager in zip(*both, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", [TRAINED["frozen"], TRAINED["all"], ()], ids=["frozen", "all", "nothing"])
def test_operator_keeps_the_rules(trained, device):
    student, teacher, labels = small_heads(device=device, trained=trained)
    needs = [x.requires_grad for x in student.operands[:3]]
    # Of two losses it differentiates the sum, so in equal shares.
    for divergence_share in (1.0, 0.5):
        arguments = (*student.operands[:3], *teacher.operands[:3], labels, -100, 0.3, 0.7, divergence_share, 1, needs)
        torch.library.opcheck(torch.ops.torchtune_lce.strip_divergence.default, arguments)


# ---- where they run


def test_what_they_do_not_take_is_refused(device):
    student, teacher, labels = small_heads(device=device)
    adapter = LowRank(torch.randn(TOKENS, 3, device=device), torch.randn(ENTRIES, 3, device=device), None)
    for heads in ((replace(student, low_rank=adapter), teacher), (student, replace(teacher, low_rank=adapter))):
        message = "^impl='cce_exact' does not take LoRA or DoRA on the output .*; set impl='chunked'"
        with pytest.raises(RuntimeError, match=message):
            compute(*heads, labels, "Forward", KERNELS)
        assert choose("auto", *heads) == "chunked"
    wide = Head("teacher", *(x.double() for x in teacher.operands[:3]))
    with pytest.raises(RuntimeError, match="^impl='cce_exact' does not take float64; set impl='chunked'"):
        compute(student, wide, labels, "Forward", KERNELS)


def test_needs_a_card_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student, teacher, labels = small_heads()
    with pytest.raises(RuntimeError, match="^impl='cce_exact' needs a CUDA card, not cpu; set impl='chunked'"):
        compute(student, teacher, labels, "Forward", KERNELS)
    assert choose("auto", student, teacher) == "chunked"


@pytest.mark.gpu
def test_auto_takes_them_on_a_card(device):
    student, teacher, labels = small_heads(torch.bfloat16, device)
    assert choose("auto", student, teacher) == KERNELS
    losses = [compute(student, teacher, labels, "Forward", impl) for impl in ("auto", KERNELS)]
    assert torch.equal(*losses)


@pytest.mark.gpu
def test_waits_for_nothing(device):
    heads = small_heads(torch.bfloat16, device, TRAINED["all"])
    compute(*heads, "Symmetric", KERNELS).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(*heads, "Symmetric", KERNELS).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", itertools.product((False, True), repeat=3), ids=str)
def test_the_workspace_holds_what_is_allocated(needs, dtype):
    """As a card divides the work; where tokens share a gradient hidden states and sums are beside it."""
    needs = Needs(*needs)
    config = replace(tuning._cuda_config((9, 0), dtype, "ieee"), forward_entries=128)
    for tokens, workspace_mib in itertools.product((100, 2048, 8192, 20_001), (32, 128, 1024)):
        workspace = workspace_mib * MIB
        sizes = Sizes(tokens, 151_936, 896, 1536, dtype, dtype, needs, workspace)
        division = divergence_walk.divide(sizes, 132, config)
        piece = min(division.places, tokens)
        blocks = -(-(tokens if needs.of_entries else piece) // 128)
        strip = division.tiles * divergence_walk.tile_bytes(blocks, sizes, config)
        beside = divergence_walk.bytes_beside(piece, sizes, 132, config)
        smallest = division == DivergenceDivision(128, 1)
        assert strip + beside <= workspace or smallest
        # A piece or a strip more would not fit.
        if piece < tokens and not smallest:
            assert strip + beside > workspace / 4


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_memory_on_a_card(trained, device):
    """Qwen 2's vocabulary, 1.5B into 0.5B: logits of both would take 4.6 GiB in bfloat16."""
    tokens, entries, widths = 8192, 151_936, (896, 1536)
    heads = [
        Head(
            name,
            torch.randn(tokens, width, device=device, dtype=torch.bfloat16),
            torch.randn(entries, width, device=device, dtype=torch.bfloat16) / 30,
        )
        for name, width in zip(("student", "teacher"), widths, strict=True)
    ]
    for what in trained:
        getattr(heads[0], what).requires_grad_()
    labels = torch.randint(0, entries, (tokens,), device=device)
    labels[::7] = -100
    settings = {"impl": KERNELS, "workspace_mib": 128}
    compute(*heads, labels, "Forward", **settings).backward()
    results = sum(getattr(heads[0], what).nbytes for what in trained)
    sums = 4 * tokens * widths[0] if "weight" in trained else 0
    held = []
    forward = usage(lambda: held.append(compute(*heads, labels, "Forward", **settings)), device, False)
    backward = usage(lambda: held.pop().backward(), device, False)
    assert forward.peak <= 128 * MIB + results + sums + 64 * tokens + 8 * entries
    assert forward.kept <= results + 64 * tokens
    assert backward.peak <= results + 64 * tokens + 8 * entries


def test_torchtune_agrees(device):
    student, teacher, labels = small_heads(device=device)
    for name in SHARES:
        logits = [head.hidden @ head.weight.T + head.bias for head in (student, teacher)]
        loss = compute(student, teacher, labels, name, KERNELS)
        torch.testing.assert_close(loss, torchtunes(name)(*logits, labels), rtol=1e-5, atol=0)


def test_configs_of_two_dtypes(device):
    """Blocks of the wider for the logits, those of the student for its products."""
    logits, products = divergence_configs(device, torch.float16, torch.float32)
    assert logits.block_d == tuning.config_for(device, torch.float32).block_d
    assert logits.row_block == products.row_block
    assert logits.forward_entries == products.forward_entries
