"""What an import costs, and that the package works without Triton: in two processes that start from nothing."""

import json
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
def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})
"""
# In the order of what each step loads; nothing is loaded twice, and the package keeps no name that it has looked up.
STEPS = f"""
import json, os
found, before = {{}}, dict(os.environ)
import torchtune_lce
found["import"] = loaded()
found["environment"] = dict(os.environ) == before
try:
    torchtune_lce.LinearCrossEntropy
except AttributeError as error:
    found["unknown"] = str(error)
{CALL}
found["call"] = loaded()
torchtune_lce.LinearCrossEntropyLoss, torchtune_lce.skip_output_layer
found["lazy"] = loaded()
from torchtune_lce import *
found["names"] = [x.__name__ for x in (LinearCrossEntropyLoss, linear_cross_entropy, skip_output_layer)]
print(json.dumps(found))
"""


def run(*parts: str) -> str:
    """What the code prints last."""
    done = subprocess.run([sys.executable, "-c", "\n".join(parts)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def found() -> dict:
    """What each of :data:`STEPS` has told, in one process."""
    return json.loads(run(TELL, STEPS))


@pytest.mark.parametrize("step", ["import", "call"])
def test_loads_little(found, step):
    """torchtune takes seconds and sets environment variables, Triton reads them, matplotlib is the demo's."""
    loaded = set(found[step])
    assert {"torch", "torchtune_lce"} <= loaded
    others = {
        "torchtune",
        "torchao",
        "triton",
        "matplotlib",
        "omegaconf",
        "tokenizers",
        "rich",
        "transformers",
        "axolotl",
    }
    assert not loaded & others


def test_environment_is_left_alone(found):
    assert found["environment"]


def test_names_that_need_torchtune_load_it_when_used(found):
    assert "torchtune" in found["lazy"]


def test_unknown_name_is_an_attribute_error(found):
    assert found["unknown"] == "module 'torchtune_lce' has no attribute 'LinearCrossEntropy'"


def test_public_names(found):
    assert found["names"] == ["LinearCrossEntropyLoss", "linear_cross_entropy", "skip_output_layer"]


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
    assert "triton" not in run(WITHOUT_TRITON, TELL, CALL, refused, module, "print(*loaded())").split()
