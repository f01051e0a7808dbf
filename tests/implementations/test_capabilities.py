"""The table of what each impl can do: the code does it or refuses it by name, and the pages say the same."""

import re

import capability_table
import pytest
import torch
import torch.nn.functional as F
from calls import compute
from fused_steps import steps_as
from grid import each
from project import ROOT

from torchtune_lce.implementations import choice
from torchtune_lce.implementations.capabilities import CAPABILITIES, able, setting
from torchtune_lce.inputs.options import Options

TOKENS, ENTRIES, WIDTH = 5, 19, 8


def make_inputs(device, dtype=torch.float32):
    hidden, weight = (torch.randn(n, WIDTH, device=device, dtype=dtype, requires_grad=True) for n in (TOKENS, ENTRIES))
    return hidden, weight, torch.arange(TOKENS, device=device)


def loss(impl, hidden, weight, targets):
    return compute(hidden, weight, targets, options=Options(), impl=impl)


def plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def doubles(impl, device):
    inputs = make_inputs(device, torch.float64)
    return _with_gradients(loss(impl, *inputs), plain(*inputs), *inputs[:2])


def second_derivative(impl, device):
    hidden, weight, targets = make_inputs(device)

    def penalty(value):
        return torch.autograd.grad(value, hidden, create_graph=True)[0].square().sum()

    ours = torch.autograd.grad(penalty(loss(impl, hidden, weight, targets)), (hidden, weight))
    return ours, torch.autograd.grad(penalty(plain(hidden, weight, targets)), (hidden, weight))


def transform(impl, device):
    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    ours = torch.func.grad(lambda x: loss(impl, x, weight, targets))(hidden)
    return ours, torch.func.grad(lambda x: plain(x, weight, targets))(hidden)


def forward_mode(impl, device):
    hidden, weight, targets = (x.detach() for x in make_inputs(device))
    ours = torch.func.jvp(lambda x: loss(impl, x, weight, targets), (hidden,), (weight[:TOKENS],))
    return ours, torch.func.jvp(lambda x: plain(x, weight, targets), (hidden,), (weight[:TOKENS],))


def _with_gradients(ours, expected, *leaves):
    return tuple((value.detach(), *torch.autograd.grad(value, leaves)) for value in (ours, expected))


TRIED = {
    doubles: "float64",
    second_derivative: "second_derivative",
    transform: "transforms",
    forward_mode: "transforms",
}


@pytest.mark.parametrize("attempt", TRIED, ids=lambda attempt: attempt.__name__)
@pytest.mark.parametrize("impl", each(*CAPABILITIES))
def test_does_or_refuses(impl, attempt, device):
    """As exactly as plain PyTorch; or in a sentence that names those that do."""
    can, capability = CAPABILITIES[impl], TRIED[attempt]
    if can.needs_compiler:
        # Up to its code generation, which takes seconds: what it refuses, it refuses before.
        torch._dynamo.reset()
    with steps_as(lambda step, shared=(): torch.compile(step, backend="aot_eager", fullgraph=True)):
        if getattr(can, capability):
            ours, expected = attempt(impl, device)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
            return
        with pytest.raises(RuntimeError) as caught:
            attempt(impl, device)
    # The presets share their operators, whose backward does not know which one it serves.
    named = "cce" if can.needs_triton and attempt is second_derivative else impl
    assert str(caught.value).startswith(f"impl='{named}' ")
    offered = re.findall(r"(?:impl=|, | or )'(\w+)'", str(caught.value).split("; set ")[1])
    assert tuple(offered) == able(capability)


def test_every_impl_has_its_row():
    """Names in the order that messages and configs have them in."""
    presets = ("cce", "cce_exact", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e")
    assert choice.NAMES == ("auto", *presets, "torch_compile", "chunked", "reference")
    assert CAPABILITIES.keys() == choice.CCE_PRESETS.keys() | choice._FUNCTIONS.keys()


def test_what_runs_anywhere_needs_nothing():
    can = CAPABILITIES[choice.ANYWHERE]
    assert (can.needs_triton, can.needs_compiler, can.cuda_only) == (False, False, False)
    assert can.compute_capability == (0, 0)
    # What auto takes it for.
    assert can.float64


def test_page_has_the_table():
    assert capability_table.written() == capability_table.table()


def test_readme_tells_of_each():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Which `impl`\n")[1].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines()[2:]]
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == set(choice.NAMES)


def test_settings_in_words():
    assert setting(["a"]) == "impl='a'"
    assert setting(["a", "b"]) == "impl='a' or 'b'"
    assert setting(["a", "b", "c"]) == "impl='a', 'b' or 'c'"
