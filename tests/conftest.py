"""What every test stands on: the interpreter without a card, quiet threads, seeds, and poisoned fresh memory."""

import dataclasses
import gc
import os
import sys
import zlib
from pathlib import Path

# Before torch starts its thread pool: the tensors here are small, and workers or child processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each process that compiles would start another one, which imports torch, to compile in parallel.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when the kernels are defined, so it is set before anything imports them.
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
from interpreted import IS_INTERPRETED as INTERPRETED

import torchtune_lce

PACKAGE = str(Path(torchtune_lce.__file__).parent) + os.sep
# Neither zero nor a small index nor a mask of one bit: reads of it show.
GARBAGE_BYTE = 0x5A
# Files whose tests share what one fixture has run in processes for seconds: in two workers it would run twice.
ONE_WORKER = (
    "test_accuracy",
    "test_distributed_preference_recipes",
    "test_distributed_recipes",
    "test_import",
    "test_other_cards",
    "test_packaging",
    "test_qat_recipes",
    "test_stock_configs",
    "test_token_feedback",
)

# Without a card, a part of the ids of tests that compile: in two workers the same would be compiled twice.
COMPILING = "compile"

# Tests of a minute and more are begun before the short ones, which then fill up what time the other workers have left.
LONG = ("::test_four_processes", "::test_demo_end_to_end")

# Parts of the ids of tests that take gigabytes of a card, and how many of them may run on it at once.
LARGE = (
    "test_huge.py::",
    "-large",
    "::test_cce_on_a_card",
    "::test_second_products_on_a_card",
    "::test_after_running_out_of_memory",
)
LARGE_AT_ONCE = 3

interpreter.make_faster()


def pytest_addoption(parser):
    parser.addoption("--card-blocks", action="store_true", help="without a card: the kernels with the blocks of one")


def pytest_configure(config):
    if not config.getoption("card_blocks") or not INTERPRETED:
        return
    try:
        from torchtune_lce.kernels import tuning
    except ImportError as error:
        raise pytest.UsageError("--card-blocks is for the kernels, which need Triton") from error

    def config_for(device: torch.device, dtype: torch.dtype) -> tuning.Config:
        return dataclasses.replace(tuning._cuda_config((9, 0), dtype, "ieee"), tma=False, stores_transposed=False)

    # Before any kernel takes its name.
    tuning.config_for = config_for


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.endswith(LONG))
    if torch.cuda.is_available() and not INTERPRETED:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests are given out one by one, but those of a group together, and first.

    By their ids: xdist 3.8 tells a scheduler no more, and its own marks of groups are lost with pytest 9.2.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid) or nodeid

    return Scheduling(config, log)


def _group(nodeid: str) -> str | None:
    file = Path(nodeid.partition("::")[0]).stem
    if file in ONE_WORKER:
        return file
    if INTERPRETED and COMPILING in nodeid:
        return COMPILING
    if any(part in nodeid for part in LARGE):
        # Always the same one, so that two runs share the card alike.
        return f"large {zlib.crc32(nodeid.encode()) % LARGE_AT_ONCE}"
    return None


def pytest_collection_finish():
    """What is imported by now stays: torchtune's recipes collect garbage, half a second each time if among it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device() -> torch.device:
    """The card if there is one; the CPU, with the kernels interpreted, if not."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def products_term_by_term(device, monkeypatch):
    """Products whose bits do not depend on where in a block a row stands, as those of a card do not.

    The interpreter's are numpy's, so a BLAS library's: on AVX2 a row's bits there change with its place and with the
    number of rows. Elementwise operations, and sums and exponentials of blocks of one shape, keep theirs everywhere.
    """
    if device.type != "cpu":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(builder, a, b, d, *precision):
        wide = d.data.dtype
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[-1]):
            total += a.data[:, k, None].astype(wide) * b.data[None, k, :].astype(wide)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _precision_as_it_was():
    """torchtune's recipes allow TF32 for the rest of the process, and the next test's float32 would be rounded."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(autouse=True)
def _compiles_in_turn(monkeypatch):
    """Spies see each call once: an operator whose kernels are compiled side by side is gone through three times."""
    if not INTERPRETED:
        from torchtune_lce.kernels import compiling

        monkeypatch.setattr(compiling, "_threads", lambda: 1)


@pytest.fixture(autouse=True)
def _share_the_card():
    """Many workers share one card: no test leaves memory in its allocator's cache."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _poisoned_allocations():
    """The package's torch.empty, empty_like and new_empty give NaN or garbage, so an output left unwritten shows."""
    with torch.device("cpu"):
        # torch lists once which functions `with torch.device(...)` acts on: before they are replaced, or torchtune
        # would build its models on the CPU in place of the meta device or the card.
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoning(torch.empty))
        patch.setattr(torch, "empty_like", _poisoning(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))
        yield


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # A compiler traces the call: what it makes of it is its own, and frames are no part of it.
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            poison(tensor)
        return tensor

    return poisoned


def poison(tensor: torch.Tensor) -> None:
    """Fills a fresh tensor with NaN, or with a byte pattern where the dtype has none."""
    if tensor.device.type == "meta":
        return
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(int.from_bytes(bytes([GARBAGE_BYTE] * tensor.itemsize), "little"))
