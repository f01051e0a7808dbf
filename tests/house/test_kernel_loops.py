"""A loop of a kernel has one product: two in one, pipelined by Triton 3.6 on sm90, gave other sums in each run."""

import ast
import textwrap

import pytest
from project import ROOT


def most_products(node: ast.AST) -> int:
    """Calls of tl.dot that a pass through it may make, those of loops within it left out."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
        return 1
    if isinstance(node, ast.If):
        return max(sum(map(most_products, branch)) for branch in (node.body, node.orelse))
    inner = (child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.For, ast.While)))
    return sum(map(most_products, inner))


def crowded_loops(source: str) -> list[int]:
    """Lines of the loops that have more than one."""
    loops = (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.For, ast.While)))
    return [loop.lineno for loop in loops if most_products(loop) > 1]


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_one_product_a_loop(file):
    assert not crowded_loops(file.read_text())


def test_two_are_found():
    source = """
    for start in range(0, features, BLOCK_D):
        a = tl.dot(x, y, a)
        if WIDE:
            b = tl.dot(x, z, b)
    for tile in range(tiles):
        for start in range(0, features, BLOCK_D):
            a = tl.dot(x, y, a)
        if WIDE:
            b = tl.dot(a, z, b)
        else:
            b = tl.dot(a, w, b)
    """
    assert crowded_loops(textwrap.dedent(source)) == [2]
