"""What a product reads in a loop has no other use there.

Triton 3.6 pipelines the loads of a loop on sm90 while products of it still run. It gives what a product alone reads a
buffer more than it fetches ahead; what is also stored, or read by another product, has one fewer, and is overwritten
while the product reads it: sums were wrong, and other ones in each run.
"""

import ast
from collections.abc import Iterator

import pytest
from project import ROOT


def reads(node: ast.AST, name: str) -> int:
    """How often a pass through it reads a name's values. Of the branches of an `if` one is taken."""
    if isinstance(node, ast.Attribute) and node.attr == "dtype":
        return 0
    if isinstance(node, ast.If):
        branches = (sum(reads(part, name) for part in branch) for branch in (node.body, node.orelse))
        return reads(node.test, name) + max(branches)
    own = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id == name
    return own + sum(reads(child, name) for child in ast.iter_child_nodes(node))


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a loop, but not in a loop within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.For, ast.While)):
            yield child
            yield from own_nodes(child)


def shared_operands(source: str) -> list[tuple[int, str]]:
    """(Line of the loop, name) of what is loaded in a loop, is an operand of a product there, and has another use."""
    found = []
    for loop in (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.For, ast.While))):
        loaded, operands = set(), set()
        for node in own_nodes(loop):
            if isinstance(node, ast.Assign) and ".load(" in ast.unparse(node.value):
                loaded |= {x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                operands |= {x.id for operand in node.args[:2] for x in ast.walk(operand) if isinstance(x, ast.Name)}
        found += [(loop.lineno, name) for name in sorted(loaded & operands) if reads(loop, name) > 1]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_operands_have_no_other_use(file):
    assert not shared_operands(file.read_text())


STORED = """
for start in range(0, features, BLOCK_D):
    a = tl.load(rows + start)
    tl.store(copy + start, a)
    total = tl.dot(a, b_blocks.load([0, start]).T, total)
"""
READ_TWICE = """
for start in range(0, features, BLOCK_D):
    a = blocks.load([0, start])
    b, c = tl.load(left + start), tl.load(right + start)
    left_total = tl.dot(a, b, left_total)
    right_total = tl.dot(a, c, right_total)
"""
IN_LOOPS_OF_THEIR_OWN = """
for tile in range(tiles):
    for start in range(0, features, BLOCK_D):
        a = tl.load(rows + start)
        tl.store(copy + start, a)
    for start in range(0, features, BLOCK_D):
        a = tl.load(rows + start)
        total = tl.dot(a, b, total)
    w = tl.load(weight + tile)
    if w.dtype == tl.bfloat16:
        sums = tl.dot(total.to(tl.bfloat16), w, sums)
    else:
        sums = tl.dot(total, w.to(tl.float32), sums)
"""


@pytest.mark.parametrize(
    ("source", "expected"), [(STORED, [(2, "a")]), (READ_TWICE, [(2, "a")]), (IN_LOOPS_OF_THEIR_OWN, [])]
)
def test_another_use_is_found(source, expected):
    assert shared_operands(source) == expected
