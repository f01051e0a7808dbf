"""docs/examples/transformers_training.py: each loss in a process of its own, and what it writes of them."""

import importlib.util
import json
import subprocess
import sys

import pytest
from project import ROOT

pytest.importorskip("transformers")

SCRIPT = ROOT / "docs" / "examples" / "transformers_training.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("transformers_training_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("model", ["tiny-qwen2", "tiny-gemma-2"])
def test_the_patch_trains_as_stock_does(example, model):
    settings = example.Settings(2, 48, 5, 1, checkpointing=True, learning_rate=0.01, filter_eps="auto", seed=0)
    own, ours = (example.train(model, loss, settings)["losses"] for loss in ("stock", "cce"))
    assert len(own) == 6
    assert own[0] - own[-1] > 0.5
    # bfloat16 logits are rounded, ours are not.
    assert ours == pytest.approx(own, abs=0.01)


def test_command(tmp_path):
    found = tmp_path / "found.json"
    sizes = ["--batch", "2", "--sequence", "16", "--steps", "2", "--warmup", "1"]
    command = [sys.executable, SCRIPT, "--model", "tiny-qwen2", "--loss", "cce", "stock", *sizes]
    done = subprocess.run([*command, "--output", found], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads(found.read_text())
    cce, stock = written["runs"]
    assert written["settings"]["sequence"] == 16
    assert {"device", "torch", "triton", "transformers", "commit"} <= written["environment"].keys()
    for run in cce, stock:
        assert run["tokens_per_second"] == pytest.approx(2 * 16 / run["step_seconds"])
        assert len(run["losses"]) == 3
    assert stock["largest_difference_from_stock"] == 0
    assert 0 < cce["largest_difference_from_stock"] < 0.01
    rows = [line for line in done.stdout.splitlines() if line.startswith("| tiny-qwen2 | ")]
    assert [row.split(" | ")[1] for row in rows] == ["cce", "stock"]


@pytest.mark.parametrize(
    ("loss", "package"), [("liger", "liger_kernel.transformers"), ("apple", "cut_cross_entropy.transformers")]
)
def test_another_package_that_cannot_run_says_why(example, monkeypatch, loss, package):
    name = package.partition(".")[0]
    for loaded in [module for module in sys.modules if module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    settings = example.Settings(1, 8, 1, 0, checkpointing=False, learning_rate=0.01, filter_eps=None, seed=0)
    with pytest.raises(example.NotRunError, match=f"{package} does not import: .*{name}"):
        example.train("tiny-qwen2", loss, settings)


def test_a_run_that_makes_logits_is_no_measurement(example, monkeypatch):
    """As when the patch falls back: the figures would be stock's under another name."""
    monkeypatch.setitem(example.LOSSES, "cce", example.stock)
    settings = example.Settings(1, 8, 1, 0, checkpointing=False, learning_rate=0.01, filter_eps=None, seed=0)
    with pytest.raises(example.NotRunError, match="made logits all the same"):
        example.train("tiny-qwen2", "cce", settings)


def test_a_process_that_dies_is_told(example):
    """At once here: it cannot import a module that this file has loaded by its path."""
    settings = example.Settings(1, 8, 1, 0, checkpointing=False, learning_rate=0.01, filter_eps=None, seed=0)
    (run,) = example.run_all([("tiny-qwen2", "stock")], settings)
    assert run["failed"] == "its process ended with exit code 1"
    assert "exit code 1" in example.table([run])
