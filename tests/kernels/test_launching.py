"""Launches are looked up by all that Triton specializes by, and by nothing that it does not."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.compiler import compiler

from torchtune_lce import linear_cross_entropy
from torchtune_lce.kernels import launching

MEMORY = torch.zeros(64, dtype=torch.float32)
# Each is compiled apart: a 1, multiples of 16, and others; numbers of 64 bits; addresses of whole 16 bytes; dtypes.
APART = [
    1,
    16,
    17,
    2**31,
    2**31 + 1,
    None,
    0.5,
    MEMORY,
    MEMORY[1:],
    MEMORY.to(torch.float16),
    MEMORY.to(torch.float16)[1:],
]
ALIKE = [(16, 32), (0, 48), (3, 5), (-7, 9), (1.0, 2.0), (MEMORY[4:], MEMORY[8:]), (MEMORY[1:], MEMORY[2:])]


def key(argument, is_specialized=True):
    return launching._told_apart((MEMORY, argument), [True, is_specialized])[1]


@pytest.mark.parametrize(("first", "second"), itertools.combinations(range(len(APART)), 2))
def test_what_triton_tells_apart(first, second):
    assert key(APART[first]) != key(APART[second])


@pytest.mark.parametrize("pair", range(len(ALIKE)))
def test_what_triton_takes_alike(pair):
    first, second = ALIKE[pair]
    assert key(first) == key(second)


def test_unspecialized_numbers_differ_by_their_size_alone():
    assert key(1, False) == key(16, False) == key(-(2**31), False)
    assert key(1, False) != key(2**31, False)
    assert key(1, False) != key(-(2**31) - 1, False)


def test_of_several_tensors_the_unaligned_one_is_known():
    several = itertools.permutations((MEMORY, MEMORY[1:], MEMORY.to(torch.float16), None))
    assert len({launching._told_apart((MEMORY, *each), [True] * 5)[1] for each in several}) == 24


def test_tensors_are_given_by_their_addresses():
    given, _ = launching._told_apart((MEMORY, 3, None), [True] * 3)
    assert given == [MEMORY.data_ptr(), 3, None]


def test_what_stands_in_tuples_is_told_apart_as_alone():
    """Whatever the parameter says: there Triton specializes everything."""
    given, inside = launching._told_apart(((MEMORY, (3, None)), 1.0), [False, True])
    assert given == [(MEMORY.data_ptr(), (3, None)), 1.0]
    assert inside == launching._told_apart((MEMORY, 3, None, 1.0), [True] * 4)[1]


class Card:
    """A driver's streams, without a card: of the third."""

    def get_current_device(self) -> int:
        return 2

    def get_current_stream(self, device: int) -> int:
        return 40 + device


@pytest.fixture
def starts(monkeypatch) -> list:
    """What launchers are started with, on a card that is not here."""
    for module in (launching, compiler):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=Card()))
    return []


def loaded(starts: list) -> compiler.CompiledKernel:
    """Triton's own compiled kernel, of which the launcher alone is not."""
    kernel = object.__new__(compiler.CompiledKernel)
    # A property or an attribute, as Triton is newer or older.
    launcher = dict.fromkeys(("run", "_run"), lambda *given: starts.append(given))
    # No process is to unload it.
    module = {"module": "module", "_module_pid": None}
    vars(kernel).update(launcher, **module, function="function", packed_metadata=(4, 1, 0), src=None, name="")
    return kernel


def start(kernel: compiler.CompiledKernel) -> None:
    begin, first = launching._started(kernel, 2)
    begin(2, 3, 1, *first, 8, None)


def test_a_kernel_is_started_as_triton_starts_it(starts):
    """But that nobody is to be told of it."""
    kernel = loaded(starts)
    kernel[2, 3, 1](8, None)
    start(kernel)
    theirs, ours = starts
    assert theirs[:6] + theirs[9:] == ours[:6] + ours[9:] == (2, 3, 1, 42, "function", (4, 1, 0), 8, None)
    assert ours[6:9] == (None, None, None)
    assert not any(getattr(hook, "calls", hook) for hook in theirs[7:9])


@pytest.mark.parametrize(("name", "place"), [("launch_enter_hook", 7), ("launch_exit_hook", 8)])
def test_who_listens_is_told_of_launches(name, place, starts, monkeypatch):
    """Profilers do."""

    def listener(_):
        pass

    hook = getattr(knobs.runtime, name)
    if hook is None:
        monkeypatch.setattr(knobs.runtime, name, listener)
    else:
        monkeypatch.setattr(hook, "calls", [listener])
    start(loaded(starts))
    told = starts[0][place]
    assert listener in getattr(told, "calls", [told])


def test_a_newer_triton_is_asked_for_the_stream(starts, monkeypatch):
    monkeypatch.setattr(launching, "STARTS_ALIKE", False)
    kernel = loaded(starts)
    start(kernel)
    kernel[2, 3, 1](8, None)
    # Its hooks too, which are none in ours.
    (*ours, _), (*theirs, _) = ((*given[:6], *given[7:], given[6]) for given in starts)
    assert ours == theirs


def flat(arguments: tuple) -> Iterator:
    for argument in arguments:
        yield from flat(argument) if isinstance(argument, tuple) else [argument]


@pytest.mark.parametrize("trained", [False, True])
def test_numbers_of_a_user_come_as_pythons_own(trained, device, monkeypatch):
    """Others would be compiled apart, or be taken for tensors."""
    given = []
    make = launching.Repeated.__init__

    def spy(self, kernel, fixed, **constants):
        given.extend(x for x in flat(fixed) if isinstance(x, (int, float)))
        make(self, kernel, fixed, **constants)

    monkeypatch.setattr(launching.Repeated, "__init__", spy)
    hidden, weight = torch.randn(20, 16, device=device), torch.randn(50, 16, device=device)
    targets = torch.randint(0, 50, (20,), device=device)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    settings = {"softcap": np.float64(30), "filter_eps": np.float64(2.0**-12)}
    linear_cross_entropy(hidden, weight, targets, impl="cce", **settings).backward()
    linear_cross_entropy(hidden, weight, targets, impl="cce", softcap=30).backward()
    assert {type(x) for x in given} == {int, float}
    assert 30.0 in given
