"""The test grid: implementations as parameters, with marks for what the table of capabilities says they need."""

import importlib.util
import shutil

import pytest
import torch

from torchtune_lce.implementations.capabilities import CAPABILITIES

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(
    not torch.cuda.is_available() and not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)


def marks_of(name: str) -> list:
    """Skipped where what it needs is missing."""
    can = CAPABILITIES[name]
    return [mark for mark, needed in ((needs_triton, can.needs_triton), (needs_compiler, can.needs_compiler)) if needed]


def one(name: str, *marks):
    """The implementation as a parameter, whose id is its name."""
    return pytest.param(name, marks=[*marks_of(name), *marks], id=name)


def each(*names: str) -> list:
    return [one(name) for name in names]
