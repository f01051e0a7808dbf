"""What kernels take: few arguments, and no number specialized that they take to another type.

Of a 1 Triton makes a constant without types. In a named tuple it specializes all numbers.
"""

import ast

import pytest
from project import ROOT

FILES = sorted((ROOT / "kernels").glob("*.py"))
MOST_ARGUMENTS = 40


def many_arguments(source: str) -> list[tuple[str, int]]:
    """(Function, how many arguments it has) of those with more than MOST_ARGUMENTS."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    counted = ((function.name, len(arguments_of(function))) for function in functions)
    return [(name, count) for name, count in counted if count > MOST_ARGUMENTS]


def specialized_and_typed(source: str) -> list[tuple[str, str]]:
    """(Function, argument or field) of what is called `.to` of, and is specialized.

    Of a kernel's arguments that is what is not in `do_not_specialize`; of each function's named tuples all fields.
    """
    found = set()
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
            continue
        listed = {text.value for text in ast.walk(function.decorator_list[0]) if isinstance(text, ast.Constant)}
        arguments = set(arguments_of(function))
        specialized = arguments - listed if function.name.endswith("_kernel") else set()
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "to":
                name = ast.unparse(node.value)
                is_field = isinstance(node.value, ast.Attribute) and name.partition(".")[0] in arguments
                found |= {(function.name, name)} if is_field or name in specialized else set()
    return sorted(found)


def arguments_of(function: ast.FunctionDef) -> list[str]:
    given = function.args
    return [argument.arg for argument in given.posonlyargs + given.args + given.kwonlyargs]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_arguments_are_few(file):
    assert not many_arguments(file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_numbers_with_types_are_not_specialized(file):
    assert not specialized_and_typed(file.read_text())


def test_one_with_many_is_found():
    named = ", ".join(f"a{number}" for number in range(MOST_ARGUMENTS))
    source = f"def few({named}): pass\n@triton.jit\ndef many({named}, *, WIDTH: tl.constexpr): pass\n"
    assert many_arguments(source) == [("many", MOST_ARGUMENTS + 1)]


def test_one_that_is_specialized_is_found():
    source = """
@triton.jit(do_not_specialize=["rows"])
def _some_kernel(out, rows, columns, sizes, BLOCK: tl.constexpr):
    tl.store(out + rows.to(tl.int64) * columns, columns.to(tl.int64) * columns + sizes.width.to(tl.int64))

@triton.jit
def some_tile(out, row, sizes):
    tl.store(out + row.to(tl.int64), sizes.width.to(tl.int64) + sizes.height)
"""
    assert specialized_and_typed(source) == [
        ("_some_kernel", "columns"),
        ("_some_kernel", "sizes.width"),
        ("some_tile", "sizes.width"),
    ]
