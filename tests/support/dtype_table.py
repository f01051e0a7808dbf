"""The table of docs/dtypes.md, made by calling: `python tests/support/dtype_table.py` prints it.

``--write`` puts it there.
"""

import itertools
import sys
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from project import ROOT

from torchtune_lce import linear_cross_entropy
from torchtune_lce.implementations import choice

PAGE = ROOT / "docs" / "dtypes.md"
BEGIN, END = "<!-- table: tests/support/dtype_table.py -->", "<!-- end of table -->"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What autocast casts to on a CPU and on a card alike.
MODES = (None, torch.bfloat16, torch.float16)
REFUSED = "refused"


def mixes() -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """(hidden, weight, bias): every pair with a bias as the weight, and every other bias where the two are equal."""
    pairs = [(hidden, weight, weight) for hidden, weight in itertools.product(DTYPES, repeat=2)]
    return pairs + [(same, same, bias) for same, bias in itertools.permutations(DTYPES[:3], 2)]


def inputs(mix) -> dict[str, torch.Tensor]:
    shapes = {"hidden": (2, 4), "weight": (3, 4), "bias": (3,)}
    return {
        name: torch.ones(shape, dtype=dtype, requires_grad=True)
        for (name, shape), dtype in zip(shapes.items(), mix, strict=True)
    }


def autocast(mode: torch.dtype | None):
    return nullcontext() if mode is None else torch.autocast("cpu", mode)


def product_dtype(mix, mode, impl: str = "chunked") -> str:
    """In which dtype hidden and weight are multiplied, or that they are refused."""
    seen = []
    tensors = inputs(mix)
    right = choice._FUNCTIONS[impl]

    def spy(call):
        seen.append(call.hidden.dtype)
        return right(call)

    with mock.patch.dict(choice._FUNCTIONS, {impl: spy}), autocast(mode):
        try:
            loss = linear_cross_entropy(**tensors, targets=torch.tensor([0, 2]), impl=impl)
        except TypeError:
            return REFUSED
    loss.backward()
    assert loss.dtype == torch.promote_types(seen[0], torch.float32)
    assert all(tensor.grad.dtype == tensor.dtype for tensor in tensors.values())
    return short(seen[0])


def plain_product_dtype(mix, mode) -> str:
    """The same of F.linear, which raises for what it does not take."""
    tensors = inputs(mix)
    with autocast(mode):
        try:
            return short(F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]).dtype)
        except RuntimeError:
            return REFUSED


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table() -> str:
    head = ["hidden", "weight", "bias", "no autocast", *(f"autocast {short(mode)}" for mode in MODES[1:])]
    rows = [[*map(short, mix), *(product_dtype(mix, mode) for mode in MODES)] for mix in mixes()]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written() -> str:
    """The table that the page holds."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
    else:
        print(table())
