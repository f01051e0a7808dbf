"""tune-lce doctor: what it says of versions and devices, and that its self-test notices a wrong implementation."""

import importlib.metadata
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from torchtune_lce.commands.doctor import report, selftest, versions
from torchtune_lce.implementations import choice

FITTING = {"python": "3.11.7", "torch": "2.13.0+cpu", "torchtune": "0.6.1", "torchao": "0.15.0", "triton": None}
FITTING |= {"torchvision": None}


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
    right = choice._FUNCTIONS["chunked"]

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forwards, backwards):
            ctx.factor = backwards
            return x * forwards

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.factor, None, None

    def wrong(call):
        losses = right(replace(call, hidden=Scaled.apply(call.hidden, 1, by_gradient)))
        return losses._replace(nll=Scaled.apply(losses.nll, by_loss, 1))

    return wrong


def test_a_wrong_gradient_is_noticed(monkeypatch):
    monkeypatch.setitem(choice._FUNCTIONS, "chunked", scaled(1, 1.001))
    well, text = shown()
    assert not well
    assert "FAILED" in text


@pytest.mark.parametrize(("by_loss", "by_gradient"), [(1, 1), (1.01, 1), (1, 1.03)])
def test_in_bfloat16_a_few_percent_are_noticed(monkeypatch, by_loss, by_gradient):
    monkeypatch.setitem(choice._FUNCTIONS, "chunked", scaled(by_loss, by_gradient))
    outcome = selftest.run("chunked", torch.device("cpu"), torch.bfloat16)
    assert outcome.passed == (by_loss == by_gradient == 1), outcome


def test_versions_that_fit_are_not_complained_about():
    assert versions.complaints(FITTING) == []
    newer = FITTING | {"torchao": "0.18.0", "torchvision": "0.28.0"}
    assert versions.complaints(newer | {"torchtune": "0.7.0.dev20260101"}) == []
    for version in ("0.0.0", ""):
        assert versions.complaints(newer | {"torchtune": version}, main_branch=True) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"torch": "2.7.1"}, "torch must be 2.8 or newer, got 2.7.1"),
        ({"torchtune": None}, "torchtune must be 0.6.1 or newer, got None"),
        ({"torchao": "0.12.0"}, "torchao 0.9 to 0.15 other than 0.12, got 0.12.0"),
        ({"torchao": "0.18.0"}, "torchao 0.9 to 0.15 other than 0.12, got 0.18.0"),
        ({"torchao": None}, "torchao 0.9 to 0.15 other than 0.12, got None"),
        ({"torchtune": ""}, "torchtune must be 0.6.1 or newer, got ''"),
    ],
)
def test_versions_that_do_not_fit(change, sentence):
    (complaint,) = versions.complaints(FITTING | change)
    assert sentence in complaint
    assert "pip install" in complaint


@pytest.mark.parametrize("version", ["0.7.0", "0.0.0", ""])
def test_main_is_advised_what_is_right_for_it(version):
    """The release's torchao, and its newest version, break it."""
    torchao, torchvision = versions.complaints(FITTING | {"torchtune": version}, main_branch=version != "0.7.0")
    assert f"torchtune's main branch (its version reads {version!r}) needs torchao 0.18 or newer, got 0.15.0" in torchao
    assert torchao.endswith(": pip install --no-deps 'torchao>=0.18'")
    assert torchvision.endswith(
        "imports torchvision, which is not installed: pip install --no-deps 'torchvision==0.28.*'"
    )


# --- in an environment where torchtune cannot be imported ---


def package(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """An installed one, as the import system and its metadata see it."""
    for path, text in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)
    information = folder / f"{name}-{version or 0}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def tune_lce(folder: Path, *arguments: str) -> tuple[int, str]:
    """With the packages in ``folder`` before all others; status and all that is printed."""
    paths = os.pathsep.join([str(folder), str(Path(versions.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "torchtune_lce", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_torchao_that_torchtune_cannot_import(tmp_path):
    package(tmp_path, "torchao", "0.18.0", {"__init__.py": ""})
    status, said = tune_lce(tmp_path, "doctor")
    assert status == 1
    assert (
        "torchtune 0.6.1 imports with torchao 0.9 to 0.15 other than 0.12, got 0.18.0: "
        "pip install 'torchao>=0.9,<0.16,!=0.12'"
    ) in said
    assert "torchtune cannot be imported: ModuleNotFoundError: No module named 'torchao." in said
    assert "Not all is well" in said
    status, said = tune_lce(tmp_path, "ls")
    assert status == 2
    assert said.startswith("tune-lce: torchtune cannot be imported: No module named 'torchao.")
    assert said.endswith(". `tune-lce doctor` says what to install\n")


@pytest.mark.parametrize("version", ["0.0.0", ""])
def test_torchtunes_main_branch_is_recognised(tmp_path, monkeypatch, version):
    loss = {"modules/loss/loss_types.py": "class SFTLoss:\n    pass\n"}
    package(tmp_path, "torchtune", version, {"__init__.py": "", **loss})
    assert not versions.is_main_branch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchtune", raising=False)
    assert versions.is_main_branch()
    assert versions.installed()["torchtune"] == version


def test_a_torchao_that_fits_by_its_version_alone(tmp_path):
    """Its code is broken: only an import tells."""
    package(tmp_path, "torchao", "0.15.0", {"__init__.py": "raise AttributeError('no such operator')"})
    status, said = tune_lce(tmp_path, "doctor")
    assert status == 1
    assert "torchtune cannot be imported: AttributeError: no such operator. No known fault of torch 2." in said
    assert "pip install --force-reinstall --no-deps" in said


def test_obstacles_are_named():
    against = choice.obstacle("cce", torch.device("mps"), torch.float32)
    assert against is not None
    assert "set impl='chunked'" in against
    assert choice.obstacle("chunked", torch.device("mps"), torch.float32) is None
