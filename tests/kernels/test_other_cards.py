"""Cards that are not here: each kernel compiles for them, by the compiler that is here, within their shared memory."""

import json
import os
import subprocess
import sys

import pytest
from project import ROOT, SUPPORT

pytest.importorskip("triton")

# KiB that a program may take, by capability (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_MEMORY = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
# float32 takes the most of it where it is least; in 16 bits 8.6 is given the blocks of 8.9, with as much of it.
CASES = [f"{capability}:{'float32' if capability == '86' else 'bfloat16'}" for capability in SHARED_MEMORY]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """By one process for all of them, which starts once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SUPPORT / "compile_kernels.py", *CASES],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability, compiled):
    here = [kernel for kernel in compiled if kernel.get("capability") == capability]
    # What is launched once a strip; where the vocabulary ends in a tile it has a variant.
    assert {kernel["kernel"] for kernel in here} >= {
        "_exponential_kernel",
        "_product_kernel",
        "_redo_kernel",
        "_places_kernel",
    }
    assert {kernel["dtype"] for kernel in here} == {
        dtype for card, dtype in (case.split(":") for case in CASES) if card == capability
    }
    if capability in ("80", "86", "90"):
        assert {kernel["kernel"] for kernel in here} >= {"_slope_kernel", "_segment_kernel", "_difference_kernel"}
    if capability == "80":
        # And what a filter with a trained head takes: a forward of its own, and tiles.
        assert {kernel["kernel"] for kernel in here} >= {"_pointer_kernel", "_backward_kernel", "_tail_kernel"}
    for kernel in here:
        assert kernel["shared"] <= SHARED_MEMORY[capability] * 1024, kernel


def test_alignments_are_known_in_named_tuples(compiled):
    """Of two tensors of three, and a stride: wide loads need them, and kernels take most of their tensors so."""
    assert compiled[-1] == {"multiples": 3}
