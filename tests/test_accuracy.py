"""tune-lce accuracy: its data, its yardsticks, and that it sees an implementation that is wrong."""

import argparse

import pytest
import torch

from torchtune_lce import implementations
from torchtune_lce.accuracy import command, data, measure, report, session
from torchtune_lce.accuracy.measure import Row, plain_torch, rows_of, strictest_filter
from torchtune_lce.bench.data import Batch
from torchtune_lce.bench.shapes import Shape

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
    vocabulary = 4500
    # A token has one of two features, whose columns hold its logits.
    weight = torch.zeros(vocabulary, 2)
    weight[:3, 0] = 20
    weight[100:200, 0] = 9  # 5.6e-6 of the softmax each
    hidden = torch.zeros(256, 2)
    hidden[:128, 0] = hidden[128:, 1] = 1
    targets = torch.full((256,), 150)
    batch = Batch("x", "x", hidden.bfloat16(), weight.bfloat16(), targets)
    exact = plain_torch(batch, torch.float64)
    filtered = strictest_filter(batch, exact)
    peaked, flat = (exact.weight - filtered.weight).abs().T
    assert flat.max() < 1e-15, "kept whole"
    assert (peaked[100:150] > 1e-6).all()
    assert peaked[:3].max() < 1e-15
    assert peaked[150] < 1e-15, "a target's entry stays"
    errors = filtered.errors(exact)
    assert 0 < errors["weight"] < 1e-3
    assert errors["loss"] == 0


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
        assert all(0 <= error < 0.2 for error in row.errors.values()), row


def test_kernels_pass_in_the_interpreter(device):
    """Each preset is allowed what it filters, and no more."""
    pytest.importorskip("triton")
    batch = data.trained_batch(Shape(40, 64, 300), torch.float16, device)
    rows = {row.name: row for row in rows_of(batch, ["cce", "cce_exact", "cce_kahan_full_c"])}
    assert all(row.passed for row in rows.values()), rows
    strict = rows["strictest filter"].errors
    assert strict["loss"] == 0
    assert rows["cce"].allowed["hidden"] == rows["cce_exact"].allowed["hidden"] + 2 * strict["hidden"]
    assert rows["cce_kahan_full_c"].allowed["weight"] == rows["cce_exact"].allowed["weight"]


def wrong_by(error):
    """The reference, its gradient by hidden off by a relative ``error``."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, upstream):
            return upstream * (1 + error)

    right = implementations._TORCH_IMPLS["reference"]
    return lambda hidden, *others: right(Scaled.apply(hidden), *others)


@pytest.mark.parametrize(("error", "code", "verdict"), [(0.0, 0, "PASS: 2 of"), (1e-2, 1, "FAIL: chunked above")])
def test_exit_status_and_files(tmp_path, monkeypatch, capsys, error, code, verdict):
    monkeypatch.setitem(implementations._TORCH_IMPLS, "chunked", wrong_by(error))
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
    assert set(unable) | set(able) == set(implementations.NAMES) - {"auto"}
    assert unable["cce"] == "needs a CUDA card"


def test_nan_fails():
    errors = dict.fromkeys(measure.QUANTITIES, 0.0)
    assert Row("x", "float32", "a", errors, errors).passed
    assert not Row("x", "float32", "a", errors | {"weight": float("nan")}, errors).passed
    (_, _, line) = report.table([Row("x", "float32", "a", errors | {"weight": float("nan")}, errors)])
    assert "**nan**, allowed 0.0e+00" in line


@pytest.mark.gpu
def test_everything_on_a_card(tmp_path, capsys):
    passed = session.examine(tmp_path / "out", "tune-lce accuracy")
    printed = capsys.readouterr().out
    assert passed, printed
    assert "PASS: 9 of 9" in printed
