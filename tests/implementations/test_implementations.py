"""Which implementation runs: what `auto` takes on each kind of device, and that a named one is never replaced."""

import importlib
import importlib.util
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from torchtune_lce import linear_cross_entropy
from torchtune_lce.implementations import choice, chunked, compiled, reference
from torchtune_lce.implementations.capabilities import CAPABILITIES
from torchtune_lce.implementations.choice import CCE_PRESETS, NAMES, choose

CPU, CUDA, MPS, XPU = (torch.device(kind) for kind in ("cpu", "cuda", "mps", "xpu"))


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Both are asked once a process."""
    choice._has_triton.cache_clear()
    choice._say_once.cache_clear()
    yield
    choice._has_triton.cache_clear()
    choice._say_once.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Sets what can be asked about the machine. Without a card of that kind there is nothing else to ask."""

    find_other = importlib.util.find_spec

    def describe(capability=None, hip=None, triton=True, interpret=False):
        def find_spec(name, package=None):
            if name != "triton":
                return find_other(name, package)
            return SimpleNamespace(name=name) if triton else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")

    return describe


def states(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """Stands for hidden states on a device that is not here: choosing looks at these two alone."""
    return SimpleNamespace(device=device, dtype=dtype)


# device, dtype, machine; the implementation, and the reason said
AUTOMATIC = {
    "cpu": (CPU, torch.float32, {}, "chunked", "cpu has no Triton kernels"),
    "cpu-interpreter": (CPU, torch.float32, {"interpret": True}, "chunked", "cpu has no Triton kernels"),
    "mps": (MPS, torch.float16, {"triton": False}, "chunked", "mps has no Triton kernels"),
    "xpu": (XPU, torch.bfloat16, {}, "chunked", "xpu has no Triton kernels"),
    "sm61": (CUDA, torch.float32, {"capability": (6, 1)}, "chunked", "needs compute capability 7.0, this card has 6.1"),
    "sm70": (CUDA, torch.float16, {"capability": (7, 0)}, "torch_compile", "need compute capability 8.0.*has 7.0"),
    "sm75": (CUDA, torch.float16, {"capability": (7, 5)}, "torch_compile", "need compute capability 8.0.*has 7.5"),
    "sm80": (CUDA, torch.bfloat16, {"capability": (8, 0)}, "cce", "compute capability 8.0"),
    "sm89": (CUDA, torch.float16, {"capability": (8, 9)}, "cce", "compute capability 8.9"),
    "sm90": (CUDA, torch.float32, {"capability": (9, 0)}, "cce", "compute capability 9.0"),
    "sm100": (CUDA, torch.bfloat16, {"capability": (10, 0)}, "cce", "compute capability 10.0"),
    "sm120": (CUDA, torch.bfloat16, {"capability": (12, 0)}, "cce", "compute capability 12.0"),
    "sm90-float64": (CUDA, torch.float64, {"capability": (9, 0)}, "torch_compile", "do not take float64"),
    "sm90-no-triton": (CUDA, torch.bfloat16, {"capability": (9, 0), "triton": False}, "chunked", "not installed"),
    "rocm": (CUDA, torch.bfloat16, {"capability": (9, 4), "hip": "6.4"}, "torch_compile", "not been run on ROCm"),
}


@pytest.mark.parametrize("case", AUTOMATIC)
def test_auto_takes(case, machine, caplog):
    """And says so at INFO, once however often it is asked."""
    device, dtype, described, expected, reason = AUTOMATIC[case]
    if expected == "cce":
        pytest.importorskip("triton")
        # Before the machine passes for another.
        importlib.import_module("torchtune_lce.kernels.autograd")
    machine(**described)
    with caplog.at_level(logging.INFO, logger="torchtune_lce"):
        for _ in range(3):
            name, _run = choose("auto", states(device, dtype))
    assert name == expected
    (record,) = [record for record in caplog.records if record.name == "torchtune_lce"]
    assert record.levelno == logging.INFO
    assert re.search(f"'auto' takes '{expected}' .*{reason}", record.getMessage())


def test_says_again_for_another_reason(machine, caplog):
    machine(capability=(7, 5))
    with caplog.at_level(logging.INFO, logger="torchtune_lce"):
        for device in (CPU, CUDA, CPU, CUDA):
            choose("auto", states(device))
    assert [record.args[0] for record in caplog.records] == ["chunked", "torch_compile"]


def test_public_function_says_it(caplog):
    hidden, weight, targets = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 10, 5])
    with caplog.at_level(logging.INFO, logger="torchtune_lce"):
        linear_cross_entropy(hidden, weight, targets)
        linear_cross_entropy(hidden, weight, targets)
        linear_cross_entropy(hidden, weight, targets, impl="reference")
    assert [record.args[0] for record in caplog.records] == ["chunked"]


# Where, and what stands in the way of the Triton kernels there.
OBSTACLES = {
    "cpu": (CPU, torch.float32, {}, "needs a CUDA card, not cpu"),
    "cpu-interpreter-bf16": (CPU, torch.bfloat16, {"interpret": True}, "cannot take bfloat16 in Triton's interpreter"),
    "cpu-interpreter-float64": (CPU, torch.float64, {"interpret": True}, "does not take float64"),
    "mps": (MPS, torch.float16, {}, "needs a CUDA card, not mps"),
    "no-triton": (
        CUDA,
        torch.bfloat16,
        {"capability": (9, 0), "triton": False},
        "needs Triton, which is not installed",
    ),
    "float64": (CUDA, torch.float64, {"capability": (9, 0)}, "does not take float64"),
    "sm61": (CUDA, torch.float16, {"capability": (6, 1)}, "needs compute capability 8.0, this card has 6.1"),
    "sm75": (CUDA, torch.float16, {"capability": (7, 5)}, "needs compute capability 8.0, this card has 7.5"),
    "rocm": (CUDA, torch.bfloat16, {"capability": (9, 4), "hip": "6.4"}, "has not been run on ROCm"),
}


@pytest.mark.parametrize("impl", CCE_PRESETS)
@pytest.mark.parametrize("where", OBSTACLES)
def test_named_kernels_that_cannot_run_say_what_to_set(where, impl, machine):
    """Nothing takes their place, and what the message offers is there to be set."""
    device, dtype, described, obstacle = OBSTACLES[where]
    machine(**described)
    with pytest.raises(RuntimeError, match=f"^impl='{impl}' {re.escape(obstacle)}.*set impl='") as caught:
        choose(impl, states(device, dtype))
    offered = re.findall("'([a-z_]+)'", str(caught.value).split("set ")[1])
    assert "chunked" in offered
    assert set(offered) <= set(NAMES) - set(CCE_PRESETS)
    assert ("torch_compile" in offered) == (where in ("sm75", "rocm", "float64", "cpu-interpreter-float64"))


@pytest.mark.parametrize("impl", [name for name, can in CAPABILITIES.items() if not can.cuda_only])
@pytest.mark.parametrize("case", AUTOMATIC)
def test_named_one_is_not_replaced(case, impl, machine, caplog):
    device, dtype, described, *_ = AUTOMATIC[case]
    machine(**described)
    module = {"chunked": chunked, "torch_compile": compiled, "reference": reference}[impl]
    with caplog.at_level(logging.INFO, logger="torchtune_lce"):
        assert choose(impl, states(device, dtype)) == (impl, module.token_losses)
    assert not caplog.records


@pytest.mark.parametrize("impl", CCE_PRESETS)
def test_public_function_refuses_kernels_on_the_cpu(impl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=f"impl='{impl}' needs .*set impl='chunked'"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 10, 5]), impl=impl)
