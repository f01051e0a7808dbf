"""``tune-lce bench --divergence``: its data, what its losses are held against, who is timed, and what is written."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from divergence_cases import by_formula, in_float64

from torchtune_lce.commands import tune_parser
from torchtune_lce.commands.bench import (
    command,
    correctness,
    divergence_candidates,
    divergence_yardstick,
    measure,
    session,
    timing,
)
from torchtune_lce.commands.bench.teacher_batches import NEAR, TeacherShape, teacher_batch
from torchtune_lce.commands.shared import peers
from torchtune_lce.commands.shared.candidates import Candidate, select
from torchtune_lce.commands.shared.objective import Objective
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.divergence.operands import Head

CPU = torch.device("cpu")
TINY = TeacherShape(90, 32, 300, 24)
NEAR_TINY = TeacherShape(90, 32, 300, 32)
FORWARD, MIXED = Objective("forward"), Objective("reverse", 0.3)


def named(objective: Objective) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in divergence_candidates.candidates(objective)}


# ---- data


def test_unrelated_and_near_data():
    batch = teacher_batch("random", TINY, torch.float32, CPU)
    assert (batch.shape, batch.title) == (TINY, "random 90x32x300, teacher 24")
    alike = teacher_batch("random", NEAR_TINY, torch.float32, CPU)
    for student, teacher in ((alike.hidden, alike.teacher_hidden), (alike.weight, alike.teacher_weight)):
        assert torch.corrcoef(torch.stack([student.flatten(), teacher.flatten()]))[0, 1].abs() < 0.1
    near = teacher_batch(NEAR, NEAR_TINY, torch.float32, CPU)
    for student, teacher in ((near.hidden, near.teacher_hidden), (near.weight, near.teacher_weight)):
        assert ((student - teacher).norm() / teacher.norm()).item() == pytest.approx(0.01, rel=0.05)
    assert (near.teacher_hidden @ near.teacher_weight.T).std().item() == pytest.approx(3, rel=0.05)
    assert near.targets.unique().numel() > 30


def test_flops_count_the_teachers_logits():
    assert [TeacherShape(2, 3, 5, 7).flops(frozen) for frozen in (None, True, False)] == [200, 260, 320]


def test_the_projection_is_of_both_models(monkeypatch):
    batch = teacher_batch("random", TINY, torch.float32, CPU)
    real, shapes = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: shapes.append((*a.shape, b.shape[1])) or real(a, b, out=out))
    measure.time_projection(batch, lambda run: timing.Timing((run() or 1.0,)))
    assert shapes == [(90, 32, 300), (90, 24, 300)]


# ---- the check


@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", ["Forward", "Reverse", "Symmetric"])
def test_the_reference_is_the_formula_in_float64(name, kd_ratio, monkeypatch):
    monkeypatch.setattr(divergence_yardstick, "_LOGITS", 20 * TINY.vocab)  # several chunks
    monkeypatch.setattr("divergence_cases.SHARES", {name: Objective(name.lower()).shares})
    batch = teacher_batch("random", TINY, torch.float32, CPU)
    batch.targets[3:40] = -100
    student, teacher = (in_float64(Head("", *head)) for head in batch.heads)
    for tensor in (student.hidden, student.weight):
        tensor.requires_grad_()
    loss = kd_ratio * by_formula(student, teacher, batch.targets, name)
    loss = loss + (1 - kd_ratio) * F.cross_entropy(student.hidden @ student.weight.T, batch.targets)
    d_hidden, d_weight = torch.autograd.grad(loss, [student.hidden, student.weight])
    right = divergence_yardstick.measure(batch, Objective(name.lower(), kd_ratio))
    assert right.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(right.d_hidden, d_hidden)
    torch.testing.assert_close(right.d_weight, d_weight)
    assert 0 < right.own.hidden < 1e-6
    assert 0 < right.own.weight < 1e-6


@pytest.mark.parametrize("objective", [FORWARD, Objective("symmetric"), MIXED], ids=str)
def test_torchtunes_losses_are_right_and_compile_as_one_graph(objective, monkeypatch):
    """Without the seconds that generating code takes."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, dynamic: whole(function, dynamic=dynamic))
        compiled = named(objective)["torch_compile_full"].build()
    candidates = named(objective)
    candidates["torch_compile_full"] = Candidate("", lambda: compiled, any_size=True, objective=objective)
    for name in ("eager_full", "torch_compile_full", "torchtune"):
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()  # of one function it makes a few graphs and no more
            checks = measure.check(candidates[name], dtype, CPU)
            assert [(check.data, check.status) for check in checks] == [("random", "ok"), ("near", "ok")], name


@pytest.mark.parametrize("objective", [FORWARD, Objective("symmetric"), MIXED], ids=str)
@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_ours_are_right_without_a_card(name, objective):
    for dtype in (torch.float32, torch.bfloat16):
        checks = measure.check(named(objective)[name], dtype, CPU)
        assert [(check.data, check.status) for check in checks] == [("random", "ok"), ("near", "ok")]


def test_the_kernels_are_right_apart_and_in_one_walk(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(correctness, "RAGGED", Shape(33, 32, 100))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert "one_walk" not in named(FORWARD)
    for candidate in (named(FORWARD)["cce_exact"], *(named(MIXED)[name] for name in ("one_walk", "cce_exact"))):
        assert candidate.obstacle(device, dtype) is None
        checks = measure.check(candidate, dtype, device)
        assert [(check.data, check.status) for check in checks] == [("random", "ok"), ("near", "ok")]


def test_logits_that_are_rounded_are_too_much_for_ours_alone():
    """Near the teacher, where the gradient is their difference."""
    batch = teacher_batch(NEAR, NEAR_TINY, torch.bfloat16, CPU)
    right = divergence_yardstick.measure(batch, FORWARD)
    build = functools.partial(peers.full_logits_with_teacher, FORWARD)
    status = {}
    for ours in (True, False):
        candidate = Candidate("rounds", build, ours=ours, objective=FORWARD)
        (case,) = measure.measure([candidate], batch, right, False, lambda run, parts: timing.Timing((1.0,)))
        status[ours] = case.status
        assert 0.2 < case.grad_error_hidden < 1
    assert status[True].startswith("wrong: ")
    assert status[False] == "ok"
    assert right.allowed().hidden < 7e-3


def test_float32_has_room_for_the_roundings_of_logits_that_cancel():
    """A card's float32 products are not PyTorch's on a CPU."""
    most = {}
    for kind, shape in (("random", TINY), (NEAR, NEAR_TINY)):
        right = divergence_yardstick.measure(teacher_batch(kind, shape, torch.float32, CPU), FORWARD)
        most[kind] = right.allowed().hidden
    assert most["random"] < 1e-5 < 1e-4 < most[NEAR] < 1e-3


@pytest.mark.parametrize("objective", [FORWARD, MIXED], ids=str)
@pytest.mark.parametrize("factor", [0.97, float("nan")])
def test_a_wrong_gradient_is_not_timed(objective, factor):
    loss = peers.full_logits_with_teacher(objective)

    def wrong(hidden, weight, labels, *teacher):
        value = loss(hidden, weight, labels, *teacher)
        return factor * value + (1 - factor) * value.detach()

    def no_timer(run, parts):
        raise AssertionError("what is wrong must not be timed")

    batch = teacher_batch("random", TINY, torch.bfloat16, CPU)
    candidate = Candidate("wrong", lambda: wrong, any_size=True, objective=objective)
    (case,) = measure.measure([candidate], batch, divergence_yardstick.measure(batch, objective), True, no_timer)
    (check, _) = measure.check(candidate, torch.bfloat16, CPU)
    assert case.status.startswith("wrong: ")
    assert check.status.startswith("wrong: ")


# ---- the command


def test_results_beside_those_of_losses(tune_lce, monkeypatch, tmp_path):
    """Both kinds of data, as JSON and as a picture; with the workspace that was asked for."""
    monkeypatch.setattr(timing, "_CLOCKED_CALLS", 1)
    seen = {"divergence": set(), "linear_cross_entropy": set()}

    def noting(*args, function, name, **settings):
        seen[name].add(settings["workspace_mib"])
        return function(*args, **settings)

    for name in seen:
        noted = functools.partial(noting, function=getattr(divergence_candidates, name), name=name)
        monkeypatch.setattr(divergence_candidates, name, noted)
    arguments = ("--cpu", "--divergence", "symmetric", "--kd-ratio", "0.25", "--teacher-hidden", "24")
    data = ("--data", "random:64x16x300", "--data", "near:40x16x300", "--workspace-mib", "7")
    status, printed = tune_lce(*arguments, *data, "--only", "eager_full,chunked", "--output", tmp_path / "results")
    assert status == 0, printed
    assert "0.25 symmetric divergence + 0.75 cross-entropy" in printed
    assert "random 64x16x300, teacher 24, float32" in printed
    assert seen == {"divergence": {7}, "linear_cross_entropy": {7}}
    results = json.loads((tmp_path / "results" / session.RESULTS).read_text())
    assert results["loss"] == "0.25 symmetric divergence + 0.75 cross-entropy"
    assert "2NV(2D + E)" in results["flops"]
    shapes = {"random": TeacherShape(64, 16, 300, 24), "near": TeacherShape(40, 16, 300, 16)}
    for record in results["data"]:
        assert record["shape"] == vars(shapes[record["data_name"]])
        assert 4 < record["loss"] < 9
    floors = {floor["data_name"]: floor["tflops"] for floor in results["floors"]}
    assert floors.keys() == shapes.keys()
    cases = results["cases"]
    assert {(case["impl"], case["data_name"], case["frozen_weight"]) for case in cases} == {
        (impl, name, frozen) for impl in ("eager_full", "chunked") for name in shapes for frozen in (True, False)
    }
    for case in cases:
        shape = shapes[case["data_name"]]
        assert (case["status"], case["shape"]) == ("ok", vars(shape))
        assert case["workspace_mib"] == (7 if case["impl"] == "chunked" else None)
        rate = shape.flops(case["frozen_weight"]) / case["forward_backward_ms"] / 1e9
        assert case["cublas_fraction"] == pytest.approx(rate / floors[case["data_name"]])
        assert 0 < case["grad_error_hidden"] < 1e-4
        assert (case["grad_error_weight"] is None) == case["frozen_weight"]
    assert (tmp_path / "results" / session.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kd-ratio", "0.5"], "--kd-ratio is for --divergence"),
        (["--teacher-hidden", "64"], "--teacher-hidden is for --divergence"),
        (["--data", "near"], "--data takes random, trained, probe, file; got 'near'"),
        (
            ["--divergence", "forward", "--data", "trained"],
            "--data takes random, near with --divergence; got 'trained'",
        ),
        (["--divergence", "forward", "--file", "x.pt"], "--file is for --data file"),
        (["--divergence", "forward", "--kd-ratio", "0"], "--kd-ratio must be in (0, 1], got 0.0"),
        (["--divergence", "forward", "--kd-ratio", "nan"], "--kd-ratio must be in (0, 1], got nan"),
        (["--divergence", "forward", "--teacher-hidden", "0"], "teacher_hidden must be at least 1, got 0"),
        (
            ["--divergence", "forward", "--data", "near", "--teacher-hidden", "9"],
            "--teacher-hidden is for --data random",
        ),
        (
            ["--divergence", "forward", "--only", "one_walk"],
            "reference, eager_full, torch_compile_full, torchtune; got",
        ),
        (
            ["--divergence", "forward", "--kd-ratio", "0.5", "--only", "cce"],
            "--only takes one_walk, cce_exact, chunked",
        ),
        (
            ["--divergence", "forward", "--check-only", "--teacher-hidden", "9"],
            "--teacher-hidden is not for --check-only",
        ),
    ],
)
def test_arguments_that_make_no_sense(tune_lce, arguments, said):
    status, printed = tune_lce(*arguments)
    assert status == 2
    assert said in printed


def test_data_and_shapes_of_the_command_line():
    def sources(*arguments: str) -> list[session.Source]:
        parser = tune_parser.TuneLCEParser()._parser
        return command.read_sources(parser.parse_args(["bench", "--divergence", "forward", *arguments]))

    asked = ("--data", "random:10x20x30", "--data", "near:10x20x30", "--teacher-hidden", "40")
    assert sources(*asked) == [
        session.Source("random", TeacherShape(10, 20, 30, 40)),
        session.Source("near", TeacherShape(10, 20, 30, 20)),
    ]
    assert sources("--tokens", "8,16", "--model", "qwen2_5_0_5b") == [
        session.Source(kind, TeacherShape(tokens, 896, 151_936, 896))
        for kind in ("random", "near")
        for tokens in (8, 16)
    ]


def test_who_is_measured():
    alone, both = (select(None, None, divergence_candidates.candidates(objective)) for objective in (FORWARD, MIXED))
    assert [candidate.name for candidate in alone] == [
        *("cce_exact", "chunked", "torch_compile", "reference", "eager_full", "torch_compile_full", "torchtune")
    ]
    assert {candidate.name for candidate in both} - {candidate.name for candidate in alone} == {"one_walk"}
    assert {candidate.name for candidate in both if candidate.compiles} == {
        *("torch_compile", "torch_compile_full", "torchtune")
    }
