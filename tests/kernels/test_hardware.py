"""Machines that are not here: an Apple GPU, no driver, another system. Which impl they get: test_implementations.py."""

import os
import subprocess
import sys
from importlib.metadata import requires

import pytest
import torch
from packaging.requirements import Requirement
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune_lce import linear_cross_entropy

MAC = {"platform_system": "Darwin", "sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"}
LINUX = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_call_on_a_device_without_values(dtype):
    """The meta device stands for any that is neither a CPU nor CUDA: the same path, and nothing may look at a value."""
    hidden = torch.empty(2, 5, 8, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(11, 8, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(2, 5, device="meta", dtype=torch.int64)
    loss, lse = linear_cross_entropy(hidden, weight, targets, shift=1, softcap=3.0, return_lse=True)
    (loss + lse.sum()).backward()
    assert loss.device.type == lse.device.type == "meta"
    assert loss.dtype == lse.dtype == torch.float32
    assert (loss.shape, lse.shape) == ((), (2, 5))
    for leaf in (hidden, weight):
        assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device.type) == (leaf.shape, dtype, "meta")


class WithoutFloat64(TorchDispatchMode):
    """As an Apple GPU, which has no float64: making a tensor of it fails."""

    def __init__(self):
        super().__init__()
        self.inside = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "torchtune_lce":
            self.inside += 1
            # On again for what the operator is made of, and past the mode for the operator itself.
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
        result = function(*arguments, **(keywords or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in made):
            raise TypeError(f"{function} makes float64")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_needs_no_float64(impl, dtype):
    hidden = torch.randn(9, 8).to(dtype).requires_grad_()
    weight = torch.randn(11, 8).to(dtype).requires_grad_()
    targets = torch.tensor([0, 10, -100, 3, 4, -100, 6, 7, 8])
    with WithoutFloat64() as mode:
        loss, lse = linear_cross_entropy(hidden, weight, targets, weight[:, 0], softcap=3.0, impl=impl, return_lse=True)
        (loss + lse.sum()).backward()
        with pytest.raises(TypeError, match="makes float64"):
            hidden.double()
    assert mode.inside == (2 if impl == "chunked" else 0)


def test_without_a_driver():
    """Triton is there and no card: the kernels can be imported, `auto` takes `chunked`, a kernel by name is refused."""
    pytest.importorskip("triton")
    code = """
import torch
import torchtune_lce.kernels.autograd
from torchtune_lce import linear_cross_entropy

assert not torch.cuda.is_available()
hidden, weight, targets = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8), torch.arange(7)
linear_cross_entropy(hidden, weight, targets).backward()
try:
    linear_cross_entropy(hidden, weight, targets, impl="cce")
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("impl='cce' needs a CUDA card, not cpu; set impl='chunked'")


def needed(system: dict[str, str]) -> set[str]:
    """Names of what pip would install with the package there."""
    found = (Requirement(line) for line in requires("torchtune-lce"))
    return {x.name for x in found if x.marker is None or x.marker.evaluate({**system, "extra": ""})}


def test_a_mac_is_not_asked_for_triton():
    assert needed(LINUX) - needed(MAC) == {"triton"}
    assert needed(MAC) >= {"torch", "torchtune", "torchao"}
    tested = (Requirement(line) for line in requires("torchtune-lce"))
    extras = [x for x in tested if x.name == "triton" and x.marker.evaluate({**MAC, "extra": "test"})]
    assert not extras
