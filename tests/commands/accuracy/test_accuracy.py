"""tune-lce accuracy: its data, its yardsticks, and that it sees an implementation that is wrong."""

import argparse
from dataclasses import replace

import pytest
import torch

from torchtune_lce.commands.accuracy import command, data, measure, report, session
from torchtune_lce.commands.accuracy.measure import Row, rows_of
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.yardstick import Errors, left_out_by_filter, plain_torch
from torchtune_lce.implementations import choice

CPU = torch.device("cpu")
SMALL = Shape(tokens=160, hidden=128, vocab=1500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(256, 256, 8000), Shape(64, 128, 500)], ids=str)
def test_confident_targets_are_above_99_percent(shape, dtype):
    """After rounding too; and not all of them are beyond what the dtype can tell from 1."""
    batch = data.confident_batch(shape, dtype, CPU)
    log_softmax = (batch.hidden.double() @ batch.weight.double().T).log_softmax(-1)
    rest = -torch.expm1(log_softmax.gather(1, batch.targets[:, None])[:, 0])
    assert rest.max() < 0.01
    assert rest.max() > 1e-3
    assert rest.min() < 1e-5


def test_strictest_filter_leaves_out_what_is_small_unless_it_is_much():
    """Two blocks of tokens: one of three probable entries and a hundred small ones, one with every entry small."""
    logits = torch.zeros(256, 4500, dtype=torch.float64)
    logits[:128, :3] = 20
    logits[:128, 100:200] = 9  # 5.6e-6 of the softmax each
    softmax = logits.softmax(-1)
    targets = torch.full((256, 1), 150)
    left_out = left_out_by_filter(softmax, targets, 2.0**-12)
    assert (left_out[128:] == 0).all(), "kept whole"
    small = torch.ones(4500, dtype=torch.bool)
    small[[0, 1, 2, 150]] = False  # probable ones, and a target
    assert torch.equal(left_out[:128, small], softmax[:128, small])
    assert (left_out[:128, ~small] == 0).all()


@pytest.mark.parametrize("kind", data.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_implementations_pass(kind, dtype):
    batch = data.KINDS[kind](SMALL, dtype, CPU)
    torch_row, *rows = rows_of(batch, ["chunked", "reference"])
    assert torch_row.name == "PyTorch"
    assert torch_row.allowed is None
    assert [row.name for row in rows] == ["chunked", "reference"]
    for row in rows:
        assert row.passed, row
        assert all(0 <= error < 0.2 for error in row.errors.parts.values()), row


def test_kernels_pass_in_the_interpreter(device):
    """Each preset is allowed what it filters, and no more."""
    pytest.importorskip("triton")
    batch = data.trained_batch(Shape(40, 64, 300), torch.float16, device)
    rows = {row.name: row for row in rows_of(batch, ["cce", "cce_exact", "cce_kahan_full_c"])}
    assert all(row.passed for row in rows.values()), rows
    strict = rows["strictest filter"].errors
    assert strict.loss == 0
    assert rows["cce"].allowed.loss == rows["cce_exact"].allowed.loss
    assert rows["cce"].allowed.hidden > rows["cce_exact"].allowed.hidden
    assert rows["cce_kahan_full_c"].allowed.hidden == rows["cce"].allowed.hidden
    assert rows["cce_kahan_full_c"].allowed.weight == rows["cce_exact"].allowed.weight


def summed_in_bfloat16(batch):
    """The weight's gradient, 64 parts of it added up in bfloat16."""
    total = torch.zeros_like(batch.weight)
    parts = zip(batch.hidden.tensor_split(64), batch.targets.tensor_split(64), strict=True)
    for hidden, targets in parts:
        total += plain_torch(hidden, batch.weight, targets, len(batch.targets))[2]
    return total


MUTATIONS = {
    "loss": lambda batch, loss, hidden, weight: (loss * 1.01, hidden, weight),
    "gradients": lambda batch, loss, hidden, weight: (loss, hidden * 1.03, weight * 1.03),
    "sum": lambda batch, loss, hidden, weight: (loss, hidden, summed_in_bfloat16(batch)),
}


@pytest.fixture(scope="module")
def rows_by_mutation():
    """Of the reference as it is, None, and as each mutation makes it; float64 of the batch takes seconds."""
    right = measure.implementation
    mutations = iter([lambda batch, *results: results, *MUTATIONS.values()])
    batch = data.trained_batch(Shape(512, 256, 4000), torch.bfloat16, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "implementation", lambda impl, at: next(mutations)(at, *right(impl, at)))
        _, *rows = rows_of(batch, ["reference"] * (1 + len(MUTATIONS)))
    return dict(zip([None, *MUTATIONS], rows, strict=True))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_slightly_wrong_in_bfloat16_fails(rows_by_mutation, mutation):
    assert rows_by_mutation[None].passed
    row = rows_by_mutation[mutation]
    assert not row.passed, row
    wrong = {name for name, error in row.errors.parts.items() if error > getattr(row.allowed, name)}
    assert wrong == {"loss": {"loss"}, "gradients": {"hidden", "weight"}, "sum": {"weight"}}[mutation]


def wrong_by(error):
    """The reference, its gradient by hidden off by a relative ``error``."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, upstream):
            return upstream * (1 + error)

    right = choice._FUNCTIONS["reference"]
    return lambda call: right(replace(call, hidden=Scaled.apply(call.hidden)))


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "examine", interrupt)
    with pytest.raises(SystemExit) as end:
        command.main(argparse.Namespace(output=None))
    assert end.value.code == 130
    assert capsys.readouterr().err == "tune-lce accuracy: interrupted\n"


@pytest.mark.parametrize(("error", "code", "verdict"), [(0.0, 0, "PASS: 2 of"), (1e-2, 1, "FAIL: chunked above")])
def test_exit_status_and_files(tmp_path, monkeypatch, capsys, error, code, verdict):
    monkeypatch.setitem(choice._FUNCTIONS, "chunked", wrong_by(error))
    monkeypatch.setattr(session, "runnable", lambda *_: (["chunked", "reference"], {"cce": "needs a CUDA card"}))
    examine = session.examine
    monkeypatch.setattr(session, "examine", lambda output, said: examine(output, said, CPU, SMALL))
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["accuracy", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        args.func(args)
    assert end.value.code == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(verdict), "one line says so"
    assert "Not run: cce, which needs a CUDA card" in printed
    written = (tmp_path / "out" / session.TABLE).read_text()
    for line in ("| random | float32 | PyTorch |", "| confident | bfloat16 | chunked |", verdict, "Not run: cce"):
        assert line in written
    assert ("**, allowed" in written) == bool(code)
    assert (tmp_path / "out" / session.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_what_runs_on_a_cpu():
    able, unable = session.runnable(CPU, torch.float32)
    assert {"chunked", "reference"} <= set(able) <= {"chunked", "reference", "torch_compile"}
    assert set(unable) | set(able) == set(choice.NAMES) - {"auto"}
    assert unable["cce"] == "needs a CUDA card"


def test_the_picture_tells_everything_apart(tmp_path, monkeypatch):
    """Every name of the legend in colours of its own, its lines short enough to leave the labels legible."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure) or save(figure, path))
    errors, filtered = Errors(1e-3, 1e-3, 1e-3), Errors(0.0, 1e-2, 1e-2)
    names = [name for name in choice.NAMES if name != "auto"]
    rows = [Row("random", "bfloat16", "PyTorch", errors), Row("random", "bfloat16", "strictest filter", filtered)]
    rows += [Row("random", "bfloat16", name, errors, errors) for name in names]
    title = "device NVIDIA H100 80GB HBM3, " * 8 + "commit " + "0123456789" * 4
    report.draw(rows, title, tmp_path / "x.png")
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["PyTorch", "strictest filter", *names]
    lines, dots = legend.legend_handles[:2], legend.legend_handles[2:]
    for line, label in zip(lines, legend.get_texts(), strict=False):
        assert line.get_window_extent().x1 < label.get_window_extent().x0
    colours = [tuple(line.get_color()) for line in lines] + [tuple(dot.get_facecolor()[0]) for dot in dots]
    assert len(set(colours)) == len(names) + 2
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert "0123456789" * 2 not in figure._suptitle.get_text()


def test_nan_fails():
    errors, wrong = Errors(0.0, 0.0, 0.0), Errors(0.0, 0.0, float("nan"))
    assert Row("x", "float32", "a", errors, errors).passed
    assert not Row("x", "float32", "a", wrong, errors).passed
    (_, _, line) = report.table([Row("x", "float32", "a", wrong, errors)])
    assert "**nan**, allowed 0.0e+00" in line


@pytest.mark.gpu
def test_everything_on_a_card(tmp_path, capsys):
    passed = session.examine(tmp_path / "out", "tune-lce accuracy")
    printed = capsys.readouterr().out
    assert passed, printed
    assert "PASS: 9 of 9" in printed
