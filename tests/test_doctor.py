"""tune-lce doctor: what it says of versions and devices, and that its self-test notices a wrong implementation."""

import importlib.metadata
import io

import pytest
import torch
from rich.console import Console

from torchtune_lce import implementations
from torchtune_lce.doctor import report, selftest, versions

FITTING = {"python": "3.11.7", "torch": "2.13.0+cpu", "torchtune": "0.6.1", "torchao": "0.15.0", "triton": None}


def shown() -> tuple[bool, str]:
    stream = io.StringIO()
    well = report.show(Console(file=stream, width=120, highlight=False, soft_wrap=True))
    return well, stream.getvalue()


def test_here_all_is_well():
    well, text = shown()
    assert well
    assert "impl 'auto' takes 'chunked' (cpu has no Triton kernels)" in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert "passed in" in text


@pytest.mark.gpu
def test_on_a_card_the_kernels_are_taken():
    well, text = shown()
    assert well
    assert "impl 'auto' takes 'cce'" in text


def scaled(by_loss: float, by_gradient: float):
    """``chunked`` with its losses, and apart from that its gradient by hidden, off by a factor."""
    right = implementations._TORCH_IMPLS["chunked"]

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forwards, backwards):
            ctx.factor = backwards
            return x * forwards

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.factor, None, None

    def wrong(hidden, *others):
        losses, lse = right(Scaled.apply(hidden, 1, by_gradient), *others)
        return Scaled.apply(losses, by_loss, 1), lse

    return wrong


def test_a_wrong_gradient_is_noticed(monkeypatch):
    monkeypatch.setitem(implementations._TORCH_IMPLS, "chunked", scaled(1, 1.001))
    outcome = selftest.run("chunked", torch.device("cpu"), torch.float32)
    assert not outcome.passed
    well, text = shown()
    assert not well
    assert "FAILED" in text


@pytest.mark.parametrize(("by_loss", "by_gradient"), [(1, 1), (1.01, 1), (1, 1.03)])
def test_in_bfloat16_a_few_percent_are_noticed(monkeypatch, by_loss, by_gradient):
    monkeypatch.setitem(implementations._TORCH_IMPLS, "chunked", scaled(by_loss, by_gradient))
    outcome = selftest.run("chunked", torch.device("cpu"), torch.bfloat16)
    assert outcome.passed == (by_loss == by_gradient == 1), outcome


def test_versions_that_fit_are_not_complained_about():
    assert versions.complaints(FITTING) == []
    assert versions.complaints(FITTING | {"torchtune": "0.7.0.dev20260101", "torchao": "0.18.0"}) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"torch": "2.7.1"}, "torch must be 2.8 or newer, got 2.7.1"),
        ({"torchtune": None}, "torchtune must be 0.6.1 or newer, got None"),
        ({"torchao": "0.12.0"}, "torchao 0.9 to 0.15 other than 0.12, got 0.12.0"),
        ({"torchao": "0.18.0"}, "torchao 0.9 to 0.15 other than 0.12, got 0.18.0"),
        ({"torchao": None}, "torchao 0.9 to 0.15 other than 0.12, got None"),
        ({"torchtune": "0.7.0"}, "torchtune 0.7.0 needs torchao 0.18 or newer, got 0.15.0"),
    ],
)
def test_versions_that_do_not_fit(change, sentence):
    (complaint,) = versions.complaints(FITTING | change)
    assert sentence in complaint
    assert "pip install" in complaint


def test_obstacles_are_named():
    against = implementations.obstacle("cce", torch.device("mps"), torch.float32)
    assert against is not None
    assert "set impl='chunked'" in against
    assert implementations.obstacle("chunked", torch.device("mps"), torch.float32) is None
