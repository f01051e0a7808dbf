"""The rules of the house as a walk over its imports, those inside functions and under TYPE_CHECKING too."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "torchtune_lce"
# From the top floor down, the rooms of a floor on one line. A room is a file or a folder; where several fit, the
# longest counts, and a star stands for each of a folder's names. A file imports from its own room and the floors below.
FLOORS = (
    "__main__.py",
    "commands/cli.py",
    "commands/tune_parser.py",
    "commands/*",  # a command each: none imports another
    "commands/shared",
    "commands/registry.py",
    "recipes",
    "training",
    "__init__.py filtering.py",  # names for users, of what lies below
    "loss.py distillation.py logprobs.py axolotl.py",
    "model",
    "transformers",
    "functional.py",
    "divergence",
    "terms",
    "implementations",
    "kernels",
    "inputs",
)
# In the package they are links to folders of the root, which users read and edit, without an __init__.py.
LINKED = ("kernels", "recipes", "configs")
MODULE_PATH = re.compile(rf"{PACKAGE}(\.\w+)+\.?")


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target`` in ``line``: files by their path in the package, or another package's name."""

    source: str
    line: int
    target: str


def files(root: Path) -> dict[str, Path]:
    """Every Python file of the package below the project's ``root``, by its path in the package."""
    folders = {"": root / PACKAGE, **{f"{name}/": root / name for name in LINKED}}
    return {
        prefix + path.relative_to(folder).as_posix(): path
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
        if prefix or path.relative_to(folder).parts[0] not in LINKED
    }


def imports(root: Path) -> list[Import]:
    """All of them; a string that is the path of a module, or begins one, counts too: by it somebody will import."""
    known = files(root)
    return [
        Import(source, line, target)
        for source, path in known.items()
        for line, target in _targets(source, ast.parse(path.read_text(encoding="utf-8")), known)
    ]


def _targets(source: str, tree: ast.Module, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_PATH.fullmatch(node.value):
            names = [node.value.removesuffix(".")]
        else:
            continue
        for name in names:
            yield node.lineno, _file(name, known)


def _absolute(source: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module
    above = [PACKAGE, *source.split("/")][: -node.level]
    return ".".join([*above, node.module] if node.module else above)


def _file(name: str, known: dict[str, Path]) -> str:
    """The file that holds the module ``name``, or the module that has it as an attribute; else the package's name."""
    first, *parts = name.split(".")
    if first != PACKAGE:
        return first
    while parts:
        path = "/".join(parts)
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in known:
                return file
        parts.pop()
    return "__init__.py"


def place(file: str) -> tuple[int, str] | None:
    """The floor of a file, 0 at the top, and its room; None where the table has no room for it."""
    fitting = []
    for floor, rooms in enumerate(FLOORS):
        for room in rooms.split():
            match = re.match(room.replace(".", r"\.").replace("*", "[^/]+") + "(/|$)", file)
            if match:
                fitting.append((len(room), floor, match[0].rstrip("/")))
    return max(fitting)[1:] if fitting else None


def complaints(root: Path) -> dict[tuple[str, str], str]:
    """What is against the rules, by source and target: a sentence with file, line and what to do."""
    found = {}
    inside = []  # their own floor
    for entry in imports(root):
        key, at = (entry.source, entry.target), f"{entry.source}:{entry.line} imports {entry.target}"
        if entry.target == "triton" and not entry.source.startswith("kernels/"):
            found[key] = f"{at}: only kernels/ may, move what needs it there"
        if not entry.target.endswith(".py"):
            continue
        places = place(entry.source), place(entry.target)
        if None in places:
            homeless = key[places.index(None)]
            found[key] = f"{at}: {homeless} has no room in FLOORS, give it one"
            continue
        (floor, room), (floor_below, room_below) = places
        if floor > floor_below:
            found[key] = f"{at}, which is above it: move what it needs down to {room}, or below"
        elif floor == floor_below and room != room_below:
            below = FLOORS[floor + 1]
            found[key] = f"{at}, a room of the same floor: move what both need to a floor below, {below} the first"
        elif floor == floor_below:
            inside.append(entry)
    return found | _circles(inside)


def _circles(entries: list[Import]) -> dict[tuple[str, str], str]:
    """Within rooms: a circle through several has an import that runs upward."""
    following: dict[str, list[str]] = {}
    for entry in entries:
        following.setdefault(entry.source, []).append(entry.target)
    found = {}
    for entry in entries:
        back = _way(entry.target, entry.source, following)
        if back is not None:
            circle = " -> ".join([entry.source, *back])
            found[entry.source, entry.target] = (
                f"{entry.source}:{entry.line} imports {entry.target}, which leads back to it ({circle}): "
                "move what both need to a file of its own, or into one of them"
            )
    return found


def _way(start: str, end: str, following: dict[str, list[str]]) -> list[str] | None:
    """The files of the shortest way, both ends included, or None."""
    ways, seen = [[start]], {start}
    for way in ways:
        if way[-1] == end:
            return way
        for file in following.get(way[-1], ()):
            if file not in seen:
                seen.add(file)
                ways.append([*way, file])
    return None


def nameless(root: Path) -> list[str]:
    """Folders of Python files whose __init__.py is absent or does not begin with a sentence about what they hold."""
    package = root / PACKAGE
    folders = {path.parent for path in package.rglob("*.py")}
    folders = {folder for folder in folders if folder == package or folder.relative_to(package).parts[0] not in LINKED}
    found = []
    for folder in sorted(folders):
        init, name = folder / "__init__.py", folder.relative_to(root).as_posix()
        if not init.is_file():
            found.append(f"{name} has no __init__.py: add one whose first line says what the folder holds")
        elif not re.match(r'"""\S+ .*\S', init.read_text(encoding="utf-8")):
            found.append(f'{name}/__init__.py:1 must be a docstring that says what the folder holds: """What ...')
    return found
