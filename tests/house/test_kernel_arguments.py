"""Numbers that a kernel takes to another type are not specialized: of a 1 Triton makes a constant without types."""

import ast

import pytest
from project import ROOT


def specialized_and_typed(source: str) -> list[tuple[str, str]]:
    """(Kernel, parameter) of what a kernel calls `.to` of, and does not list in `do_not_specialize`."""
    found = set()
    for kernel in ast.parse(source).body:
        if not isinstance(kernel, ast.FunctionDef) or not kernel.name.endswith("_kernel"):
            continue
        listed = {text.value for text in ast.walk(kernel.decorator_list[0]) if isinstance(text, ast.Constant)}
        parameters = {argument.arg for argument in kernel.args.args} - listed
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and node.attr == "to" and isinstance(node.value, ast.Name):
                found |= {(kernel.name, node.value.id)} if node.value.id in parameters else set()
    return sorted(found)


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_numbers_with_types_are_not_specialized(file):
    assert not specialized_and_typed(file.read_text())


def test_one_that_is_specialized_is_found():
    source = """
@triton.jit(do_not_specialize=["rows"])
def _some_kernel(out, rows, columns, BLOCK: tl.constexpr):
    tl.store(out + rows.to(tl.int64) * columns, columns.to(tl.int64) * columns)
"""
    assert specialized_and_typed(source) == [("_some_kernel", "columns")]
