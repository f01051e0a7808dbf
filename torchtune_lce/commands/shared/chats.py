"""Text that is on every machine: Python's standard library, and the documentation in it as questions and answers."""

import ast
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from torchtune_lce.commands.shared.errors import CommandError

# Tests are repetitive and partly written not to parse; the others are not the standard library.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_ANSWER = 40


def read_sources(folder: Path | None = None) -> dict[str, str]:
    """Source text by module name, in the order of the names, from ``folder`` (the running Python's library if None).

    Raises CommandError where there are no sources, as in an embedded or zipped Python.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            try:
                with tokenize.open(path) as file:  # follows the file's coding line
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):  # an unknown or wrong coding line: no Python source
                continue
            sources[".".join(part for part in parts if part != "__init__")] = text
    if not sources:
        raise CommandError(
            f"the demo's text is the source of Python's standard library, but {folder} holds no .py files; "
            "run it with a Python that was installed with its library's sources"
        )
    return dict(sorted(sources.items()))


def questions_and_answers(sources: dict[str, str]) -> list[dict[str, str]]:
    """One sample for each documented public module, class, function and method; repeated documentation counts once."""
    answers = {}
    for module, source in sources.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old string escapes
                tree = ast.parse(source)
        except SyntaxError:  # templates and files for other versions of Python
            continue
        for name, text in _documented(tree, module):
            if len(text) >= _SHORTEST_ANSWER:
                answers.setdefault(text, name)
    return [{"input": f"What does `{name}` do?", "output": text} for text, name in answers.items()]


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
    if any(part.startswith("_") for part in name.split(".")):
        return
    text = ast.get_docstring(node)
    if text:
        yield name, text
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _documented(child, f"{name}.{child.name}")


def pairs(samples: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    """Each question with its own answer, which is chosen, and with the next question's, which is rejected."""
    following = [*samples[1:], *samples[:1]]
    return [
        {"chosen": _chat(sample["input"], sample["output"]), "rejected": _chat(sample["input"], other["output"])}
        for sample, other in zip(samples, following, strict=True)
    ]


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_jsonl(samples: list[dict], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
