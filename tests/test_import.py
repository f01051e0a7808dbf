"""What an import costs, and that the package works without Triton. Each in a process of its own."""

import subprocess
import sys

import pytest

# As if Triton were not there: no finder knows it. Blocking its import would not do, for a package that is absent raises
# nothing when it is looked for.
WITHOUT_TRITON = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
CALL = """
import torch
from torchtune_lce import linear_cross_entropy

hidden = torch.randn(7, 8, requires_grad=True)
weight = torch.randn(11, 8, requires_grad=True)
targets = torch.arange(7)
loss = linear_cross_entropy(hidden, weight, targets)
loss.backward()
assert torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets))
assert hidden.grad.any() and weight.grad.any()
"""
TELL = """
import sys
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run(*parts: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "\n".join(parts)], capture_output=True, text=True, timeout=120)


def modules(*parts: str) -> set[str]:
    """Top-level modules that are loaded after the code."""
    done = run(*parts, TELL)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import torchtune_lce", CALL], ids=["import", "call"])
def test_loads_little(code):
    """torchtune takes seconds and sets environment variables, Triton reads them, matplotlib is the demo's."""
    loaded = modules(code)
    assert {"torch", "torchtune_lce"} <= loaded
    assert not loaded & {"torchtune", "torchao", "triton", "matplotlib", "omegaconf", "tokenizers", "rich"}


def test_environment_is_left_alone():
    done = run("import os; before = dict(os.environ)", "import torchtune_lce", "assert dict(os.environ) == before")
    assert done.returncode == 0, done.stderr


def test_names_that_need_torchtune_load_it_when_used():
    loaded = modules("import torchtune_lce", "torchtune_lce.LinearCrossEntropyLoss", "torchtune_lce.skip_output_layer")
    assert "torchtune" in loaded


def test_unknown_name_is_an_attribute_error():
    done = run("import torchtune_lce", "torchtune_lce.LinearCrossEntropy")
    assert "AttributeError: module 'torchtune_lce' has no attribute 'LinearCrossEntropy'" in done.stderr


def test_public_names():
    names = "LinearCrossEntropyLoss", "linear_cross_entropy", "skip_output_layer"
    done = run("from torchtune_lce import *", f"print({', '.join(f'{name}.__name__' for name in names)})")
    assert done.stdout.split() == list(names), done.stderr


def test_works_without_triton():
    """The function and the module; a kernel asked for by name is refused with what to set instead."""
    refused = """
try:
    linear_cross_entropy(hidden, weight, targets, impl="cce")
except RuntimeError as error:
    assert "needs Triton, which is not installed; set impl='chunked'" in str(error), error
else:
    raise AssertionError("cce ran without Triton")
"""
    module = """
from torchtune_lce import LinearCrossEntropyLoss
assert torch.allclose(LinearCrossEntropyLoss()(hidden, targets, weight), loss)
"""
    assert "triton" not in modules(WITHOUT_TRITON, CALL, refused, module)
