"""Kernels of a first call are compiled side by side."""

import sys
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from torchtune_lce import linear_cross_entropy
from torchtune_lce.kernels import compiling, launching
from torchtune_lce.kernels.compiling import Way

# As it is: on a card conftest has the tests' kernels compiled in turn.
threads = compiling._threads

needs_modes = pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="Triton 3.5 and newer can")


@pytest.fixture
def way_of_each_call(monkeypatch):
    """What an operator that needs one kernel goes through: it is compiled when it was listed, or in its turn."""
    monkeypatch.setattr(compiling, "_threads", lambda: 2)
    seen, compiled = [], []

    def operator(number):
        seen.append(compiling.way.get())
        if not compiled:
            compiling.leave_if_worthwhile()
            compiled.append(number)
        return number + 1

    return operator, seen


@needs_modes
def test_the_first_call_lists_and_runs_again(way_of_each_call):
    operator, seen = way_of_each_call
    run = compiling.side_by_side(operator)
    assert run(3) == 4
    assert seen == [Way.FIND, Way.LIST, Way.IN_TURN]
    assert run(4) == 5
    assert seen[3:] == [Way.FIND]
    assert compiling.way.get() is Way.IN_TURN


@needs_modes
def test_on_one_processor_they_are_compiled_in_turn(way_of_each_call, monkeypatch):
    operator, seen = way_of_each_call
    monkeypatch.setattr(compiling, "_threads", lambda: 1)
    assert compiling.side_by_side(operator)(3) == 4
    assert seen == [Way.FIND]
    assert compiling.way.get() is Way.IN_TURN


@needs_modes
def test_what_an_operator_had_made_when_it_was_left_is_gone(monkeypatch):
    """Or a first call would take the memory of two or three."""
    monkeypatch.setattr(compiling, "_threads", lambda: 2)
    made = []

    def operator():
        workspace = torch.empty(1)
        assert not any(reference() is not None for reference in made)
        made.append(weakref.ref(workspace))
        if len(made) == 1:
            compiling.leave_if_worthwhile()

    compiling.side_by_side(operator)()
    assert len(made) == 3


@needs_modes
def test_a_mode_of_the_users_is_no_obstacle(way_of_each_call):
    operator, seen = way_of_each_call
    with triton.AsyncCompileMode(None):
        assert compiling.side_by_side(operator)(3) == 4
    assert seen == [Way.FIND, Way.LIST, Way.IN_TURN]


@needs_modes
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(error, monkeypatch):
    monkeypatch.setattr(compiling, "_threads", lambda: 2)

    def operator():
        compiling.leave_if_worthwhile()
        raise error("no room")

    with pytest.raises(error, match="no room"):
        compiling.side_by_side(operator)()
    assert compiling.way.get() is Way.IN_TURN
    with triton.AsyncCompileMode(None):
        pass


def test_ranks_of_a_node_share_its_processors(monkeypatch):
    monkeypatch.setattr(compiling.os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads() == compiling.MOST_THREADS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "48")
    assert threads() < 2


@needs_modes
@pytest.mark.gpu
def test_on_a_card_other_threads_compile(device, monkeypatch, tmp_path):
    """All but what is launched before; and nothing runs on what was not computed."""
    hidden = torch.randn(200, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 300, (200,), device=device)
    targets[::3] = -100

    def step():
        loss = linear_cross_entropy(hidden, weight, targets, impl="cce_exact", softcap=17.0)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    before = step()
    threads = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **_: threads.append(threading.current_thread().name)
    )
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(compiling, "_threads", lambda: 4)
    launching._compiled.clear()
    for module in [module for name, module in sys.modules.items() if name.startswith("torchtune_lce.kernels.")]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
    for mine, theirs in zip(step(), before, strict=True):
        assert torch.equal(mine, theirs)
    assert len(threads) > 8
    assert all(name.startswith("ThreadPoolExecutor") for name in threads)
