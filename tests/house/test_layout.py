"""The rules of the layout: who may import whom. The table of rooms is FLOORS in tests/support/house_rules.py."""

from pathlib import Path

import pytest
from house_rules import FLOORS, LINKED, PACKAGE, complaints, files, imports, nameless, place
from project import ROOT


def test_imports_keep_the_rules():
    found = complaints(ROOT).values()
    assert not found, "\n".join(found)


def test_every_folder_says_what_it_holds():
    assert not nameless(ROOT), "\n".join(nameless(ROOT))


def test_every_room_of_the_table_is_there():
    for room in " ".join(FLOORS).split():
        folder = ROOT if room in LINKED else ROOT / PACKAGE
        assert list(folder.glob(room)), f"{room} in FLOORS is neither a file nor a folder of {PACKAGE}: take it out"


def test_every_file_has_a_room():
    homeless = [file for file in files(ROOT) if place(file) is None]
    assert not homeless, f"give it a room in FLOORS: {homeless}"
    assert place("attic/new.py") is None


def plant(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


LAZY = "def f():\n    from torchtune_lce import loss\n"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchtune_lce.terms.new import Term\n"


@pytest.mark.parametrize(
    ("tree", "sentences"),
    [
        pytest.param(
            {"kernels/new.py": "import torch\nfrom torchtune_lce.implementations.choice import NAMES\n"},
            ["kernels/new.py:2 imports implementations/choice.py, which is above it: move what it needs down to"],
            id="upward",
        ),
        pytest.param(
            {"torchtune_lce/inputs/new.py": LAZY, "torchtune_lce/loss.py": ""},
            ["inputs/new.py:2 imports loss.py, which is above it"],
            id="upward in a function",
        ),
        pytest.param(
            {"torchtune_lce/inputs/new.py": FOR_TYPES, "torchtune_lce/terms/new.py": ""},
            ["inputs/new.py:3 imports terms/new.py, which is above it"],
            id="upward for types",
        ),
        pytest.param(
            {"torchtune_lce/model/new.py": "from ..loss import Loss\n", "torchtune_lce/loss.py": ""},
            ["model/new.py:1 imports loss.py, which is above it"],
            id="upward by a relative path",
        ),
        pytest.param(
            {
                "torchtune_lce/commands/shared/new.py": 'LOSS = "torchtune_lce.commands.plan.step.Loss"\n',
                "torchtune_lce/commands/plan/step.py": "",
            },
            ["commands/shared/new.py:1 imports commands/plan/step.py, which is above it"],
            id="upward by a path in a string",
        ),
        pytest.param(
            {"torchtune_lce/commands/new.py": "", "torchtune_lce/commands/shared/a.py": "from .. import new\n"},
            ["commands/shared/a.py:1 imports commands/new.py, which is above it: move what it needs down"],
            id="shared imports a command",
        ),
        pytest.param(
            {
                "torchtune_lce/commands/plan/a.py": "import torchtune_lce.commands.bench.report as report\n",
                "torchtune_lce/commands/bench/report.py": "",
            },
            [
                "commands/plan/a.py:1 imports commands/bench/report.py, a room of the same floor: move",
                "commands/shared",
            ],
            id="a command imports another",
        ),
        pytest.param(
            {
                "torchtune_lce/terms/a.py": "import torch\nfrom torchtune_lce.terms.b import x\n",
                "torchtune_lce/terms/b.py": "def f():\n    from torchtune_lce.terms import a\n",
            },
            [
                "terms/a.py:2 imports terms/b.py, which leads back to it (terms/a.py -> ",
                "terms/b.py:2 imports terms/a.py",
            ],
            id="a pair",
        ),
        pytest.param(
            {
                "recipes/a.py": "from torchtune_lce.recipes import b\n",
                "recipes/b.py": "from torchtune_lce.recipes import c\n",
                "recipes/c.py": "from torchtune_lce.recipes import a\n",
            },
            ["recipes/a.py:1 imports recipes/b.py, which leads back to it (recipes/a.py -> recipes/b.py -> recip"],
            id="a longer circle",
        ),
        pytest.param(
            {"torchtune_lce/terms/new.py": "def f():\n    from triton.testing import do_bench\n"},
            ["terms/new.py:2 imports triton: only kernels/ may"],
            id="triton",
        ),
        pytest.param(
            {"torchtune_lce/loss.py": "from torchtune_lce.attic import new\n", "torchtune_lce/attic/new.py": ""},
            ["loss.py:1 imports attic/new.py: attic/new.py has no room in FLOORS"],
            id="no room",
        ),
    ],
)
def test_a_planted_import_is_told_with_its_place(tmp_path, tree, sentences):
    if "implementations" in str(tree):
        tree = {**tree, "torchtune_lce/implementations/choice.py": ""}
    found = "\n".join(complaints(plant(tmp_path, tree)).values())
    for sentence in sentences:
        assert sentence in found, found


def test_imports_downward_and_triton_in_kernels_are_free(tmp_path):
    tree = {
        "torchtune_lce/__init__.py": '"""A package."""\nfrom torchtune_lce.loss import Loss\n',
        "torchtune_lce/loss.py": "import torch\nfrom .terms import a\nfrom torchtune_lce.kernels import forward\n",
        "torchtune_lce/terms/a.py": "from torchtune_lce.terms import b\n",
        "torchtune_lce/terms/b.py": "",
        "torchtune_lce/commands/cli.py": "from torchtune_lce.commands.plan import step\n",
        "torchtune_lce/commands/plan/step.py": "from torchtune_lce.commands import registry\n",
        "torchtune_lce/commands/registry.py": "",
        "kernels/forward.py": "import triton\n",
    }
    assert not complaints(plant(tmp_path, tree))
    assert len(imports(tmp_path)) == 8
    assert files(tmp_path).keys() == {name.removeprefix("torchtune_lce/") for name in tree}


def test_a_folder_without_a_name_is_told(tmp_path):
    tree = {
        "torchtune_lce/__init__.py": '"""A package."""\n',
        "torchtune_lce/a/b.py": "",
        "torchtune_lce/c/__init__.py": "import torch\n",
    }
    absent, wordless = nameless(plant(tmp_path, tree))
    assert absent.startswith("torchtune_lce/a has no __init__.py: add one")
    assert wordless.startswith("torchtune_lce/c/__init__.py:1 must be a docstring")
